"""A short soak; CONTRIBUTING says how to run a long one."""

import json
import subprocess
import sys

import pytest

from tests.helpers.engine import cpu_only
from tests.soak import REQUESTS

pytestmark = [cpu_only, pytest.mark.engine]

ROUNDS = 3


@pytest.mark.parametrize("options", [[], ["--speculative"]], ids=["plain", "speculative"])
def test_mixed_requests(options):
    command = [sys.executable, "-m", "tests.soak", "--rounds", str(ROUNDS), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["requests"] == report["finished"] + report["cancelled"] == ROUNDS * (REQUESTS + 1)
    # It has met what it is for.
    assert min(report[kind] for kind in ("preemptions", "cancelled", "structured", "cached tokens")) > 0
    assert report["compared"] > 10
