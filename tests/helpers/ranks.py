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
    """Let an engine's ranks be forked from this process; vLLM's CPU build spawns them, and each imports vLLM again.

    Its pipeline stages have no room for what the stage before gives unless a model is compiled: vLLM makes it in a pass
    that eager engines on a CPU leave out.
    """
    from vllm.distributed import get_pp_group
    from vllm.v1.executor import multiproc_executor
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    initialize_kv_cache = CPUModelRunner.initialize_kv_cache

    def with_room(runner: Any, *args: Any, **keywords: Any) -> None:
        initialize_kv_cache(runner, *args, **keywords)
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    CPUModelRunner.initialize_kv_cache = with_room
