"""Needles and quotes: what is asked, that it follows from the seed alone, and what answers are worth."""

import re

import pytest

from kvtuner_tools.evaluation import needles, quotes
from kvtuner_tools.evaluation.generate import generate_set
from kvtuner_tools.evaluation.haystack import sentences, sentences_from
from kvtuner_tools.evaluation.needles import NeedleRequest, needle_set
from kvtuner_tools.evaluation.quotes import QuoteRequest, quote_set
from kvtuner_tools.task_accuracy import INSTRUCTION
from tests.helpers.tiny_model import make_tokenizer

TOKENIZER = make_tokenizer()
FACT = re.compile(r"The registration number of the ship (\w+ \w+) is (\d{5})\.")
QUESTION = re.compile(r"What is the registration number of the ship (\w+ \w+)\?")
DEPTHS = (0.0, 0.5, 1.0)


def texts_of(prompts):
    return [TOKENIZER.decode(prompt) for prompt in prompts]


@pytest.mark.slow
def test_every_fact_of_a_text_is_asked_once():
    found = needle_set(NeedleRequest((2000, 3000), DEPTHS, texts=2), TOKENIZER)

    # A text is as long as it may be, but for the next sentence; the novel's longest has some 700 characters.
    for prompt, (length, _) in zip(found.prompts, found.groups, strict=True):
        assert 0 <= int(length.split()[0]) - len(prompt) < 800
    for start in range(0, len(found.prompts), len(DEPTHS)):
        texts = texts_of(found.prompts[start : start + len(DEPTHS)])
        assert len({QUESTION.split(text)[0] for text in texts}) == 1, "questions of one text share all before them"
        facts = FACT.findall(texts[0])
        assert len(facts) == len({name for name, _ in facts}) == len({number for _, number in facts}) == len(DEPTHS)
        for depth, text, grade in zip(DEPTHS, texts, found.grades[start:], strict=False):
            (asked,) = QUESTION.findall(text)
            assert text.endswith(f"<|assistant|>The registration number of the ship {asked} is")
            number = dict(facts)[asked]
            assert (grade(f"It is {number}."), grade("12345")) == (1, 0)
            place = text.index(f"{asked} is {number}") / text.index("What is the registration number")
            assert place == pytest.approx(depth, abs=0.25)
    assert found.groups[0] == ("2000 tokens", "depth 0")
    assert found.groups[-1] == ("3000 tokens", "depth 1")


@pytest.mark.slow
def test_needles_follow_from_the_seed():
    make = lambda seed: needle_set(NeedleRequest((1500,), DEPTHS, 1, seed), TOKENIZER).prompts  # noqa: E731
    assert make(3) == make(3) != make(4)


def test_a_text_too_short_for_its_facts_is_refused():
    with pytest.raises(ValueError, match="must leave 12 facts room among as many sentences, but got 1200"):
        needle_set(NeedleRequest((1200,), tuple(place / 11 for place in range(12)), 1), TOKENIZER)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("48213", 1),
        ("The number is 48,213.", 1),
        ("**48213**<|end|>", 1),
        ("48214, no: 48213", 0),
        ("148213", 0),
        ("482", 0),
        ("", 0),
    ],
)
def test_the_first_long_number_counts(answer, found):
    assert needles.grade(48213, answer) == found


SENTENCE = "But on the second night you will probably have a violent storm."


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (SENTENCE, 1),
        (f'The sentence is: "{SENTENCE}"', 1),
        ("you will probably have a violent storm.", 1),
        ("But on the second night you will certainly have a violent storm.", 2 / 7),
        ("But on the second night you will probably have a violent storm", 6 / 7),
        ("But on the second night", 0),
        ("", 0),
    ],
)
def test_quotes_are_worth_the_words_before_the_first_mistake(answer, share):
    assert quotes.grade(SENTENCE, answer) == pytest.approx(share)


def test_quotes_lie_so_many_words_back():
    found = quote_set(QuoteRequest(3, 200, seed=1), TOKENIZER)

    for text, grade in zip(texts_of(found.prompts), found.grades, strict=True):
        (sentence,) = grade.args
        body, _, question = text.partition("\n\nOne sentence of the text above begins")
        assert body.count(sentence) == 1
        after = len(body.split(sentence)[1].split())
        assert 200 <= after < 200 + max(len(each.split()) for each in sentences())
        assert text.endswith(f"<|assistant|>{' '.join(sentence.split()[: quotes.GIVEN])}")
        assert sentence not in question
        assert grade(sentence) == 1
    assert found.max_tokens > max(len(grade.args[0]) for grade in found.grades)
    assert len(set(found.prompts)) == 3


def test_the_novels_end_is_followed_by_its_beginning():
    assert len(sentences()) > 2000
    assert sentences_from(len(sentences()) - 1, 2) == [sentences()[-1], sentences()[0]]


def test_bundled_questions_are_of_both_kinds_from_the_first():
    few, all_of_them = (generate_set(TOKENIZER, limit=limit, max_tokens=9) for limit in (6, None))

    assert 0 < sum(grade is None for grade in few.grades) < 6
    assert len(all_of_them.prompts) == len(set(all_of_them.prompts)) == 52
    assert sum(grade is not None for grade in all_of_them.grades) == 36
    assert few.is_followed
    for text, grade in zip(texts_of(all_of_them.prompts), all_of_them.grades, strict=True):
        assert (INSTRUCTION in text) == (grade is not None)
    assert few.grades[0]("so it is \\boxed{56}") == 1 > few.grades[0]("55")


def test_a_model_without_a_chat_template_is_asked_in_plain_text():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    found = generate_set(tokenizer, limit=1, max_tokens=9)
    assert tokenizer.decode(found.prompts[0]).endswith("\n\nAnswer:")
    assert found.description()["prompts"] == "plain text"
