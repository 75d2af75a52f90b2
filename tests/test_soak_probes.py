"""The soak's needles and quotes: that rounds ask for them, and when less is found than alone."""

from functools import partial
from types import SimpleNamespace

import pytest

from kvtuner_tools.evaluation.questions import QuestionSet
from tests.helpers.tiny_model import make_tokenizer
from tests.soak import Probes, Request, Settings, make_probes, make_round


def begins(right: str, text: str) -> float:
    return float(text.startswith(right))


TOKENIZER = make_tokenizer()
FOUND, LOST = (tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in ("yes", "no"))
SET = QuestionSet("needles", ((11, 12), (13, 14)), 4, (partial(begins, "yes"), partial(begins, "yes")))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_round_asks_the_next_question(number):
    settings = Settings("model", "K8V8", False, 512, (SET,), TOKENIZER)
    *_, probe, last = make_round(number, settings)

    assert tuple(probe.prompt) == SET.prompts[number % 2]
    assert probe.is_greedy and probe.sampling["max_tokens"] == 4
    assert last.probe is None and last.prompt == make_round(number, Settings("model", "K8V8", False))[-1].prompt
    assert not any(each.probe for each in make_round(number, Settings("model", "K8V8", False)))


def test_what_is_found_less_often_than_alone_is_a_failure():
    request = Request([1], {}, 0, None, probe=("needles", SET.grades[0]))
    probes = Probes(TOKENIZER)
    for place in range(20):
        probes.add(request, LOST if place % 2 else FOUND, FOUND)
        probes.add(Request([1], {}, 0, None), LOST, FOUND)  # no probe

    assert probes.report() == {"needles": {"asked": 20, "among others": 0.5, "alone": 1}}
    (failure,) = probes.failures()
    assert failure.startswith("needles: worth 0.500 ± 0.115 less among other requests than alone")


def test_chance_is_no_failure():
    request = Request([1], {}, 0, None, probe=("needles", SET.grades[0]))
    probes = Probes(TOKENIZER)
    for got, alone in ((FOUND, LOST), (LOST, FOUND), (LOST, FOUND), (LOST, LOST), (FOUND, FOUND)):
        probes.add(request, got, alone)
    assert probes.failures() == []


def test_probes_fit_the_context(monkeypatch):
    made = []
    for name in ("needle_set", "quote_set"):
        monkeypatch.setattr(f"tests.soak.{name}", lambda request, _: made.append(request) or SimpleNamespace())
    make_probes(TOKENIZER, 2048)
    assert (made[0].lengths, made[1].distance) == ((1984,), 700)
