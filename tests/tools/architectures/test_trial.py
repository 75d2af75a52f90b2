"""What becomes of an architecture's engines: their answers compared, their errors told apart. One engine is real."""

import dataclasses
import math
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from kvtuner_tools.architectures.data import FAILS, NOT_BUILT, NOT_RUN, PAIR, REFUSED, SERVED, WRONG, Row
from kvtuner_tools.architectures.engine import NEW_TOKENS, PROMPT_LENGTHS, Answer, Job, Run, prompts
from kvtuner_tools.architectures.trial import Tiny, changed, first_difference, make, mean_kl
from tests.helpers.engine import cpu_only, fork_server

VOCABULARY = 128
TINY = Tiny("llama", more_than_text=False, num_layers=2, attention_layers=(0, 1))


def log_softmax(logits):
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def answers(noise=0.0):
    """Answers whose tokens are the most likely ones."""
    numbers = np.random.default_rng(1)
    found = []
    for prompt in prompts():
        rows = len(prompt) - 1 + NEW_TOKENS
        logits = numbers.normal(size=(rows, VOCABULARY))
        logits[:, 50] += 8
        logits += noise * np.random.default_rng(2).normal(size=logits.shape)
        found.append(Answer((*prompt, *[50] * NEW_TOKENS), log_softmax(logits)))
    return tuple(found)


def scores(jobs):
    return tuple(each.logprobs for _ in range(jobs) for each in answers())


def fake(**engines):
    """Calls as :func:`make` makes them: the configuration, and one engine of each name."""

    def call(function, argument):
        if not isinstance(argument, Job):
            return engines.get("tiny", TINY)
        if argument.profile is None:
            return engines.get("own", Run(answers=answers(), scores=scores(4)))
        name = "pair" if argument.profile == PAIR else "mixed"
        default = Run(answers=answers(1e-3), broken=answers(0.5), packed=("a", "b"))
        found = engines.get(name, default)
        if isinstance(found, Exception):
            raise found
        return found

    return call


def test_a_served_architecture():
    row = make("A", fake())
    assert (row.status, row.words) == (SERVED, "")
    assert 0 < row.kl[PAIR][1] < row.kl["broken"][1] and row.kl["own"] == (0.0, 0.0)
    assert row.differs is None and (row.packed, row.attention_layers) == (2, 2)


@pytest.mark.parametrize(
    ("engines", "status", "words"),
    [
        ({"pair": Run("must be", refused=True)}, REFUSED, "must be"),
        ({"pair": Run("KeyError: x")}, FAILS, "K8V8: KeyError: x"),
        ({"mixed": Run("KeyError: x")}, FAILS, "mixed: KeyError: x"),
        ({"pair": TimeoutError("no answer")}, FAILS, "K8V8: TimeoutError: no answer"),
        ({"pair": Run("KeyError: x"), "own": Run("KeyError: y")}, NOT_RUN, "KeyError: y"),
        ({"pair": Run(answers=answers(1.0), broken=answers(1.0), packed=("a", "b"))}, WRONG, "KL of K8V8"),
        ({"tiny": None}, NOT_BUILT, "neither"),
    ],
)
def test_an_architecture_that_is_not_served(engines, status, words):
    row = make("A", fake(**engines))
    assert row.status == status and words in row.words


@pytest.mark.parametrize(
    ("row", "checked", "engine", "expected"),
    [
        (Row("A", SERVED, attention_layers=2), TINY, Run(), False),
        (Row("A", SERVED, attention_layers=2), TINY, Run("must be", refused=True), True),
        (Row("A", REFUSED, "must be", attention_layers=2), TINY, Run("must be", refused=True), False),
        (Row("A", REFUSED, "must be", attention_layers=2), TINY, Run(), True),
        (Row("A", SERVED, attention_layers=3), TINY, Run(), True),
        (Row("A", SERVED, more_than_text=True, with_pictures="no", attention_layers=2), TINY, Run("no"), False),
        (Row("A", SERVED, more_than_text=True, attention_layers=2), TINY, Run("no"), True),
        (Row("A", NOT_BUILT), None, Run(), False),
    ],
)
def test_changed(row, checked, engine, expected):
    assert changed(row, lambda function, argument: engine if isinstance(argument, Job) else checked) is expected


def test_mean_kl():
    right = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    assert mean_kl(right, found) == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert mean_kl(right, np.full_like(right, np.nan)) == math.inf


def test_first_difference():
    expected = [each.logprobs for each in answers()]
    found = list(answers())
    assert first_difference(expected, found) is None
    text = list(found[1].text)
    text[PROMPT_LENGTHS[1] + 5] = 7
    found[1] = dataclasses.replace(found[1], text=tuple(text))
    row = expected[1][PROMPT_LENGTHS[1] - 1 + 5]
    assert first_difference(expected, found) == (5, pytest.approx(row[50] - row[7], rel=0.01))


@pytest.mark.engine
@cpu_only
def test_engines():
    """A real one, whose broken cache is seen."""

    def call(function, argument):
        with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
            return pool.submit(function, argument).result()

    row = make("LlamaForCausalLM", call)
    assert row.status == SERVED
    assert row.packed == row.attention_layers == 4 and not row.unpacked
