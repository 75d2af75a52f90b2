"""The measuring engine: its start, and the tap of prompt logits in both model runners."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.divergence import TokenScores
from kvtuner_tools.engines import evaluate as evaluate_engine
from kvtuner_tools.engines.capture import run_capture_engine
from kvtuner_tools.engines.evaluate import (
    Asked,
    EngineOptions,
    ReferenceLogits,
    Window,
    answer_windows,
    max_model_len_for,
)
from kvtuner_tools.engines.simulate import SimulatingEngine
from kvtuner_tools.task_accuracy import Completion
from tests.helpers.tiny_model import make_tiny_model

VOCABULARY = 37


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_engine, "gives_logits", lambda: True)
    monkeypatch.setattr(evaluate_engine, "make_room_for_stage_before", lambda runner: None)


def test_max_model_len() -> None:
    assert max_model_len_for(1024, 8192) == 1280
    assert max_model_len_for(255, 8192) == 256
    assert max_model_len_for(1000, 1001) == 1001
    with pytest.raises(ValueError, match="context must be below the model's 1024 positions, but got 1024"):
        max_model_len_for(1024, 1024)


def test_an_engine_starts_beside_others_on_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks for a free share of the GPU, 0.92 of it by default, even where the cache's size is given."""

    class Started(Exception):
        pass

    def start(**keywords: Any) -> None:
        raise Started(keywords)

    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")  # both set them; this puts them back
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start, SamplingParams=None))
    model = str(make_tiny_model(tmp_path / "model"))
    sizes = {"max_model_len": 256, "chunk": 64, "kv_memory_bytes": 99}
    options = EngineOptions("test", model, "bfloat16", CacheSetting("auto"), **sizes)
    job = SimpleNamespace(shape=SimpleNamespace(name=model), context=64, dtype="auto", kv_memory_bytes=99, words={})

    with pytest.raises(Started) as measuring:
        evaluate_engine.MeasuringEngine(options, tmp_path / "logits")
    with pytest.raises(Started) as simulating:
        SimulatingEngine(options, tmp_path / "logits")  # type: ignore[arg-type]
    with pytest.raises(Started) as capturing:
        run_capture_engine(job)  # type: ignore[arg-type]

    for started in (measuring, simulating, capturing):
        assert started.value.args[0]["kv_cache_memory_bytes"] == 99
        assert started.value.args[0]["gpu_memory_utilization"] <= 0.01
    # Texts that begin alike must still run in one step each where attention is simulated or captured.
    caching = [started.value.args[0]["enable_prefix_caching"] for started in (measuring, simulating, capturing)]
    assert caching == [True, False, False]


class V1Runner:
    """The parts of vLLM's V1 model runner that the tap touches; prompt logits leave out the last position."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.model = SimpleNamespace(compute_logits=lambda hidden: self.table[hidden])

    def get_model(self) -> SimpleNamespace:
        return self.model

    def step(self, hidden: torch.Tensor, last: bool) -> None:
        self._get_prompt_logprobs_dict(hidden[:-1] if last else hidden)
        self.model.compute_logits(hidden[-1:])

    def _get_prompt_logprobs_dict(self, hidden: torch.Tensor) -> None:
        if len(hidden):
            self.model.compute_logits(hidden)


class V2Runner(V1Runner):
    """The same of the V2 model runner, which samples first and gives the last position's logits too, in pieces."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(table)
        self.prompt_logprobs_worker = SimpleNamespace(compute_prompt_logprobs=self.compute_in_pieces)

    @staticmethod
    def compute_in_pieces(logits_fn, hidden: torch.Tensor) -> None:
        for start in range(0, len(hidden), 3):
            logits_fn(hidden[start : start + 3])

    def step(self, hidden: torch.Tensor, last: bool) -> None:
        self.model.compute_logits(hidden[-1:])
        self.prompt_logprobs_worker.compute_prompt_logprobs(self.model.compute_logits, hidden)


def run_taps(
    runner: V1Runner, reference: ReferenceLogits | Path, chunks: list[int], loaded: torch.Tensor | None = None
) -> tuple:
    """Run windows of 8 and 5 positions; row r of the runner's table holds the logits of position r of all."""
    worker = SimpleNamespace(model_runner=runner)
    evaluate_engine._install(worker, reference)
    runner.kvtuner_tap.loaded = loaded
    start = 0
    for length, offset in ((8, 0), (5, 7)):
        evaluate_engine._begin(worker, start, Window(tuple(range(length))))
        parts = torch.arange(offset, offset + length).split([*chunks, length - sum(chunks)])
        for index, part in enumerate(parts):
            runner.step(part, last=index == len(parts) - 1)
        evaluate_engine._end(worker)
        start += length - 1
    return evaluate_engine._collect(worker)


@pytest.mark.parametrize("kind", [V1Runner, V2Runner])
@pytest.mark.parametrize("chunks", [[], [4], [1, 3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tap_aligns_positions_however_prefill_is_chunked(tmp_path: Path, kind, chunks, dtype) -> None:
    table = torch.randn(12, VOCABULARY).to(dtype)
    path = tmp_path / "logits"
    _, name, vocab_size = run_taps(kind(table), path, [])
    reference = ReferenceLogits(path, name, vocab_size, 11)

    assert torch.equal(reference.read(0, 11), table[:11])
    assert torch.equal(reference.load(torch.device("cpu")), table[:11])
    assert reference.num_bytes == path.stat().st_size

    other = table.clone()
    other[9] += torch.linspace(0, 3, VOCABULARY).to(dtype)
    kl = TokenScores.join(run_taps(kind(other), reference, chunks)[0]).kl
    assert kl.nonzero()[0].tolist() == [9]
    loaded = run_taps(kind(other), reference, chunks, reference.load(torch.device("cpu")))[0]
    assert np.array_equal(TokenScores.join(loaded).kl, kl)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", [V1Runner, V2Runner])
@pytest.mark.parametrize("chunks", [[], [2], [4], [1, 4]])
def test_positions_of_what_is_given_are_left_out(tmp_path: Path, kind, chunks) -> None:
    """Of 8 tokens the last 4 are predicted, by rows 3 to 6."""
    table = torch.randn(8, VOCABULARY)
    runner = kind(table)
    worker = SimpleNamespace(model_runner=runner)
    path = tmp_path / "logits"
    evaluate_engine._install(worker, path)
    evaluate_engine._begin(worker, 0, Window(tuple(range(8)), 4))
    parts = torch.arange(8).split([*chunks, 8 - sum(chunks)])
    for index, part in enumerate(parts):
        runner.step(part, last=index == len(parts) - 1)
    evaluate_engine._end(worker)

    scores, name, vocab_size = evaluate_engine._collect(worker)
    assert torch.equal(ReferenceLogits(path, name, vocab_size, 4).read(0, 4), table[3:7])
    nll = -table[3:7].log_softmax(-1)[torch.arange(4), torch.arange(4, 8)]
    assert TokenScores.join(scores).nll == pytest.approx(nll.numpy(), rel=1e-5)


def test_first_answers_become_windows() -> None:
    """As many whole answers as there is room for, of each set its share, and one at least."""
    long, short = Completion("", True, 3, (7, 8, 9)), Completion("", True, 2, (5, 6))
    sets = [Asked(((1,), (2, 2), (3,)), 9, is_followed=followed) for followed in (True, False, True)]
    answers = [[long, short, long], [long] * 3, [short, short, long]]

    assert answer_windows(sets, answers, 11) == (
        Window((1, 7, 8, 9), 1),
        Window((2, 2, 5, 6), 2),
        Window((1, 5, 6), 1),
        Window((2, 2, 5, 6), 2),
    )
    assert answer_windows(sets, answers, 1) == (Window((1, 7, 8, 9), 1), Window((1, 5, 6), 1))
    assert len(answer_windows(sets, answers, 99)) == 6


def test_tap_refuses_missing_positions(tmp_path: Path) -> None:
    runner = V1Runner(torch.randn(12, VOCABULARY))
    worker = SimpleNamespace(model_runner=runner)
    evaluate_engine._install(worker, tmp_path / "logits")
    evaluate_engine._begin(worker, 0, Window(tuple(range(8))))
    runner.step(torch.arange(4), last=True)

    with pytest.raises(RuntimeError, match="all 7 predicted positions of a prompt, but gave 3"):
        evaluate_engine._end(worker)
