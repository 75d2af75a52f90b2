"""What answers are worth: scores, pairs, lengths, and KL along answers with errors by answer."""

from functools import partial

import numpy as np
import pytest

from kvtuner_tools.engines.evaluate import Window
from kvtuner_tools.evaluation.question_sets import followed, paired_settings
from kvtuner_tools.evaluation.questions import QuestionSet, kl_along, paired_answers
from kvtuner_tools.evaluation.statistics import mean_stderr, paired_mean, ratio_stderr
from kvtuner_tools.task_accuracy import Completion


def equals(right: str, text: str) -> float:
    return float(text == right)


SET = QuestionSet(
    name="generate",
    prompts=((1,), (2, 2), (3,), (4,)),
    max_tokens=8,
    grades=(partial(equals, "a"), None, partial(equals, "b"), partial(equals, "c")),
    groups=(("near",), ("near",), ("far",), ("far",)),
    is_followed=True,
)
OURS = [Completion("a", True, 2), Completion("x", False, 8), Completion("?", False, 8), Completion("c", True, 6)]
THEIRS = [Completion("a", True, 2), Completion("y", True, 4), Completion("b", True, 4), Completion("c", True, 2)]


def test_statistics():
    assert mean_stderr([1, 0, 0, 1]) == (0.5, pytest.approx((0.25 / 4) ** 0.5))
    assert paired_mean([1, 0, 1, 1], [0, 0, 1, 1]) == (0.25, pytest.approx(0.25))
    assert paired_mean([1], [0]) == (1, 0)
    assert ratio_stderr([2, 4], [1, 2]) == (2, 0)
    # Two answers of means 1 and 3: residuals of -1 a token.
    assert ratio_stderr([1, 3], [1, 1]) == (2, pytest.approx(1))
    assert ratio_stderr([5], [2]) == (2.5, 0)


def test_tokens_of_one_answer_are_not_independent():
    one_answer_each, ten_each = np.array([1.0, 3.0] * 10), np.repeat([1.0, 3.0] * 10, 10)
    naive = ten_each.std() / len(ten_each) ** 0.5
    by_answer = kl_along(np.split(ten_each, 20))
    assert by_answer["kl_mean"] == one_answer_each.mean() == 2
    assert by_answer["kl_stderr"] > 3 * naive


def test_summary():
    summary = SET.summary(OURS)

    assert (summary["score"], summary["graded"], summary["questions"]) == (pytest.approx(2 / 3), 3, 4)
    assert summary["scores"] == [1, None, 0, 1]
    assert (summary["ended"], summary["ends"]) == (0.5, "1001")
    assert (summary["tokens_mean"], summary["tokens"]) == (6, [2, 8, 8, 6])
    assert {name: (each["score"], each["graded"]) for name, each in summary["groups"].items()} == {
        "near": (1, 1),
        "far": (0.5, 2),
    }


def test_pairs_are_of_the_same_questions():
    found = paired_answers(SET.summary(OURS), SET.summary(THEIRS))

    assert found["difference"] == pytest.approx(-1 / 3)
    assert found["difference_stderr"] == pytest.approx(1 / 3)
    assert found["ended_difference"] == -0.5
    assert found["tokens_ratio"] == 2
    assert found["tokens_ratio_stderr"] > 0


def test_ungraded_questions_have_no_difference():
    ungraded = QuestionSet("generate", ((1,),), 8, (None,))
    summary = ungraded.summary(OURS[:1])
    assert summary["score"] is None
    assert paired_answers(summary, summary)["difference"] is None


def test_kl_accumulates_in_an_answer():
    found = kl_along([np.arange(8, dtype=np.float32), np.full(2, 9, dtype=np.float32)])

    assert found["kl_mean"] == (28 + 18) / 10
    # An answer of two tokens has no quarters.
    assert found["kl_quarters"] == [0.5, 2.5, 4.5, 6.5]
    assert found["kl_answers"] == [3.5, 9]
    assert kl_along([np.ones(2, dtype=np.float32)])["kl_quarters"] == []


def test_kl_goes_to_the_set_that_asked():
    other = QuestionSet("task", ((5, 5),), 8, (None,), is_followed=True)
    silent = QuestionSet("needles", ((6,),), 8, (None,))
    windows = [Window((2, 2, 7, 8), 2), Window((5, 5, 9), 2)]

    found = followed([SET, other, silent], windows, np.array([1, 3, 7], dtype=np.float32))["along"]

    assert {name: (each["kl_mean"], each["kl_tokens"]) for name, each in found.items()} == {
        "generate": (2, 2),
        "task": (7, 1),
    }


def test_every_two_settings_are_paired():
    answers = {label: {"generate": SET.summary(each)} for label, each in (("auto", THEIRS), ("A", OURS), ("B", OURS))}
    rows = [{"label": label, "answers": each} for label, each in answers.items()] + [{"label": "auto (noise floor)"}]

    found = paired_settings(rows)

    assert [(each["setting"], each["other"]) for each in found] == [("A", "auto"), ("B", "auto"), ("B", "A")]
    assert [each["generate"]["tokens_ratio"] for each in found] == [2, 2, 1]
