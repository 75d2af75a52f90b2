"""Switches and fixtures that tests of several folders share."""

import atexit
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvtuner_tools.vllm_logs import LEVEL_VARIABLE

# What tests calibrate must not end up among the profiles of whoever runs them, nor these in the tests.
os.environ["KVTUNER_PROFILE_FOLDER"] = tempfile.mkdtemp(prefix="kvtuner-profiles-")
atexit.register(shutil.rmtree, os.environ["KVTUNER_PROFILE_FOLDER"], ignore_errors=True)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, so before anything that imports it


ENGINE_FOLDERS = ("e2e", "serving")
"""All of their tests start engines or servers; others that do are marked where they stand."""


# Before pytest's own, which deselects by marker.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    cases = defaultdict(list)
    for item in items:
        if item.path.relative_to(here).parts[0] in ENGINE_FOLDERS:
            item.add_marker(pytest.mark.engine)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("quick"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for same in cases.values():
        (count,) = same[0].get_closest_marker("quick").args
        kept = {index * len(same) // count for index in range(count)}
        for index, item in enumerate(same):
            if index not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: the first GPU, or the CPU with kernels interpreted."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def environment_is_left() -> Iterator[None]:
    """A test that leaves one of these variables changes the engines of later tests; vLLM leaves others by itself."""
    before = _engine_variables()
    yield
    assert _engine_variables() == before


def _engine_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name == LEVEL_VARIABLE or name.startswith("KVTUNER_")}
