"""Needles in a haystack: several facts of one form in a long text, of which one is asked.

The task is that of RULER's "multi-key" needles (Hsieh et al., RULER: What's the Real Context Size of Your Long-Context
Language Models?, 2024), where the facts that are not asked are what the model may take for the right one. Facts and
text follow from the seed alone.
"""

import random
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvtuner_tools.data_files import file_sha256
from kvtuner_tools.evaluation.haystack import NOVEL, sentences, sentences_from
from kvtuner_tools.evaluation.prompts import prompt_form, prompt_ids
from kvtuner_tools.evaluation.questions import QuestionSet

MAX_TOKENS = 48
"""Of an answer: a sentence around the number."""
DEFAULT_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEFAULT_TEXTS = 8
MIN_LENGTH = 256
LONGEST = "max"
"""Names the length that the model's positions leave."""
_FIRST = (
    "Amber", "Bold", "Calm", "Crimson", "Distant", "Eager", "Emerald", "Faithful", "Gentle", "Golden", "Hidden",
    "Ivory", "Jolly", "Lonely", "Merry", "Noble", "Pale", "Proud", "Quiet", "Restless", "Silver", "Swift",
)  # fmt: skip
_SECOND = (
    "Badger", "Comet", "Dolphin", "Falcon", "Finch", "Gannet", "Heron", "Kestrel", "Lantern", "Marlin", "Osprey",
    "Otter", "Pelican", "Petrel", "Plover", "Raven", "Salmon", "Seahorse", "Sparrow", "Swallow", "Tern", "Walrus",
)  # fmt: skip
_BEGINNING = "The registration number of the ship {name} is"
"""Of a fact, and of the answer: as RULER does, so that a model need not guess what form is wanted."""
_FACT = f"{_BEGINNING} {{number}}."
_QUESTION = "What is the registration number of the ship {name}?"
_OPENING = "Read this text. It will be asked about afterwards.\n\n"
_NUMBER = re.compile(r"\d[\d,]{3,}\d")


@dataclass(frozen=True)
class NeedleRequest:
    """Which needles.

    Args:
        lengths: tokens of a prompt at most, each at least ``MIN_LENGTH``.
        depths: where facts stand, from 0, the text's beginning, to 1, its end; each text has one at every depth.
        texts: of each length.
        seed: of everything that is drawn.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = DEFAULT_DEPTHS
    texts: int = DEFAULT_TEXTS
    seed: int = 0

    def __post_init__(self) -> None:
        for length in self.lengths:
            if length < MIN_LENGTH:
                raise ValueError(f"--needles must be at least {MIN_LENGTH} tokens, but got {length}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"--needle-depths must be from 0 to 1, but got {', '.join(map(str, self.depths))}")
        if self.texts < 1:
            raise ValueError(f"--needle-texts must be at least 1, but got {self.texts}")
        if len(self.depths) > len(_FIRST) * len(_SECOND):
            raise ValueError(f"--needle-depths must be few, but got {len(self.depths)}")


def needle_set(request: NeedleRequest, tokenizer: Any) -> QuestionSet:
    """Every fact of every text, asked by itself; questions of one text share all before them.

    Raises:
        ValueError: a length that does not hold the facts.
    """
    haystack = _Haystack(tokenizer)
    prompts, grades, groups = [], [], []
    for length in request.lengths:
        for text in range(request.texts):
            rng = random.Random(f"needles {request.seed} {length} {text}")
            facts = _facts(rng, len(request.depths))
            body = haystack.text(rng, length, list(zip(request.depths, facts, strict=True)))
            for depth, (name, number) in zip(request.depths, facts, strict=True):
                prompts.append(_prompt(tokenizer, body, name))
                grades.append(partial(grade, number))
                groups.append((f"{length} tokens", f"depth {depth:g}"))
    return QuestionSet(
        name="needles",
        prompts=tuple(prompts),
        max_tokens=MAX_TOKENS,
        grades=tuple(grades),
        groups=tuple(groups),
        about={
            "lengths": list(request.lengths),
            "depths": list(request.depths),
            "texts": request.texts,
            "seed": request.seed,
            "sha256": file_sha256(NOVEL),
            "prompts": prompt_form(tokenizer),
        },
    )


def grade(number: int, answer: str) -> float:
    """1 where the first long number of the answer is the one that was asked."""
    found = _NUMBER.search(answer)
    return float(found is not None and found[0].replace(",", "") == str(number))


def _facts(rng: random.Random, count: int) -> list[tuple[str, int]]:
    """Names of ships and their numbers, none twice."""
    names = rng.sample([f"{first} {second}" for first in _FIRST for second in _SECOND], count)
    return list(zip(names, rng.sample(range(10_000, 100_000), count), strict=True))


def _prompt(tokenizer: Any, body: str, name: str) -> tuple[int, ...]:
    """The text, the question, and the beginning of the answer."""
    content = f"{_OPENING}{body}\n\n{_QUESTION.format(name=name)}"
    return prompt_ids(tokenizer, content, begin=_BEGINNING.format(name=name))


class _Haystack:
    """Texts of a given number of tokens.

    Args:
        tokenizer: that counts them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        rows = tokenizer([f" {each}" for each in sentences()], add_special_tokens=False, verbose=False)["input_ids"]
        self._counts = [len(ids) for ids in rows]

    def text(self, rng: random.Random, length: int, facts: list[tuple[float, tuple[str, int]]]) -> str:
        """As many sentences as a prompt of ``length`` tokens holds, and the facts at their depths among them."""
        start = rng.randrange(len(self._counts))
        longest_name = max((name for _, (name, _) in facts), key=len)
        room = length - self._tokens("", facts, longest_name)
        count = 0
        while (next_count := self._counts[(start + count) % len(self._counts)]) <= room:
            room -= next_count
            count += 1
        # Tokens of joined sentences may be more than theirs together.
        while (
            count and self._tokens(body := _with_facts(sentences_from(start, count), facts), [], longest_name) > length
        ):
            count -= 1
        if count < len(facts):
            raise ValueError(f"--needles must leave {len(facts)} facts room among as many sentences, but got {length}")
        return body

    def _tokens(self, body: str, facts: list[tuple[float, tuple[str, int]]], name: str) -> int:
        body = " ".join([body, *(_FACT.format(name=each, number=number) for _, (each, number) in facts)])
        return len(_prompt(self._tokenizer, body, name))


def _with_facts(text: list[str], facts: list[tuple[float, tuple[str, int]]]) -> str:
    """The sentences with each fact at its depth."""
    parts = list(text)
    for depth, (name, number) in sorted(facts, reverse=True):
        parts.insert(round(depth * len(text)), _FACT.format(name=name, number=number))
    return " ".join(parts)
