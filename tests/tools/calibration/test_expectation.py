"""What a report says of a profile: measured answers of this very profile, and "not measured" of all else."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kvtuner_tools.bench import step_times
from kvtuner_tools.cache_setting import CacheSetting, profile_sha256
from kvtuner_tools.calibration.expectation import EVALUATION_FILE, expectation
from kvtuner_tools.calibration.heldout_scores import by_kind
from kvtuner_tools.evaluation.questions import paired_answers
from kvtuner_tools.evaluation.request import SCHEMA

QUALITY = SimpleNamespace(kl_mean=0.01, kl_stderr=0.001, top1_agreement=0.98, perplexity=9.1, perplexity_reference=9.0)
KINDS = {"generated": {"kl_mean": 0.02, "kl_stderr": 0.003, "tokens": 2047}}
LLAMA_LAYERS = dict.fromkeys(range(32), (8, 128))


def answers(scores, tokens):
    return {"scores": scores, "tokens": tokens, "ends": "1" * len(scores), "graded": len(scores)} | {
        "score": sum(scores) / len(scores),
        "ended": 1.0,
    }


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "profile.yaml").write_text("version: 1\nlayers: K4V4\n")
    serve = SimpleNamespace(origin="this profile", quality=QUALITY, stored_bits=3.4)
    return SimpleNamespace(
        out=tmp_path,
        options=SimpleNamespace(model="a/model"),
        verdict=SimpleNamespace(serve=serve, file="profile.yaml"),
        heldout=SimpleNamespace(kinds={"this profile": KINDS}),
        shapes=LLAMA_LAYERS,
        device="NVIDIA H200",
    )


def write_evaluation(out, profile):
    ours = {"task": answers([1, 0, 0, 1], [30] * 4), "needles": answers([1, 1], [5, 5])}
    theirs = {"task": answers([1, 1, 0, 1], [20] * 4), "needles": answers([1, 1], [5, 5])}
    row = {"profile_sha256": profile_sha256(CacheSetting("kvtuner", str(profile))), "answers": ours}
    row["paired"] = {name: paired_answers(ours[name], theirs[name]) for name in ours}
    questions = {"task": {"file": "gsm8k.jsonl"}, "needles": {"lengths": [4096, 16384]}}
    result = {"schema": SCHEMA, "questions": questions, "reference": {"answers": theirs}, "settings": [row]}
    (out / EVALUATION_FILE).write_text(json.dumps(result))


def test_what_nobody_measured_is_called_so_with_the_command(inputs):
    rows = dict(expectation(inputs))

    assert list(rows) == ["expect", "by text", "accuracy", "needles", "quotes", "step time", "to measure"]
    assert rows["by text"] == "generated 0.02000 ± 0.00300 on 2,047 tokens"
    assert rows["accuracy"] == rows["needles"] == rows["quotes"] == "not measured"
    command = f"kvtuner evaluate a/model --profile {inputs.out}/profile.yaml --generate --needles 4096 --quotes --out "
    assert rows["to measure"] == f"{command}{inputs.out}/evaluation.json && kvtuner report {inputs.out}"


def test_measured_answers_are_told_beside_the_unquantized_ones(inputs):
    write_evaluation(inputs.out, inputs.out / "profile.yaml")
    rows = dict(expectation(inputs))

    assert rows["accuracy"].startswith(
        "0.500 on 4 questions, unquantized 0.750; the difference on the same questions is -0.250 ± 0.250 (gsm8k.jsonl)"
    )
    assert "1.50 ± 0.00 times the unquantized ones' tokens, and 100.0% end" in rows["accuracy"]
    assert rows["needles"].startswith("1.000 on 2 questions") and "4,096, 16,384 tokens" in rows["needles"]
    assert rows["quotes"] == "not measured" and "to measure" in rows


def test_answers_of_another_profile_do_not_count(inputs):
    write_evaluation(inputs.out, inputs.out / "profile.yaml")
    (inputs.out / "profile.yaml").write_text("version: 1\nlayers: K2V2\n")
    assert dict(expectation(inputs))["accuracy"].startswith("not measured: evaluation.json is of other profiles")
    (inputs.out / EVALUATION_FILE).write_text('{"schema": "kvtuner-evaluation/1"}')
    assert "not measured: " in dict(expectation(inputs))["accuracy"]


def test_step_times_are_of_this_card_and_these_layers(inputs):
    text = dict(expectation(inputs))["step time"]
    assert "64 requests of 8,192 tokens 8.34 ms (unquantized 20.62)" in text
    assert "llama31_8b's layers at 3.5 stored bits, NVIDIA H200, vLLM 0.33.0" in text
    inputs.verdict.serve.stored_bits = 4.5
    assert dict(expectation(inputs))["step time"].startswith("not measured")
    inputs.verdict.serve.stored_bits = 3.5
    for change in ({"device": "NVIDIA L4"}, {"shapes": LLAMA_LAYERS | {32: (8, 128)}}):
        changed = SimpleNamespace(**{**vars(inputs), **change})
        assert dict(expectation(changed))["step time"].startswith("not measured for such layers")


def test_step_times_are_read_as_they_are_written(tmp_path):
    known = step_times.read_step_times()
    path = tmp_path / "times.json"
    path.write_text(step_times.render(known))
    assert step_times.read_step_times(path) == known
    assert step_times.render((replace(known[0], model="other"),)) != step_times.render(known)


def test_kl_by_kind_of_text():
    kl = np.array([1, 1, 5, 3, 3], dtype=np.float32)
    found = by_kind(kl, [("chat", 2), ("prose", 1), ("chat", 2)])

    assert found["chat"] == {"kl_mean": 2, "kl_stderr": 0.5, "tokens": 4}
    assert (found["prose"]["kl_mean"], found["prose"]["tokens"]) == (5, 1)
    assert by_kind(kl, []) == {}
