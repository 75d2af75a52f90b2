"""``kvtuner evaluate``: one run on a tiny model, and runs that are killed and go on."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvtuner_tools import evaluate, heldout
from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.divergence import TokenScores
from kvtuner_tools.engines.evaluate import EngineJob, EngineResult, ReferenceLogits, answer_windows
from kvtuner_tools.evaluation import passes
from kvtuner_tools.evaluation.needles import NeedleRequest
from kvtuner_tools.evaluation.quotes import QuoteRequest
from kvtuner_tools.evaluation.tables import text
from kvtuner_tools.simulation.rows import SimulationRequest
from kvtuner_tools.task_accuracy import Completion
from tests.helpers.tiny_model import make_tiny_model

VOCABULARY = 37
SIMULATED_SHARE = 0.05
"""Of a KL in bf16, by which that of the same rows in simulated attention may differ; in float32 it is 0.01."""


def test_run_without_anything_to_evaluate_is_refused() -> None:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)

    with pytest.raises(ValueError, match="evaluate needs a --profile, a --kv-cache-dtype, --simulate, --noise-floor"):
        evaluate.run(parser.parse_args(["model", "--data", "text.txt"]))


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """A model, held-out text, and a task."""
    data, task = folder / "text.txt", folder / "task.jsonl"
    data.write_text("The quick brown fox jumps over the lazy dog; " * 20)
    task.write_text('{"question": "1+1?", "answer": "Two.\\n#### 2"}\n' * 3)
    return make_tiny_model(folder / "model"), data, task


@pytest.mark.engine
def test_tiny_model_in_vllm(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The whole command: auto against itself in chunks, a profile, a task; perplexity as transformers has it."""
    model, data, task = make_inputs(tmp_path)
    output = tmp_path / "result.json"
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    arguments = [
        "--tokens=600",
        "--sequence-length=300",
        "--kv-cache-memory-bytes=32MiB",
        "--noise-floor",
        "--profile=K4V4:plain",
        "--simulate=kvtuner:K4V4:plain",
    ]
    arguments += [f"--tasks={task}", "--limit=2", "--num-fewshot=1", "--max-tokens=5", "--generate"]
    arguments += ["--needles=1024", "--needle-depths=0,1", "--needle-texts=1", "--quotes=1", "--quote-distance=60"]

    status = evaluate.run(parser.parse_args([str(model), f"--data={data}", f"--out={output}", *arguments]))

    result = json.loads(output.read_text())
    auto, (floor, profile, simulated) = result["reference"], result["settings"]
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
    # The same rows, attended to in another order: the engine's rounding to bf16 differs, as between chunks.
    assert simulated["kl_mean"] == pytest.approx(profile["kl_mean"], rel=SIMULATED_SHARE)
    assert simulated["stored_bits"] == profile["stored_bits"]
    expected = transformers_perplexity(model, data, 600, 300)
    assert floor["perplexity_reference"] == pytest.approx(expected, rel=0.02)
    assert auto["perplexity"] == floor["perplexity_reference"]
    assert auto["kl_mean"] == 0
    assert result["task"]["questions"] == auto["task_questions"] == profile["task_questions"] == 2
    # Random weights know no numbers and do not stop by themselves.
    assert auto["task_finished"] == profile["task_finished"] == auto["task_accuracy"] == 0
    assert auto["task_tokens"] == profile["task_tokens"] == [5, 5]
    assert (profile["task_difference"], profile["task_tokens_ratio"]) == (0, 1)
    assert np.mean(profile["kl_windows"]) == pytest.approx(profile["kl_mean"], rel=1e-3)
    assert "task_accuracy" not in floor
    # Two questions of each set, whole answers of five tokens each; the noise floor runs along them too.
    for row in (floor, profile, simulated):
        assert {name: each["kl_tokens"] for name, each in row["along"].items()} == {"generate": 10, "task": 10}
    assert profile["along"]["generate"]["kl_mean"] > 10 * floor["along"]["generate"]["kl_mean"] >= 0
    assert auto["along"]["generate"]["kl_mean"] == 0
    for name, each in profile["along"].items():
        assert simulated["along"][name]["kl_mean"] == pytest.approx(each["kl_mean"], rel=SIMULATED_SHARE)
    assert {name: each["questions"] for name, each in auto["answers"].items()} == {
        "generate": 2,
        "task": 2,
        "needles": 2,
        "quotes": 1,
    }
    assert auto["answers"]["needles"]["score"] == profile["paired"]["needles"]["difference"] == 0
    assert [(each["setting"], each["other"]) for each in result["paired"]] == [("kvtuner:K4V4:plain", "auto")]
    assert "followed" not in auto
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "result.json", "task.jsonl", "text.txt"]


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"tokens": 0}, "--simulate runs text: give --tokens or --data"),
        ({"chunk": 100}, "--simulate runs a window in one step, but got --chunk 100"),
        ({"settings": (CacheSetting("fp8"),)}, "--prompt-tokens is for simulated caches alone"),
        ({"noise_floor": True}, "--prompt-tokens is for simulated caches alone"),
        ({"words": {"pipeline_parallel_size": ("-pp", "2")}}, "one rank, but got pipeline_parallel_size"),
    ],
)
def test_what_cannot_be_simulated_is_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], problem: str
) -> None:
    model, data, _ = make_inputs(tmp_path)
    monkeypatch.setattr(passes, "in_own_process", Engines(killed_at=0))
    request = evaluate.EvaluationRequest(
        **{"model": str(model), "settings": (), "data": data, "tokens": 600, "context": 300, **values},
        simulation=SimulationRequest(("snapkv:0.2",), prompt_tokens=100),
    )
    with pytest.raises(ValueError, match=problem):
        evaluate.evaluate(request)


class Engines:
    """Stands for in_own_process: counts the engines, and is killed at one of them."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.labels: list[str] = []
        self.jobs: list[EngineJob] = []
        self.killed_at = killed_at

    def __call__(self, function: object, job: Any) -> Any:
        if len(self.labels) == self.killed_at:
            raise KeyboardInterrupt
        assert isinstance(job, EngineJob)
        self.labels.append(job.options.setting.label)
        self.jobs.append(job)
        answer = Completion("2", True, 2, (3, len(self.labels)))
        answers = tuple((answer,) * len(asked.prompts) for asked in job.asked)
        windows = job.windows
        if job.follow is not None:
            windows += answer_windows(job.asked, answers, job.follow)
        positions = sum(window.positions for window in windows)
        one = np.ones(positions, np.float32)
        recorded = isinstance(job.reference, Path)
        return EngineResult(
            reference=ReferenceLogits(job.reference, "float32", 512, positions) if recorded else job.reference,
            scores=TokenScores(kl=one * len(self.labels), nll_reference=one, nll=one, agree=one > 0),
            windows=windows,
            answers=answers,
            kv_tokens=100,
            block_size=16,
            seconds=1.0,
        )


@pytest.fixture
def request_of(tmp_path: Path):
    model, data, task = make_inputs(tmp_path)
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 1\nlayers: K4V2\n")

    def make(**changes: Any) -> evaluate.EvaluationRequest:
        settings = tuple(map(CacheSetting.parse, ("kvtuner:K8V8", f"kvtuner:{profile}", "kvtuner:K2V2")))
        values = {"settings": settings, "data": data, "tokens": 60, "context": 30, "task": task, **changes}
        return evaluate.EvaluationRequest(model=str(model), **values)

    return make


def options_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    return parser.parse_args(words)


def test_json_is_the_result_and_alone_on_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    model, data, task = make_inputs(tmp_path)
    monkeypatch.setattr(passes, "in_own_process", Engines())
    monkeypatch.setattr(passes, "provenance", lambda: {"created": "now", "versions": {}, "device": "a card"})
    capfd.readouterr()
    options = ("--profile=K8V8", "--tokens=60", "--sequence-length=30", f"--tasks={task}", "--num-fewshot=1")
    out = tmp_path / "out.json"
    assert evaluate.run(options_of(str(model), f"--data={data}", *options, "--json", f"--out={out}")) == 0
    result = json.loads(capfd.readouterr().out)
    assert result == json.loads(out.read_text())
    assert (result["schema"], result["context"], result["kv_memory_bytes"]) == (passes.SCHEMA, 30, 1 << 30)
    assert result["task"] | {"file": task.name, "shots": 1, "questions": 2} == result["task"]


def test_without_data_the_bundled_text_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "in_own_process", Engines())
    out = tmp_path / "out.json"
    model = str(make_tiny_model(tmp_path / "model"))
    options = ("--profile=K8V8", "--tokens=300", "--sequence-length=50", f"--out={out}")
    assert evaluate.run(options_of(model, *options)) == 0
    result = json.loads(out.read_text())
    assert result["data"]["file"] == "bundled held-out text"
    assert result["predicted_tokens"] == 300 - 6


@pytest.mark.parametrize(
    ("words", "tokens"),
    [(["--noise-floor"], 4096), (["--quotes"], 0), (["--quotes", "--data=x"], 4096), (["--quotes", "--tokens=5"], 5)],
)
def test_answers_alone_are_not_asked_for_text(monkeypatch: pytest.MonkeyPatch, words: list[str], tokens: int) -> None:
    asked: list[evaluate.EvaluationRequest] = []
    monkeypatch.setattr(evaluate, "evaluate", lambda request, partial: asked.append(request))
    monkeypatch.setattr(evaluate, "text", str)
    evaluate.run(options_of("model", *words))
    assert asked[0].tokens == tokens


def test_a_wrong_dtype_is_refused_before_text_is_read(tmp_path: Path) -> None:
    model = str(make_tiny_model(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"--kv-cache-dtype must be one of auto, .*fp8, .*, but got 'fp9'"):
        evaluate.run(options_of(model, "--kv-cache-dtype=fp9", "--data=missing.txt"))


def test_tasks_are_lm_evals_and_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[evaluate.EvaluationRequest] = []

    def stop(request: evaluate.EvaluationRequest, _: object) -> None:
        asked.append(request)
        raise ValueError("enough")

    monkeypatch.setattr(evaluate, "evaluate", stop)
    tasks = "--tasks=hellaswag,mine.yaml,gsm8k.jsonl"
    with pytest.raises(ValueError, match="enough"):
        evaluate.run(options_of("model", "--data=text.txt", tasks, "--limit=3", "--num-fewshot=5"))
    (request,) = asked
    assert (request.lm_eval, request.task) == (("hellaswag", "mine.yaml"), Path("gsm8k.jsonl"))
    assert (request.task_limit, request.num_fewshot) == (3, 5)
    with pytest.raises(ValueError, match=r"at most one file of questions, but got a.jsonl, b.jsonl"):
        evaluate.run(options_of("model", "--data=text.txt", "--tasks=a.jsonl,b.jsonl"))


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_of) -> None:
    partial = tmp_path / "result.json.partial"
    profile = f"kvtuner:{tmp_path / 'profile.yaml'}"
    monkeypatch.setattr(passes, "in_own_process", Engines(killed_at=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(request_of(), partial)

    again = Engines()
    monkeypatch.setattr(passes, "in_own_process", again)
    result = evaluate.evaluate(request_of(), partial)

    assert again.labels == ["auto", "kvtuner:K2V2"], "auto once more, for its logits, and what was missing"
    assert [row["label"] for row in result["settings"]] == ["kvtuner:K8V8", profile, "kvtuner:K2V2"]
    assert [row["kl_mean"] for row in result["settings"]] == [2, 3, 2]
    assert result["reference"]["task_accuracy"] == 1
    assert not partial.exists()


def test_a_killed_run_goes_on_along_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_of
) -> None:
    """An engine that rounds otherwise would answer otherwise."""
    partial = tmp_path / "result.json.partial"
    killed, again = Engines(killed_at=2), Engines()
    monkeypatch.setattr(passes, "in_own_process", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(request_of(generate=True, task_limit=2), partial)
    followed = killed.jobs[1].windows[2:]
    assert len(followed) == 4 and {window.ids[-2:] for window in followed} == {(3, 1)}

    monkeypatch.setattr(passes, "in_own_process", again)
    result = evaluate.evaluate(request_of(generate=True, task_limit=2), partial)

    assert [job.follow for job in again.jobs] == [None] * 3
    assert {job.windows[2:] for job in again.jobs} == {followed}
    assert [bool(job.asked) for job in again.jobs] == [False, True, True]
    row = result["settings"][0]
    assert row["along"]["generate"] | {"kl_mean": 2, "kl_stderr": 0, "kl_tokens": 4} == row["along"]["generate"]
    assert row["paired"]["generate"]["tokens_ratio"] == 1


@pytest.mark.slow
def test_answers_need_no_text(monkeypatch: pytest.MonkeyPatch, request_of) -> None:
    monkeypatch.setattr(passes, "in_own_process", Engines())
    probes = {"needles": NeedleRequest((1024,), (0.0, 0.5), 1), "quotes": QuoteRequest(2, 300)}
    result = evaluate.evaluate(request_of(data=None, tokens=0, task=None, **probes))

    assert set(result["questions"]) == {"needles", "quotes"}
    assert "kl_mean" not in result["reference"]
    printed = text(result)
    assert "Needles: 2 questions, prompts of 1,024 tokens, 2 facts of one form in each text, one asked" in printed
    assert "Quotes: 2 sentences to repeat from 300 words back" in printed
    assert "KL mean" not in printed
    assert "| 1024 tokens | depth 0 | depth 0.5 |" in printed


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--needles=4k"], "--needles must be numbers of tokens, or max, but got 4k"),
        (["--needles=100"], "--needles must be at least 256 tokens, but got 100"),
        (["--needles=4095"], r"needles: a question .* fewer tokens than the model's 4,096 positions, but got 4,1"),
        (["--needles=512", "--needle-depths=0,2"], "--needle-depths must be from 0 to 1, but got 0.0, 2.0"),
        (["--needles=512", "--needle-texts=0"], "--needle-texts must be at least 1, but got 0"),
        (["--quotes=0"], "--quotes must be at least 1, but got 0"),
        (["--quotes=9999"], "--quotes must be at most"),
        (["--generate", "--temperature=-1"], "--temperature must be at least 0, but got -1"),
        (["--generate", "--answer-tokens=0"], "--answer-tokens must be at least 1, but got 0"),
    ],
)
def test_impossible_measures_are_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], rule: str
) -> None:
    engines = Engines()
    monkeypatch.setattr(passes, "in_own_process", engines)
    with pytest.raises(ValueError, match=rule):
        evaluate.run(options_of(str(make_tiny_model(tmp_path / "model")), *words))
    assert not engines.labels


def test_logits_that_the_disk_does_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch, request_of) -> None:
    """60 tokens of text, and as much of the answers as may be followed, with a vocabulary of 512."""
    engines = Engines()
    monkeypatch.setattr(passes, "in_own_process", engines)
    monkeypatch.setattr(passes.shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 512 * 100))
    with pytest.raises(
        ValueError, match=r"--tokens and --answer-tokens must .* 33,673,216 bytes, .* has 204,800, but got"
    ):
        evaluate.evaluate(request_of(generate=True))
    assert not engines.labels
    assert evaluate.evaluate(request_of(generate=True, answer_tokens=40))["answer_tokens"] == 40


@pytest.mark.slow
def test_the_longest_needles_fit_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = Engines()
    monkeypatch.setattr(passes, "in_own_process", engines)
    words = ["--needles=max", "--needle-depths=0.5", "--needle-texts=1"]
    assert evaluate.run(options_of(str(make_tiny_model(tmp_path / "model")), *words)) == 0
    assert engines.jobs[0].options.max_model_len == 4096


@pytest.mark.quick(1)
@pytest.mark.parametrize("change", ["profile", "data", "request"])
def test_rows_that_rest_on_something_else_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_of, change: str
) -> None:
    partial = tmp_path / "result.json.partial"
    monkeypatch.setattr(passes, "in_own_process", Engines(killed_at=3))
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(request_of(), partial)
    changed = request_of(task_tokens=7) if change == "request" else request_of()
    if change == "profile":
        (tmp_path / "profile.yaml").write_text("version: 1\nlayers: K2V4\n")
    if change == "data":
        (tmp_path / "text.txt").write_text("Another text. " * 20)

    again = Engines()
    monkeypatch.setattr(passes, "in_own_process", again)
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
