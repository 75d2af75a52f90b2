"""Text of a model's own: an unquantized engine that answers prompts, drawn and not greedy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvtuner_tools.engines.evaluate import Asked, EngineOptions, MeasuringEngine
from kvtuner_tools.progress import Progress
from kvtuner_tools.task_accuracy import Completion

TOKENS_EXPECTED = 250
"""Of a prompt and its answer: how many prompts are asked at once."""
Answer = Callable[[Asked], Sequence[Completion]]
MAX_ROUNDS = 8
"""Times that all prompts are asked; a model whose answers have few tokens gives less text than was wanted."""


@dataclass(frozen=True)
class GenerationJob:
    """One engine and what it should write.

    Attributes:
        options: how to build it.
        prompts: token ids of each.
        max_tokens: of an answer.
        tokens: of prompts and answers together, at least.
        temperature: of sampling.
    """

    options: EngineOptions
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    tokens: int
    temperature: float


def run_generation(job: GenerationJob) -> list[tuple[int, Completion]]:
    """Answers and the numbers of their prompts, until there are tokens enough. Meant for a process of its own."""
    engine = MeasuringEngine(job.options, Path("unused"))
    try:
        return collect(job, lambda asked: engine.answer(asked, progress=False))
    finally:
        engine.close()


def collect(job: GenerationJob, answer: Answer) -> list[tuple[int, Completion]]:
    """As :func:`run_generation`, by an engine's ``answer``: prompts in turn, and again where all were asked."""
    found: list[tuple[int, Completion]] = []
    total = following = 0
    with Progress(job.options.label, "token", job.tokens) as progress:
        while total < job.tokens and following < MAX_ROUNDS * len(job.prompts):
            count = -(-(job.tokens - total) // TOKENS_EXPECTED)
            numbers = [number % len(job.prompts) for number in range(following, following + count)]
            following += count
            prompts = tuple(job.prompts[number] for number in numbers)
            for number, each in zip(numbers, answer(Asked(prompts, job.max_tokens, job.temperature)), strict=True):
                found.append((number, each))
                total += len(job.prompts[number]) + each.num_tokens
            progress.show(min(total, job.tokens))
    return found
