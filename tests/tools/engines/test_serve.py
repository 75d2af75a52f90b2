"""One engine of ``kvtuner bench serve`` on a tiny model."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvtuner_tools.bench.points import Point, ThroughputPoint
from kvtuner_tools.bench.speculation import Speculation
from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engines.serve import (
    ServeJob,
    decode_point,
    measure,
    speculation_problems,
    throughput_point,
    token_range,
)
from tests.helpers.engine import VOCABULARY, cpu_only, fork_server
from tests.helpers.tiny_model import make_tiny_model

TOKENS = token_range(VOCABULARY)
DRAFTED = 3
ROUNDED = 0.06
"""Rates are written with one digit after the point, which shows where a busy machine makes a step long."""


def _job(model: Path) -> ServeJob:
    return ServeJob(
        model=model, vocab_size=VOCABULARY, setting=CacheSetting("kvtuner", "K4V4:plain"), points=(), output_tokens=8,
        throughput=(), window_s=1.0, long_prefill=None, memory=0.0, kv_memory_bytes=None, max_model_len=512,
        max_num_seqs=4, lines=model,
    )  # fmt: skip


def _in_engine(inside: Callable[[Any, ServeJob], Any], job: ServeJob, **options: Any) -> Any:
    from vllm import LLM

    llm = LLM(
        str(job.model), kv_cache_dtype="kvtuner", additional_config={"kvtuner_profile": "K4V4:plain"}, dtype="float32",
        enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=4,
        kv_cache_memory_bytes=4 << 20, disable_log_stats=False, **options,
    )  # fmt: skip
    try:
        return inside(llm, job)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _plain(llm: Any, job: ServeJob) -> tuple[dict, dict]:
    point = ThroughputPoint(24, 8)
    return throughput_point(llm, job, point, *TOKENS), decode_point(llm, job, Point(3, 40), *TOKENS)


def _speculated(llm: Any, job: ServeJob) -> tuple[dict, int, int]:
    """The point, and what vLLM has counted: drafted tokens and accepted ones."""
    point = decode_point(llm, job, Point(3, 40), *TOKENS)
    names = [f"vllm:spec_decode_num_{what}_tokens" for what in ("draft", "accepted")]
    counted = {metric.name: metric for metric in llm.get_metrics() if metric.name in names}
    drafted, accepted = (counted[name].value for name in names)
    return point, drafted, accepted


class Stop(Exception):
    """Raised where an engine would be built."""


def test_an_engine_finds_its_variables_as_soon_as_vllm_is_imported(tmp_path, monkeypatch):
    class FakeVllm(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name == "LLM":
                raise Stop(os.environ.get("FOR_ONE_ENGINE"))
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "vllm", FakeVllm("vllm"))
    monkeypatch.setenv("FOR_ONE_ENGINE", "as for all")
    with pytest.raises(Stop, match="its own"):
        measure(replace(_job(tmp_path), environment={"FOR_ONE_ENGINE": "its own"}))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


def run(*arguments: Any, **options: Any) -> Any:
    with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
        return pool.submit(_in_engine, *arguments, **options).result()


@pytest.mark.engine
@cpu_only
def test_a_real_engine(model):
    result, decode = run(_plain, _job(model))

    assert result["fitting"] > result["concurrency"] == 4
    assert result["preemptions"] == 0
    assert result["window_s"] == pytest.approx(1.0, abs=0.7)
    assert result["repeat_tok_s"] > 0
    # A prompt for every 8 tokens, up to what is on its way at the window's two ends.
    tokens = result["output_tok_s"] * result["window_s"]
    assert result["prompts"] == pytest.approx(tokens / 8, abs=5)
    assert result["total_tok_s"] * result["window_s"] == pytest.approx(tokens + 24 * result["prompts"], rel=0.01)

    assert (decode["batch"], decode["context"]) == (3, 40)
    assert decode["decode_tok_s"] == pytest.approx(3e3 / decode["decode_ms"], rel=1e-3, abs=ROUNDED)
    assert (decode["decode_steps"], decode["tokens_per_step"]) == (8, 1)


@pytest.mark.engine
@cpu_only
def test_a_real_engine_with_speculation(model):
    """vLLM's CPU build has no synthetic acceptance: tokens are looked up, and kept where they are right. That is not
    what the job asks for, and the measurement says so."""
    job = replace(_job(model), output_tokens=32, speculation=Speculation(DRAFTED, 1.0))
    looked_up = {"method": "ngram", "num_speculative_tokens": DRAFTED, "prompt_lookup_min": 1, "prompt_lookup_max": 1}

    decode, drafted, accepted = run(_speculated, job, speculative_config=looked_up)

    assert 0 < accepted < drafted
    assert decode["decode_steps"] == 32, "no request has ended before"
    assert 1 < decode["tokens_per_step"] < 1 + DRAFTED
    per_ms = decode["batch"] * decode["tokens_per_step"] / decode["decode_ms"]
    assert decode["decode_tok_s"] == pytest.approx(1e3 * per_ms, rel=1e-3, abs=ROUNDED)
    (problem,) = speculation_problems(job, decode)
    assert problem.endswith(f"but got {decode['tokens_per_step']:.3f}")
    assert speculation_problems(replace(job, speculation=None), decode) == []
