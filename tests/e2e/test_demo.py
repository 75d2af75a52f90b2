"""``kvtuner demo`` as ``make serve`` calls it: the real model from its wheel, served with its profile over HTTP."""

import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_demo_serves_the_model_and_reports_its_memory():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = subprocess.run(
        [sys.executable, "-m", "kvtuner_tools.cli", "demo", "--once", "--port", str(port)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    answer = result.stdout.partition("assistant: ")[2].partition("\n\nKV memory")[0]
    assert "scatter" in answer
    nominal, stored = re.search(r"([\d.]+) nominal bits, ([\d.]+) stored bits", result.stdout).groups()
    assert (nominal, stored) == ("4.00", "4.50")
    ours, bf16 = (
        int(number.replace(",", ""))
        for number in re.search(r"holds ([\d,]+) .* ([\d,]+)$", result.stdout.strip()).groups()
    )
    # The server's own count: 16 / stored bits times bf16's, less the windows of requests of max_model_len, which take
    # whole blocks of 32 tokens on a CPU: so many bytes in the dtype that the machine is fast in, bfloat16 or float32.
    shares = [4096 * 6480 / (4096 * 6480 + window) for window in (2_488_320, 2 * 2_488_320)]
    assert min(abs(ours / bf16 / (16 / float(stored)) - share) for share in shares) < 0.005
