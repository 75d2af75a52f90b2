"""One engine of ``kvtuner bench serve``: decode points, long prefill, and closed-loop throughput."""

import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtuner_tools.bench.closed_loop import NO_RATES, ClosedLoop, fitting_requests, measure_decode, measure_throughput
from kvtuner_tools.bench.points import LongPrefill, Point, ThroughputPoint
from kvtuner_tools.bench.speculation import Speculation
from kvtuner_tools.cache_setting import CacheSetting

CUDAGRAPH_CAPTURE_SIZES = (1, 8, 32, 64, 128, 256)
"""Requests of the batches that are captured."""
THROUGHPUT_CAPTURE_SIZES = (192, 320, 384, 448, 512, 640, 768, 896, 1024, 1152)
"""Captured too where throughput is measured, so that a batch at full memory is padded by little; the last for as many
requests as run at once, with the ends of cached prompts beside them."""
BATCHED_TOKENS = 16384
"""Tokens of a step at most, where no long prefill says another chunk."""
WARM_RUNS = 2
"""Runs with the prompts cached, of which the quickest counts."""
LONG_PREFILLS = 3
"""Prompts that are prefilled one after the other, after one more to warm up."""


@dataclass(frozen=True)
class ServeJob:
    """One engine and what to measure in it.

    Attributes:
        model: folder with config.json.
        vocab_size: of that model; prompt tokens are drawn from it.
        output_tokens: decode steps per point.
        throughput: closed-loop points.
        window_s: seconds of steady state of each.
        long_prefill: a long prompt; its chunk is the most tokens of any step of the engine.
        memory: share of the device's memory that vLLM may use.
        kv_memory_bytes: KV cache memory; None takes what ``memory`` leaves.
        max_num_seqs: requests that run at once.
        lines: file that takes one JSON line {kind: record} when the engine is up and one per measurement.
        speculation: of all requests, or None.
        environment: variables that the engine needs besides those of this process.
    """

    model: Path
    vocab_size: int
    setting: CacheSetting
    points: tuple[Point, ...]
    output_tokens: int
    throughput: tuple[ThroughputPoint, ...]
    window_s: float
    long_prefill: LongPrefill | None
    memory: float
    kv_memory_bytes: int | None
    max_model_len: int
    max_num_seqs: int
    lines: Path
    speculation: Speculation | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def query_tokens(self) -> int:
        """Tokens of a request that a decode step computes, and which it may get."""
        return 1 if self.speculation is None else self.speculation.query_tokens

    @property
    def capture_sizes(self) -> list[int]:
        """Tokens of the batches that are captured: of so many requests, which all decode."""
        sizes = CUDAGRAPH_CAPTURE_SIZES + (THROUGHPUT_CAPTURE_SIZES if self.throughput else ())
        most = self.max_num_seqs * 9 // 8
        return sorted(size * self.query_tokens for size in sizes if size <= most)


def measure(job: ServeJob) -> None:
    """Build the engine, measure everything, and write a JSON line as each is known. Meant for a process of its own.

    Raises:
        ValueError: a request does not fit the cache; or, when all is measured, the engine did not speculate as asked.
    """
    os.environ.update(job.environment)  # before vLLM is imported, which remembers what it found
    from vllm import LLM
    from vllm.utils.gc_utils import freeze_gc_heap

    problems: list[str] = []

    def emit(kind: str, record: dict[str, Any]) -> None:
        problems.extend(speculation_problems(job, record))
        with open(job.lines, "a") as file:
            file.write(json.dumps({kind: record}) + "\n")
        print(job.setting.label, json.dumps(record), flush=True)

    start = time.time()
    llm = LLM(
        model=str(job.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=job.setting.kv_cache_dtype,
        attention_backend=job.setting.attention_backend,
        max_model_len=job.max_model_len,
        gpu_memory_utilization=job.memory,
        kv_cache_memory_bytes=job.kv_memory_bytes,
        enable_prefix_caching=True,
        max_num_seqs=job.max_num_seqs,
        # vLLM's long_prefill_token_threshold does not hold for a request that is alone.
        max_num_batched_tokens=job.long_prefill.chunk if job.long_prefill else BATCHED_TOKENS,
        compilation_config={"cudagraph_capture_sizes": job.capture_sizes},
        speculative_config=job.speculation and job.speculation.config,
        # Preemptions are counted among the statistics alone.
        disable_log_stats=not job.throughput,
        additional_config=job.setting.additional_config(),
    )
    cache = llm.llm_engine.vllm_config.cache_config
    emit(
        "engine",
        {
            "startup_s": round(time.time() - start, 1),
            "kv_tokens": cache.kv_cache_size_tokens,
            "block_size": cache.block_size,
        },
    )
    try:
        low, high = token_range(job.vocab_size)
        _generate(llm, [list(range(low, low + 128))] * 2, 4)
        freeze_gc_heap()  # as vLLM's server does once it is up: a collection of all took half a second of a window
        for point in job.points:
            emit("points", decode_point(llm, job, point, low, high))
        if job.long_prefill:
            emit("long_prefill", long_prefill_point(llm, job.long_prefill, low, high))
        for throughput in job.throughput:
            emit("throughput", throughput_point(llm, job, throughput, low, high))
        if problems:
            raise ValueError("; ".join(problems))
    finally:
        # A process waits for its children before it ends, and the engine's ends only when told to.
        llm.llm_engine.engine_core.shutdown()


def speculation_problems(job: ServeJob, record: dict[str, Any]) -> list[str]:
    """Why the steps of a measurement were not speculated as asked; none where it has no steps."""
    requests, steps = record.get("batch") or record.get("concurrency"), record.get("decode_steps")
    if job.speculation is None or not requests or not steps:
        return []
    problem = job.speculation.problem(record["tokens_per_step"], requests * steps)
    return [] if problem is None else [problem]


def decode_point(llm: Any, job: ServeJob, point: Point, low: int, high: int) -> dict[str, Any]:
    """Prefill of random prompts, then decoding alone with the prompts cached."""
    random.seed(point.batch * point.context)
    prompts = [[random.randrange(low, high) for _ in range(point.context)] for _ in range(point.batch)]
    cold = _generate(llm, prompts, 1)
    runs = [
        measure_decode(llm.llm_engine, prompts, job.output_tokens, _samplings(job), most_per_step=job.query_tokens)
        for _ in range(WARM_RUNS)
    ]
    steps = min((run.steps for run in runs if run.steps is not None), key=lambda steps: steps.seconds, default=None)
    return {
        "batch": point.batch,
        "context": point.context,
        "prefill_s": round(cold, 2),
        "warm_s": round(min(run.first_s for run in runs), 3),
        **(NO_RATES if steps is None else steps.rates(point.batch)),
    }


def long_prefill_point(llm: Any, long_prefill: LongPrefill, low: int, high: int) -> dict[str, Any]:
    """Seconds to the first token of prompts that share nothing."""
    prompt = _prompts(long_prefill.prompt, low, high, seed=1)
    times = [_generate(llm, [prompt()], 1) for _ in range(1 + LONG_PREFILLS)][1:]
    return {
        "prompt": long_prefill.prompt,
        "chunk": long_prefill.chunk,
        "seconds": round(statistics.median(times), 4),
        "seconds_min": round(min(times), 4),
        "seconds_max": round(max(times), 4),
    }


def throughput_point(llm: Any, job: ServeJob, point: ThroughputPoint, low: int, high: int) -> dict[str, Any]:
    from tqdm import tqdm

    cache = llm.llm_engine.vllm_config.cache_config
    fitting = fitting_requests(cache.kv_cache_size_tokens, cache.block_size, point.prompt + point.output)
    if not fitting:
        raise ValueError(f"a request of {point} must fit the KV cache, but got {cache.kv_cache_size_tokens} tokens")
    concurrency = min(fitting, job.max_num_seqs)

    def preemptions() -> int:
        return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")

    with tqdm(total=1.0, bar_format="{desc} {percentage:3.0f}%|{bar}|", mininterval=1) as bar:

        def progress(phase: str, share: float) -> None:
            bar.set_description_str(f"{job.setting.label} {point} {phase}", refresh=False)
            bar.n = share
            bar.update(0)

        # A seed of its own, or its prompts would begin as those of another point, which may still be cached.
        prompts = _prompts(point.prompt, low, high, seed=point.prompt)
        loop = ClosedLoop(llm.llm_engine, prompts, _samplings(job), most_per_step=job.query_tokens)
        measured = measure_throughput(loop, point, concurrency, job.window_s, preemptions, progress)
    return {
        "prompt": point.prompt,
        "output": point.output,
        "fitting": fitting,
        "concurrency": concurrency,
        **measured,
    }


def _samplings(job: ServeJob) -> Callable[[int], Any]:
    """Makes parameters of requests. Of speculation, the nth request's lots are the same in every engine."""
    if job.speculation is None:
        return _sampling
    numbers = itertools.count()
    return lambda output_tokens: _sampling(output_tokens, next(numbers))


def _sampling(output_tokens: int, seed: int | None = None) -> Any:
    """Parameters of a request that takes so many tokens and returns them as they come."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        seed=seed,
        max_tokens=output_tokens,
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _prompts(length: int, low: int, high: int, seed: int) -> Callable[[], list[int]]:
    """Makes random prompts, a new one a call."""
    import numpy as np

    generator = np.random.default_rng(seed)
    return lambda: generator.integers(low, high, length).tolist()


def _generate(llm: Any, prompts: list[list[int]], output_tokens: int) -> float:
    """Seconds to generate ``output_tokens`` tokens for every prompt."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.time()
    llm.generate(inputs, params, use_tqdm=False)
    return time.time() - begin


def token_range(vocab_size: int) -> tuple[int, int]:
    """First and one past the last prompt token: 1000 to 100,000 where the vocabulary holds them."""
    return min(1000, vocab_size // 2), min(100_000, vocab_size)
