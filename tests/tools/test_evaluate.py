"""``kvtuner evaluate``: arithmetic, windows, the tap in both model runners, files; and one run on a tiny model."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvtuner_tools import evaluate, heldout
from kvtuner_tools.cache_setting import CacheSetting, cache_bits
from kvtuner_tools.divergence import ROWS, TokenScores, compare
from kvtuner_tools.engines import evaluate as evaluate_engine
from kvtuner_tools.engines.capture import run_capture_engine
from kvtuner_tools.engines.evaluate import EngineJob, EngineOptions, EngineResult, ReferenceLogits, max_model_len_for
from kvtuner_tools.results import format_table, write_json
from kvtuner_tools.task_accuracy import Completion
from tests.helpers.tiny_model import make_tiny_model, make_tokenizer

VOCABULARY = 37


def naive(reference: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> TokenScores:
    """The definitions, in float64 and one position at a time."""
    columns: list[list[float]] = [[], [], [], []]
    for a, b, target in zip(reference.astype(np.float64), logits.astype(np.float64), targets, strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        values = (sum(p * np.log(p / q)), -math.log(p[target]), -math.log(q[target]), p.argmax() == q.argmax())
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return TokenScores(*map(np.array, columns))


@pytest.mark.parametrize("rows", [1, ROWS, 2 * ROWS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compare_equals_the_definitions(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    reference = (4 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)
    logits = (reference.float() + torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)

    scores = compare(reference, logits, targets)

    expected = naive(reference.float().numpy(), logits.float().numpy(), targets.numpy())
    for name in ("kl", "nll_reference", "nll"):
        np.testing.assert_allclose(getattr(scores, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores.agree, expected.agree)


def test_compare_of_equal_logits_is_exactly_zero() -> None:
    logits = torch.randn(ROWS + 3, VOCABULARY)

    scores = compare(logits, logits.clone(), torch.zeros(ROWS + 3, dtype=torch.int64))

    assert not scores.kl.any()
    assert scores.agree.all()


def test_summary() -> None:
    scores = TokenScores(
        kl=np.array([0.0, 0.1, 0.2, 0.5], np.float32),
        nll_reference=np.log(np.array([2.0, 2.0, 8.0, 8.0], np.float32)),
        nll=np.log(np.array([3.0, 3.0, 27.0, 27.0], np.float32)),
        agree=np.array([True, True, True, False]),
    )

    summary = TokenScores.join([scores, scores]).summary()

    assert summary == {
        "kl_mean": pytest.approx(0.2),
        "kl_stderr": pytest.approx(scores.kl.std() / 8**0.5),
        "kl_p99": pytest.approx(0.5),
        "top1_agreement": 0.75,
        "perplexity": pytest.approx(9.0),
        "perplexity_reference": pytest.approx(4.0),
    }


def test_text_windows_are_contiguous_and_begin_with_bos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    text = "".join(chr(97 + index % 26) for index in range(200))
    path = tmp_path / "text.txt"
    path.write_text(text)

    windows = heldout.load_windows(path, tokenizer, tokens=130, context=50)

    assert [len(window) for window in windows] == [50, 50, 50]
    assert {window[0] for window in windows} == {tokenizer.bos_token_id}
    assert tokenizer.decode([token for window in windows for token in window[1:]]) == text[:147]


def test_text_windows_have_no_bos_where_the_tokenizer_adds_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 10)

    windows = heldout.load_windows(path, tokenizer, tokens=20, context=10)

    assert [tokenizer.decode(window) for window in windows] == ["abcdefghab", "cdefghabcd"]


def test_chat_windows_follow_the_chat_template_and_are_cut(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    path = tmp_path / "chats.jsonl"
    path.write_text(
        json.dumps({"question": "1+1?", "answer": "2"})
        + "\n"
        + json.dumps({"question": "x" * 50, "answer": "y"})
        + "\n"
    )

    windows = heldout.load_windows(path, tokenizer, tokens=20, context=30)

    assert tokenizer.decode(windows[0]) == "<|user|>1+1?<|end|><|assistant|>2<|end|>"
    assert tokenizer.decode(windows[1]) == "<|user|>" + "x" * 29


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "abc", r"short\.txt: must hold 100 tokens in windows of 10, but got 0"),
        ("c.jsonl", '{"question": "q"}\n', r"c\.jsonl:1: each line must be an object with question and answer"),
    ],
)
def test_unusable_data_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(ValueError, match=message):
        heldout.load_windows(tmp_path / name, make_tokenizer(), tokens=100, context=10)


def test_settings() -> None:
    assert CacheSetting.parse("fp8") == CacheSetting("fp8")
    assert CacheSetting.parse("kvtuner:a:b.yaml") == CacheSetting("kvtuner", "a:b.yaml")
    assert CacheSetting.parse("kvtuner:K8V4").label == "kvtuner:K8V4"
    for text in ("kvtuner", "kvtuner:", "fp8:K8V4", ""):
        with pytest.raises(ValueError, match="a setting"):
            CacheSetting.parse(text)


def test_evaluation_makes_prefill_read_the_quantized_cache() -> None:
    """Without the override a prompt in one chunk would attend to fresh keys and every profile would look lossless."""
    assert CacheSetting("kvtuner", "K4V4").additional_config(attend_cached_prefill=True) == {
        "kvtuner_profile": "K4V4",
        "kvtuner_attend_cached_prefill": True,
    }
    assert CacheSetting("kvtuner", "K4V4").additional_config() == {"kvtuner_profile": "K4V4"}
    assert CacheSetting("fp8").additional_config(attend_cached_prefill=True) == {}


def test_bits() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_size": 256,
    }
    assert cache_bits(CacheSetting("kvtuner", "K8V4"), config, "m", 16) == (6.0, 6.5)
    assert cache_bits(CacheSetting("auto"), config, "m", 32) == (32.0, 32.0)
    assert cache_bits(CacheSetting("fp8"), config, "m", 16) == (8.0, 8.0)
    assert cache_bits(CacheSetting("int4_per_token_head"), config, "m", 16) is None


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
    job = SimpleNamespace(shape=SimpleNamespace(name=model), context=64, dtype="auto")

    with pytest.raises(Started) as measuring:
        evaluate_engine.MeasuringEngine(options, tmp_path / "logits")
    with pytest.raises(Started) as capturing:
        run_capture_engine(job)  # type: ignore[arg-type]

    assert measuring.value.args[0]["kv_cache_memory_bytes"] == 99
    for started in (measuring, capturing):
        assert started.value.args[0]["gpu_memory_utilization"] <= 0.01


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
        evaluate_engine._begin(worker, start, tuple(range(length)))
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


def test_tap_refuses_missing_positions(tmp_path: Path) -> None:
    runner = V1Runner(torch.randn(12, VOCABULARY))
    worker = SimpleNamespace(model_runner=runner)
    evaluate_engine._install(worker, tmp_path / "logits")
    evaluate_engine._begin(worker, 0, tuple(range(8)))
    runner.step(torch.arange(4), last=True)

    with pytest.raises(RuntimeError, match="all 7 predicted positions of a prompt, but gave 3"):
        evaluate_engine._end(worker)


def test_write_json_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    for broken in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, broken)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})

    assert json.loads(path.read_text()) == {"a": 1}
    assert [item.name for item in path.parent.iterdir()] == ["result.json"]


def test_table() -> None:
    text = format_table(
        {"name": "label:", "KL": "kl:.3f"}, [{"label": "auto", "kl": 0.12345}, {"label": "f", "kl": None}]
    )

    assert text.splitlines() == ["| name |    KL |", "| ---- | ----: |", "| auto | 0.123 |", "| f    |     - |"]


def test_run_without_anything_to_evaluate_is_refused() -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)

    with pytest.raises(ValueError, match="evaluate needs a --profile, a --kv-cache-dtype, --noise-floor, a --task"):
        evaluate.run(parser.parse_args(["model", "--data", "text.txt"]))


@pytest.mark.engine
def test_tiny_model_in_vllm(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The whole command: auto against itself in chunks, a profile, a task; perplexity as transformers has it."""
    model = make_tiny_model(tmp_path / "model")
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog; " * 20)
    task = tmp_path / "task.jsonl"
    task.write_text('{"question": "1+1?", "answer": "Two.\\n#### 2"}\n' * 3)
    output = tmp_path / "result.json"
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    arguments = ["--tokens=600", "--context=300", "--kv-memory=0.03125", "--noise-floor", "--profile=K4V4"]
    arguments += [f"--task={task}", "--task-limit=2", "--task-shots=1", "--task-tokens=5"]

    status = evaluate.run(parser.parse_args([str(model), f"--data={data}", f"--json={output}", *arguments]))

    result = json.loads(output.read_text())
    auto, (floor, profile) = result["reference"], result["settings"]
    assert status == 0
    assert result["predicted_tokens"] == 598
    printed = capsys.readouterr().out
    assert profile["label"] in printed
    assert "accuracy" in printed
    # The CPU kernels give the same bits in one chunk and in two; 1e-4 leaves room for one that does not.
    assert 0 <= floor["kl_mean"] < 1e-4
    assert floor["kv_tokens_ratio"] == 1
    assert profile["kl_mean"] > max(1e-3, 10 * floor["kl_mean"])
    assert profile["stored_bits"] == 4.5
    assert profile["kv_tokens_ratio"] == pytest.approx(16 / 4.5, rel=0.02)
    expected = transformers_perplexity(model, data, 600, 300)
    assert floor["perplexity_reference"] == pytest.approx(expected, rel=0.02)
    assert auto["perplexity"] == floor["perplexity_reference"]
    assert auto["kl_mean"] == 0
    assert result["task"]["questions"] == auto["task_questions"] == profile["task_questions"] == 2
    # Random weights know no numbers and do not stop by themselves.
    assert auto["task_finished"] == profile["task_finished"] == auto["task_accuracy"] == 0
    assert "task_accuracy" not in floor
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "result.json", "task.jsonl", "text.txt"]


class Engines:
    """Stands for in_own_process: counts the engines, and is killed at one of them."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.labels: list[str] = []
        self.killed_at = killed_at

    def __call__(self, function: object, job: Any) -> Any:
        if len(self.labels) == self.killed_at:
            raise KeyboardInterrupt
        assert isinstance(job, EngineJob)
        self.labels.append(job.options.setting.label)
        one = np.ones(3, np.float32)
        recorded = isinstance(job.reference, Path)
        return EngineResult(
            reference=ReferenceLogits(job.reference, "float32", 512, 3) if recorded else job.reference,
            scores=TokenScores(kl=one * len(self.labels), nll_reference=one, nll=one, agree=one > 0),
            task=None if job.task is None else job.task.score([Completion("2", True)] * len(job.task.answers)),
            kv_tokens=100,
            block_size=16,
            seconds=1.0,
        )


@pytest.fixture
def request_of(tmp_path: Path):
    model = make_tiny_model(tmp_path / "model")
    data = tmp_path / "text.txt"
    data.write_text("The quick brown fox jumps over the lazy dog; " * 20)
    task = tmp_path / "task.jsonl"
    task.write_text('{"question": "1+1?", "answer": "Two.\\n#### 2"}\n' * 3)
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 1\nlayers: K4V2\n")

    def make(**changes: Any) -> evaluate.EvaluationRequest:
        settings = tuple(map(CacheSetting.parse, ("kvtuner:K8V8", f"kvtuner:{profile}", "kvtuner:K2V2")))
        values = {"settings": settings, "tokens": 60, "context": 30, "task": task, **changes}
        return evaluate.EvaluationRequest(model=str(model), data=data, **values)

    return make


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_of) -> None:
    partial = tmp_path / "result.json.partial"
    profile = f"kvtuner:{tmp_path / 'profile.yaml'}"
    monkeypatch.setattr(evaluate, "in_own_process", Engines(killed_at=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(request_of(), partial)

    again = Engines()
    monkeypatch.setattr(evaluate, "in_own_process", again)
    result = evaluate.evaluate(request_of(), partial)

    assert again.labels == ["auto", "kvtuner:K2V2"], "auto once more, for its logits, and what was missing"
    assert [row["label"] for row in result["settings"]] == ["kvtuner:K8V8", profile, "kvtuner:K2V2"]
    assert [row["kl_mean"] for row in result["settings"]] == [2, 3, 2]
    assert result["reference"]["task_accuracy"] == 1
    assert not partial.exists()


@pytest.mark.parametrize("change", ["profile", "data", "request"])
def test_rows_that_rest_on_something_else_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_of, change: str
) -> None:
    partial = tmp_path / "result.json.partial"
    monkeypatch.setattr(evaluate, "in_own_process", Engines(killed_at=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(request_of(), partial)
    changed = request_of(task_tokens=7) if change == "request" else request_of()
    if change == "profile":
        (tmp_path / "profile.yaml").write_text("version: 1\nlayers: K2V4\n")
    if change == "data":
        (tmp_path / "text.txt").write_text("Another text. " * 20)

    again = Engines()
    monkeypatch.setattr(evaluate, "in_own_process", again)
    evaluate.evaluate(changed, partial)

    profile = f"kvtuner:{tmp_path / 'profile.yaml'}"
    kept = [] if change != "profile" else ["kvtuner:K8V8"]
    assert again.labels == [label for label in ("auto", "kvtuner:K8V8", profile, "kvtuner:K2V2") if label not in kept]


def transformers_perplexity(model: Path, data: Path, tokens: int, context: int) -> float:
    """Perplexity of the same windows by a transformers forward pass in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    windows = heldout.load_windows(data, AutoTokenizer.from_pretrained(model), tokens=tokens, context=context)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = []
    for window in torch.tensor(windows):
        with torch.no_grad():
            log_p = network(window[None]).logits[0].log_softmax(-1)
        losses.append(-log_p[:-1].gather(1, window[1:, None]))
    return float(torch.cat(losses).double().mean().exp())
