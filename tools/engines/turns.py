"""The engine of one setting of ``kvtuner bench turns``, which stays up in a process of its own between its turns."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtuner_tools.bench.closed_loop import decode_room, measure_decode
from kvtuner_tools.bench.points import Point
from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engines.serve import token_range

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds that pass, and seconds of all threads of the engine's process."""

_engines: dict[str, Any] = {}
"""The engine of this process."""


@dataclass(frozen=True)
class TurnsJob:
    """One engine.

    Attributes:
        model: folder with config.json; weights are random.
        dtype: of the model.
        threads: of OpenMP, None for what vLLM takes.
        points: that it will be asked for.
        steps: decode steps of a turn.
        kv_memory_bytes: of its KV cache.
    """

    model: Path
    setting: CacheSetting
    dtype: str
    threads: int | None
    points: tuple[Point, ...]
    steps: int
    kv_memory_bytes: int


def start(job: TurnsJob) -> None:
    """Build the engine in this process. On a CPU it runs in the process itself, so that its clock sees all of it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if job.threads is not None:
        os.environ |= {"OMP_NUM_THREADS": str(job.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM

    _engines["engine"] = LLM(
        model=str(job.model),
        dtype=job.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=job.setting.kv_cache_dtype,
        max_model_len=max(point.context for point in job.points) + decode_room(job.steps),
        max_num_seqs=max(point.batch for point in job.points),
        kv_cache_memory_bytes=job.kv_memory_bytes,
        enable_prefix_caching=True,
        enforce_eager=True,
        additional_config=job.setting.additional_config(),
    ).llm_engine


def turn(point: Point, steps: int, clock: str) -> float:
    """Seconds of a decode step at a point, as a mean of ``steps``."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    def sampling(output_tokens: int) -> Any:
        return SamplingParams(
            max_tokens=output_tokens,
            ignore_eos=True,
            temperature=0.0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    engine = _engines["engine"]
    low, high = token_range(engine.model_config.get_vocab_size())
    numbers = random.Random(point.batch * point.context)
    prompts = [[numbers.randrange(low, high) for _ in range(point.context)] for _ in range(point.batch)]
    measured = measure_decode(engine, prompts, steps, sampling, CLOCKS[clock]).steps
    assert measured is not None, "some step has decoded alone"
    return measured.seconds


def stop() -> None:
    """End the engine, whose children a process would wait for."""
    if engine := _engines.pop("engine", None):
        engine.engine_core.shutdown()
