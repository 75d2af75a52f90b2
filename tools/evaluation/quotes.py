"""Verbatim quotes: a sentence that lies some hundred words back is to be repeated word for word.

What is asked lies beyond a recent window, and no knowledge of the language gives more than a part of it, so the share
of words that come back right falls before fluency does.
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvtuner_tools.data_files import file_sha256
from kvtuner_tools.evaluation.haystack import NOVEL, sentences, sentences_from
from kvtuner_tools.evaluation.prompts import prompt_form, prompt_ids
from kvtuner_tools.evaluation.questions import QuestionSet

DEFAULT_QUOTES = 32
DEFAULT_DISTANCE = 700
"""Words between the sentence and the question."""
GIVEN = 5
"""Words of a sentence that the question names it by."""
WORDS = (12, 30)
"""Of a sentence that is asked, at least and at most."""
BEFORE = 8
"""Sentences of the text before it."""
_QUESTION = (
    'One sentence of the text above begins with the words "{beginning}". Repeat this sentence word for word, from its '
    "first word to its last, and write nothing else."
)
_MARKS = "\"'\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"


@dataclass(frozen=True)
class QuoteRequest:
    """Which quotes.

    Args:
        count: sentences to ask for.
        distance: words between each and its question, about.
        seed: of the drawing.
    """

    count: int = DEFAULT_QUOTES
    distance: int = DEFAULT_DISTANCE
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("--quotes", self.count), ("--quote-distance", self.distance)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value}")


def quote_set(request: QuoteRequest, tokenizer: Any) -> QuestionSet:
    """Sentences of the bundled novel, each once.

    Raises:
        ValueError: more than the novel has.
    """
    places = _places()
    if request.count > len(places):
        raise ValueError(f"--quotes must be at most {len(places)}, but got {request.count}")
    asked = random.Random(f"quotes {request.seed}").sample(places, request.count)
    targets = [sentences()[place] for place in asked]
    longest = max(len(tokenizer(target, add_special_tokens=False)["input_ids"]) for target in targets)
    return QuestionSet(
        name="quotes",
        prompts=tuple(_prompt(tokenizer, place, request.distance) for place in asked),
        max_tokens=longest + longest // 2 + 16,
        grades=tuple(partial(grade, target) for target in targets),
        about={
            "distance": request.distance,
            "seed": request.seed,
            "sha256": file_sha256(NOVEL),
            "prompts": prompt_form(tokenizer),
        },
    )


def grade(sentence: str, answer: str) -> float:
    """Share of the sentence's words, but those that the question gave, that the answer has before its first mistake.

    The answer goes on where the question's words end, or says them again.
    """
    right, got = sentence.split(), [word.strip(_MARKS) for word in answer.split()]
    given, rest = right[:GIVEN], right[GIVEN:]
    starts = [place + GIVEN for place in range(len(got)) if got[place : place + GIVEN] == given] or [0]
    return max(_agreeing(rest, got[start:]) for start in starts) / len(rest)


def _agreeing(right: list[str], got: list[str]) -> int:
    """Words before the first that differs."""
    pairs = list(zip(right, got, strict=False))
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))


def _places() -> list[int]:
    """Sentences that may be asked for: of a fit length, without quotation marks, and known by their beginning."""
    found, beginnings = [], [tuple(each.split()[:GIVEN]) for each in sentences()]
    known = {beginning for beginning, times in Counter(beginnings).items() if times == 1}
    for place, sentence in enumerate(sentences()):
        length = len(sentence.split())
        is_plain = not any(mark in sentence for mark in _MARKS) and "--" not in sentence
        if WORDS[0] <= length <= WORDS[1] and is_plain and beginnings[place] in known:
            found.append(place)
    return found


def _prompt(tokenizer: Any, place: int, distance: int) -> tuple[int, ...]:
    """The text around a sentence, the question, and the answer's first words: a model need only go on."""
    after = 0
    while sum(len(each.split()) for each in sentences_from(place + 1, after)) < distance:
        after += 1
    text = " ".join(sentences_from(place - BEFORE, BEFORE + 1 + after))
    beginning = " ".join(sentences()[place].split()[:GIVEN])
    return prompt_ids(tokenizer, f"{text}\n\n{_QUESTION.format(beginning=beginning)}", begin=beginning)
