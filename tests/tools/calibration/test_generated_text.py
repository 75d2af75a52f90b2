"""Text of the model's own: how much is written, that it is kept, and that every text has its share of it."""

import json
from dataclasses import replace

import pytest

from kvtuner_tools.calibration.calibration_text import GENERATED_FILE, TextRequest, draw_texts, read_generated
from kvtuner_tools.calibration.generated_text import generate_text, longest_answer
from kvtuner_tools.calibration.options import ANSWER_TOKENS, QUICK_ANSWER_TOKENS, CalibrationOptions
from kvtuner_tools.engines.generation import MAX_ROUNDS, GenerationJob, collect
from kvtuner_tools.task_accuracy import Completion
from tests.helpers.tiny_model import make_tiny_model, make_tokenizer
from vllm_kvtuner.profile.problems import ProfileError

WRITTEN = 300
"""A token that no text has."""


def job(tokens, num_prompts=3):
    prompts = tuple((number,) * 10 for number in range(num_prompts))
    return GenerationJob(prompts, max_tokens=90, tokens=tokens, temperature=0.7)


def answers_of(length, asked):
    def answer(question):
        asked.append(question)
        return [Completion("x", True, length, (WRITTEN,) * length)] * len(question.prompts)

    return answer


def test_prompts_are_asked_in_turn_until_there_is_enough():
    asked = []
    found = collect(job(tokens=600), answers_of(20, asked))

    # As many as are enough if answers have .6 of 90 tokens, again and again.
    assert [len(each.prompts) for each in asked] == [12, 5, 2, 1]
    assert [number for number, _ in found] == [each % 3 for each in range(20)]
    assert sum(10 + each.num_tokens for _, each in found) == 600
    assert {(each.max_tokens, each.temperature) for each in asked} == {(90, 0.7)}


def test_a_model_that_says_little_is_not_asked_forever():
    asked = []
    found = collect(job(tokens=100_000), answers_of(1, asked))
    assert MAX_ROUNDS * 3 <= len(found) < 100_000 / 11


class Engine:
    """What answers in place of an UnquantizedEngine."""

    def __init__(self):
        self.jobs = []

    def run(self, function, job):
        self.jobs.append(job)
        return collect(job, answers_of(200, []))


@pytest.fixture
def written(tmp_path):
    """A model, an output folder, and an engine."""
    out = tmp_path / "out"
    out.mkdir()
    return str(make_tiny_model(tmp_path / "model")), out, Engine()


@pytest.mark.slow
def test_text_is_written_once_and_again_for_other_options(written):
    model, out, engine = written
    options = CalibrationOptions(model=model, generated_tokens=2000)

    for _ in range(2):
        assert "generated tokens" in generate_text(options, out, engine)
    rows = [json.loads(line) for line in (out / GENERATED_FILE).read_text().splitlines()]
    assert len(engine.jobs) == 1
    longest = max(map(len, engine.jobs[0].prompts))
    assert engine.jobs[0].max_tokens == ANSWER_TOKENS and longest_answer(options) == longest + ANSWER_TOKENS
    assert rows[0]["ids"][-200:] == [WRITTEN] * 200 and rows[0]["question"].startswith("A baker sells 45 rolls")
    assert sum(len(each.ids) for each in read_generated(out).documents) >= 2000

    generate_text(replace(options, seed=1), out, engine)
    (out / GENERATED_FILE).write_text("edited")
    generate_text(replace(options, seed=1), out, engine)
    assert len(engine.jobs) == 3
    generate_text(replace(options, seed=1, quick=True), out, engine)
    assert engine.jobs[3].max_tokens == QUICK_ANSWER_TOKENS
    assert generate_text(replace(options, generated_tokens=0), out, engine) == "no generated text"
    assert read_generated(out) is None and longest_answer(replace(options, generated_tokens=0)) == 0


@pytest.mark.slow
def test_each_text_has_a_window_of_it_and_says_of_what_kind_windows_are(written):
    model, out, engine = written
    generate_text(CalibrationOptions(model=model, generated_tokens=3000), out, engine)
    requests = [TextRequest(3000, 500), TextRequest(1500, 500)]
    drawn = draw_texts(None, make_tokenizer(), requests, seed=0, generated=read_generated(out))

    assert [each.kinds[:3] for each in drawn] == [("generated", "chat", "prose")] * 2
    assert drawn[0].kinds[3:] == ("novel", "reference", "code")
    for text in drawn:
        assert text.source == "bundled and generated"
        assert text.windows[0].count(WRITTEN) > 300
        assert not any(window.count(WRITTEN) for window in text.windows[1:])
    without = draw_texts(None, make_tokenizer(), requests, seed=0)
    assert without[0].sha256 != drawn[0].sha256 and "generated" not in without[0].kinds


def test_rows_without_ids_are_refused(tmp_path):
    (tmp_path / GENERATED_FILE).write_text('{"ids": [1, 2]}\n{"ids": "no"}\n{"text": "x"}\n')
    with pytest.raises(ProfileError) as caught:
        read_generated(tmp_path)
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["2", "3"]
