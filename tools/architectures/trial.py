"""An architecture's tiny model beside vLLM's own cache: what goes into its row of the table."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kvtuner_tools.architectures.configs import FIRST_SPECIAL_TOKEN, takes_more_than_text, tiny_config
from kvtuner_tools.architectures.data import FAILS, MIXED, NOT_BUILT, NOT_RUN, PAIR, REFUSED, Row, judge
from kvtuner_tools.architectures.engine import ENGINE_ARGUMENTS, FIRST_TOKEN, PROMPT_LENGTHS, Answer, Job, Run, run
from kvtuner_tools.model_files import ModelSource, load_model_shape
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.problems import ProfileError

Argument = TypeVar("Argument")
Result = TypeVar("Result")
InProcess = Callable[[Callable[[Argument], Result], Argument], Result]
"""Calls a function with an argument in a process of its own."""


@dataclass(frozen=True)
class Tiny:
    """A tiny model's configuration.

    Args:
        model_type: of its class.
        more_than_text: whether the architecture takes pictures or sounds.
        problems: that ``kvtuner profile check`` has with K8V8 for it.
        num_layers: of its decoder; 0 where there are problems.
        attention_layers: indices of those that cache keys and values.
    """

    model_type: str
    more_than_text: bool
    problems: tuple[str, ...] = ()
    num_layers: int = 0
    attention_layers: tuple[int, ...] = ()


def prepare(argument: tuple[str, Path]) -> Tiny | None:
    """Write an architecture's configuration into a folder, and check K8V8 against it.

    Returns:
        None for an architecture without a configuration class.
    """
    architecture, folder = argument
    config = tiny_config(architecture)
    if config is None:
        return None
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tiny = Tiny(config.get("model_type", ""), takes_more_than_text(architecture))
    try:
        # As the engines of the table run: on a CPU, Mamba-2 layers are refused beside the prefix cache.
        shape = load_model_shape(str(folder), ModelSource(arguments=ENGINE_ARGUMENTS))
        load_profile(PAIR).resolve(shape)
    except ProfileError as error:
        problems = tuple(problem.replace(str(folder), architecture) for problem in error.problems)
        return replace(tiny, problems=problems)
    return replace(tiny, num_layers=len(shape.layers), attention_layers=shape.attention_layers)


def make(architecture: str, call: InProcess) -> Row:
    """Try an architecture.

    Args:
        architecture: as vLLM registers it.
        call: runs a function in a process of its own; raises TimeoutError or MemoryError beyond its limits.
    """
    row = Row(architecture)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            tiny = call(prepare, (architecture, folder))
        except Exception as error:
            row.words = f"configuration: {type(error).__name__}: {error}".splitlines()[0]
            return row
        if tiny is None:
            row.words = "neither transformers nor vLLM has a configuration class"
            return row
        row.model_type, row.more_than_text, row.check = tiny.model_type, tiny.more_than_text, tiny.problems
        row.attention_layers = len(tiny.attention_layers)

        def engine(**job: Any) -> Run:
            try:
                found = call(run, Job(architecture, name, dtype=row.dtype, **job))
            except Exception as error:
                return Run(f"{type(error).__name__}: {error}")
            return found if found.error is None else Run(found.error.replace(name, architecture), found.refused)

        if row.more_than_text:
            row.with_pictures = engine(profile=PAIR, only_config=True).error
        _compare(row, engine, _mixed(folder, tiny))
    return row


def changed(row: Row, call: InProcess) -> bool:
    """Whether the checks, which build no model, say something else of an architecture than its row has."""
    if row.status == NOT_BUILT:
        return False
    with tempfile.TemporaryDirectory() as name:
        tiny = call(prepare, (row.architecture, Path(name)))
        if tiny is None or (tiny.problems, len(tiny.attention_layers)) != (row.check, row.attention_layers):
            return True
        found = call(run, Job(row.architecture, name, PAIR, row.dtype, only_config=True)).error
        return (found and found.replace(name, row.architecture)) != refusal(row)


def refusal(row: Row) -> str | None:
    """What the engine's configuration was refused with, pictures allowed; None where it was not."""
    if row.more_than_text:
        return row.with_pictures
    return row.words if row.status == REFUSED else None


def _mixed(folder: Path, tiny: Tiny) -> Path:
    """A profile whose attention layers have unlike pairs; layers without a cache need an entry too."""
    pairs = dict.fromkeys(range(tiny.num_layers), "K16V16")
    pairs |= {layer: MIXED[place % len(MIXED)] for place, layer in enumerate(tiny.attention_layers)}
    path = folder / "mixed.yaml"
    path.write_text(json.dumps({"version": 1, "layers": pairs}))
    return path


def _compare(row: Row, engine: Callable[..., Run], mixed: Path) -> None:
    """Run the engines, and judge."""
    pair = engine(profile=PAIR, also_broken=True)
    if pair.error and "BF16" in pair.error:  # vLLM's CPU kernel of gated delta nets takes nothing else
        row.dtype = "bfloat16"
        pair = engine(profile=PAIR, also_broken=True)
    if pair.refused:
        row.status, row.words = REFUSED, pair.error or ""
        return
    unlike = Run() if pair.error else engine(profile=str(mixed))
    answers = {PAIR: pair.answers, "mixed": unlike.answers, "broken": pair.broken}
    # Without texts of ours to score, it still has to be seen whether vLLM runs the model.
    own = engine(scored=tuple(each.text for found in answers.values() for each in found))
    if own.error:
        row.status, row.words = NOT_RUN, own.error.partition(". ")[0]
        return
    for name, each in ((PAIR, pair), ("mixed", unlike)):
        if each.error:
            row.status, row.words = FAILS, f"{name}: {each.error}"
            return
    row.packed, row.unpacked = len(pair.packed), pair.unpacked
    scores = iter(own.scores)
    answers["own"] = own.answers
    for name, found in answers.items():
        expected = [next(scores) for _ in found]
        if found:
            row.kl[name] = _divergence(expected, found)
        if name == PAIR:
            row.differs = first_difference(expected, found)
    row.status, row.words = judge(row)


def _divergence(expected: Sequence[np.ndarray], found: Sequence[Answer]) -> tuple[float, float]:
    """Largest mean KL of a text, of its prompt and of its continuation."""
    prefill, decode = [], []
    for right, answer, length in zip(expected, found, PROMPT_LENGTHS, strict=True):
        prefill.append(mean_kl(right[: length - 1], answer.logprobs[: length - 1]))
        decode.append(mean_kl(right[length - 1 :], answer.logprobs[length - 1 :]))
    return _rounded(max(prefill)), _rounded(max(decode))


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


def mean_kl(right: np.ndarray, found: np.ndarray) -> float:
    """KL(right || found) in nats, mean over rows of log-probabilities; infinite where ``found`` is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    p = right.astype(np.float64)
    return float((np.exp(p) * (p - found)).sum(axis=1).mean())


def first_difference(expected: Sequence[np.ndarray], found: Sequence[Answer]) -> tuple[int, float] | None:
    """Index of the first generated token that is not the most likely one, over all texts, and its margin in nats."""
    first: tuple[int, float] | None = None
    for right, answer, length in zip(expected, found, PROMPT_LENGTHS, strict=True):
        allowed = right[:, FIRST_TOKEN:FIRST_SPECIAL_TOKEN]
        for index, token in enumerate(answer.text[length:]):
            margin = float(allowed[length - 1 + index].max() - right[length - 1 + index, token])
            if margin > 0 and (first is None or index < first[0]):
                first = index, _rounded(margin)
                break
    return first
