"""Text of a model's own: an unquantized engine that answers prompts, drawn and not greedy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtuner_tools.engines.evaluate import Asked, MeasuringEngine
from kvtuner_tools.progress import Progress
from kvtuner_tools.task_accuracy import Completion

SHARE_EXPECTED = 0.6
"""Of the tokens that an answer may have: how many prompts are asked at once. Too many cost little, as a step takes a
GPU as long for a few as for many; too few cost as many steps again as an answer may have tokens."""
Answer = Callable[[Asked], Sequence[Completion]]
MAX_ROUNDS = 8
"""Times that all prompts are asked; a model whose answers have few tokens gives less text than was wanted."""


@dataclass(frozen=True)
class GenerationJob:
    """What an engine should write.

    Attributes:
        prompts: token ids of each.
        max_tokens: of an answer.
        tokens: of prompts and answers together, at least.
        temperature: of sampling.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    tokens: int
    temperature: float


def generate(engine: MeasuringEngine, job: GenerationJob) -> list[tuple[int, Completion]]:
    """Answers and the numbers of their prompts, until there are tokens enough."""
    return collect(job, lambda asked: engine.answer(asked, progress=False))


def collect(job: GenerationJob, answer: Answer) -> list[tuple[int, Completion]]:
    """As :func:`generate`, by an engine's ``answer``: prompts in turn, and again where all were asked."""
    found: list[tuple[int, Completion]] = []
    total = following = 0
    with Progress("generated text", "token", job.tokens) as progress:
        while total < job.tokens and following < MAX_ROUNDS * len(job.prompts):
            count = math.ceil((job.tokens - total) / (SHARE_EXPECTED * job.max_tokens))
            numbers = [number % len(job.prompts) for number in range(following, following + count)]
            following += count
            prompts = tuple(job.prompts[number] for number in numbers)
            for number, each in zip(numbers, answer(Asked(prompts, job.max_tokens, job.temperature)), strict=True):
                found.append((number, each))
                total += len(job.prompts[number]) + each.num_tokens
            progress.show(min(total, job.tokens))
    return found
