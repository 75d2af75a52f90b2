"""Engines of several ranks on a CPU, in processes that are forked with vLLM imported."""

import multiprocessing
from typing import Any

from kvtuner_tools import processes
from kvtuner_tools.calibration.capture import CaptureJob, run_capture_engine

_begin = processes._begin


def begin(output: Any) -> None:
    """What a process of an engine begins with, in place of ``processes._begin``."""
    fork_ranks()
    _begin(output)


def capture(job: CaptureJob) -> None:
    """``run_capture_engine``."""
    fork_ranks()
    run_capture_engine(job)


def fork_ranks() -> None:
    """Let an engine's ranks be forked from this process; vLLM's CPU build spawns them, and each imports vLLM again."""
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
