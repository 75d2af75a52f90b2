"""Scores on held-out text: of the profile, and of what a user could serve instead."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from kvtuner_tools.calibration.artifacts import Evaluator, Quality
from kvtuner_tools.calibration.outcome import (
    HELDOUT_FILE,
    PROFILE_ORIGIN,
    UNIFORM,
    Heldout,
    Scored,
    SearchResult,
    Setting,
    format_pairs,
    paired_difference,
)
from kvtuner_tools.calibration.search import LazyEvaluator
from kvtuner_tools.calibration.space import SearchSpace
from kvtuner_tools.calibration.study import SearchPlan
from kvtuner_tools.progress import Progress
from kvtuner_tools.results import write_bytes
from vllm_kvtuner.pages.layout import PrecisionPair

TOKENS_FILE = "heldout.safetensors"
"""The KL of each predicted position, per setting: differences are between the same tokens."""


@dataclass(frozen=True)
class HeldoutRequest:
    """What to score.

    Args:
        inputs: digest of what the engine is built from.
        data: identity of the text.
        settings: first the profile's; none has the pairs of another.
        windows: kind of text and predicted positions of each window.
    """

    inputs: str
    data: Mapping[str, Any]
    settings: Sequence[Setting]
    windows: Sequence[tuple[str, int]] = ()


def wanted_settings(
    result: SearchResult, plan: SearchPlan, additive_error: Callable[[PrecisionPair], float], *, full: bool
) -> list[Setting]:
    """The profile, the best uniform setting within the budget, and the next above it; with ``full`` all there are.

    Args:
        result: the search's.
        plan: its plan.
        additive_error: of a uniform pair: orders those that the search has not scored.
        full: all uniform settings, the greedy choice and the integer program's too.
    """
    space = plan.space
    wanted = {PROFILE_ORIGIN: result.chosen.pairs}
    uniform = {pair: space.uniform(pair) for pair in space.uniform_pairs()}
    scores = {pair: found.quality.kl_mean for pair, pairs in uniform.items() if (found := result.find(pairs))}
    sizes = {pair: space.bytes_of(pairs) for pair, pairs in uniform.items()}
    within = [pair for pair, size in sizes.items() if size <= plan.max_bytes]
    above = [pair for pair, size in sizes.items() if size > plan.max_bytes]

    def add(pairs: Sequence[PrecisionPair]) -> None:
        wanted.update({f"{UNIFORM}{pair}": uniform[pair] for pair in pairs})

    if full:
        add(list(uniform))
        wanted |= {"greedy": result.greedy, "integer program": result.integer_program}
    else:
        known = all(pair in scores for pair in within)
        add(sorted(within, key=scores.__getitem__ if known else additive_error)[:1])
        add(sorted(above, key=lambda pair: (sizes[pair], additive_error(pair)))[:1])
    settings: dict[str, Setting] = {}
    for origin, pairs in wanted.items():
        if pairs:
            nominal, stored = space.bits(pairs)
            settings.setdefault(format_pairs(pairs), Setting(None, origin, pairs, nominal, stored))
    return list(settings.values())


def score_heldout(request: HeldoutRequest, make_evaluator: Callable[[], Evaluator], out: Path) -> Heldout:
    """Score what an earlier run with the same engine has not, and keep each score as it is made.

    Args:
        request: what to score.
        make_evaluator: starts the engine; called where anything is left to score.
        out: the output folder.
    """
    known = _found(out, request.inputs)
    wanted = {format_pairs(each.pairs): each for each in request.settings}
    done = sum(key in known for key in wanted)
    with (
        Progress("held-out", "setting", len(wanted), done) as progress,
        closing(LazyEvaluator(make_evaluator, progress.restart)) as evaluator,
    ):
        for key, setting in wanted.items():
            if key not in known:
                known[key] = evaluator.score_tokens(setting.pairs)
                _keep(request, known, out)
                progress.advance()
    return _keep(request, known, out)


def _keep(request: HeldoutRequest, known: Mapping[str, tuple[Quality, np.ndarray]], out: Path) -> Heldout:
    found = [(each, known[key]) for each in request.settings if (key := format_pairs(each.pairs)) in known]
    scored = [Scored(**vars(setting), quality=quality) for setting, (quality, _) in found]
    ours = found[0][1][1]
    differences = {each.origin: paired_difference(kl, ours) for each, (_, kl) in found[1:]}
    kinds = {each.origin: by_kind(kl, request.windows) for each, (_, kl) in found}
    heldout = Heldout(request.inputs, request.data, tuple(scored), differences, kinds)
    tokens = {format_pairs(each.pairs): np.asarray(kl, dtype=np.float32) for each, (_, kl) in found}
    write_bytes(out / TOKENS_FILE, safetensors.numpy.save(tokens, {"inputs": request.inputs}))
    heldout.write(out)
    return heldout


def by_kind(kl: np.ndarray, windows: Sequence[tuple[str, int]]) -> dict[str, dict[str, float]]:
    """Mean KL of each kind of text, its standard error, which takes tokens as independent, and its tokens.

    Args:
        kl: [tokens] of all windows, one after the other.
        windows: kind of text and predicted positions of each.
    """
    parts = np.split(kl.astype(np.float64), np.cumsum([count for _, count in windows])[:-1]) if windows else []
    found = {}
    for kind in dict.fromkeys(kind for kind, _ in windows):
        rows = np.concatenate([part for part, (of, _) in zip(parts, windows, strict=True) if of == kind])
        found[kind] = {
            "kl_mean": float(rows.mean()),
            "kl_stderr": float(rows.std() / len(rows) ** 0.5),
            "tokens": len(rows),
        }
    return found


def _found(out: Path, inputs: str) -> dict[str, tuple[Quality, np.ndarray]]:
    """Scores of an earlier run with the same engine, complete or not."""
    if not (out / HELDOUT_FILE).exists() or not (out / TOKENS_FILE).exists():
        return {}
    try:
        heldout = Heldout.read(out)
        with safe_open(out / TOKENS_FILE, framework="numpy") as file:
            is_same = heldout.inputs == inputs == (file.metadata() or {}).get("inputs")
            tokens = {name: file.get_tensor(name) for name in file.keys()} if is_same else {}  # noqa: SIM118
    except (ValueError, SafetensorError):  # of an older version
        return {}
    qualities = {format_pairs(each.pairs): each.quality for each in heldout.settings}
    return {key: (qualities[key], kl) for key, kl in tokens.items() if key in qualities}


def additive_errors(space: SearchSpace, errors: Mapping[int, Mapping[str, float]]) -> Callable[[PrecisionPair], float]:
    """The sum of squared output errors of a uniform pair.

    Args:
        space: the settings.
        errors: layer -> pair -> output error.
    """

    def error(pair: PrecisionPair) -> float:
        pairs = space.uniform(pair)
        return sum(errors[layer][each.name] ** 2 for layer, each in pairs.items() if each.is_quantized)

    return error
