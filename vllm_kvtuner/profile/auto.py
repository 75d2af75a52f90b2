"""What ``auto`` means as a profile: the best that is known of a model within a budget of stored bits.

It is looked for in this order, and the first place that has one within the budget gives it:

1. ``kvtuner/*.yaml`` in the model's own folder;
2. a pair alone (profile/pair.py), whose treatment is built of configuration and weights when the model is loaded.

Shipped profiles are not taken: they name a model's shape, which other weights have too, and statics are of one set of
weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.load import AUTO, load_profile, shipped_profiles
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError, show
from vllm_kvtuner.profile.profile import Profile
from vllm_kvtuner.profile.statics import load_statics

DEFAULT_BITS = 4.5
"""Stored bits of ``auto`` alone: four-bit codes with their scales, in heads of 64 and more."""
MOST_BITS = 16.0
BUILT = tuple(map(PrecisionPair.parse, ("K8V8", "K8V4", "K4V4", "K4V2")))
"""Pairs that are built without data, the one with the least error first. Keys need bits more than values do."""
FOLDER = "kvtuner"
"""Where a model's folder has its profiles."""
OWN, SHIPPED, WEIGHTS = "the model's folder", "shipped", "built from weights"


@dataclass(frozen=True)
class Candidate:
    """A profile that ``auto`` has looked at.

    Args:
        spec: that :func:`load_profile` takes.
        source: where it comes from.
        stored_bits: on this model; None if it does not fit the model.
        kl_mean: of held-out text, if the profile says so.
        rejected: why it was not taken; None for the one that was.
    """

    spec: str
    source: str
    stored_bits: float | None
    kl_mean: float | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class Resolution:
    """What ``auto`` means for a model.

    Args:
        asked: the spec.
        bits: the budget, in stored bits.
        chosen: the profile that is taken.
        rejected: all others that were looked at, in order.
    """

    asked: str
    bits: float
    chosen: Candidate
    rejected: tuple[Candidate, ...]


def is_auto(spec: str) -> bool:
    """Whether a profile's spec is ``auto``, with or without a budget, right or wrong."""
    return spec.partition(":")[0].lower() == AUTO


def parse_budget(spec: str) -> float:
    """The stored bits of ``auto`` or ``auto:3.5``.

    Raises:
        ProfileError: no such budget.
    """
    text = spec.partition(":")[2]
    if ":" not in spec:
        return DEFAULT_BITS
    if re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,4})?", text) and 0 < float(text) <= MOST_BITS:
        return float(text)
    rule = f"a budget must be at most {MOST_BITS:g} stored bits, such as {AUTO}:3.5"
    advice = "" if not text.startswith("fit") else "; kvtuner calibrate takes --memory, --context and --concurrency"
    raise ProfileError([f"{spec}: {rule}, but got {show(text)}{advice}"])


def resolve_auto(spec: str, model: str, shape: ModelShape) -> Resolution:
    """The best profile of a model within a budget, and every other one with the reason that it was not taken.

    Args:
        spec: ``auto`` or ``auto:BITS``.
        model: its folder or id.
        shape: its.

    Raises:
        ProfileError: no such budget, nothing within it, or a model that is not served.
    """
    bits = parse_budget(spec)
    if shape.unsupported:
        raise ProfileError([f"{spec}: model {shape.name} {reason}" for reason in shape.unsupported])
    rejected: list[Candidate] = []
    for found in (list(_of_folder(model, shape)), list(_built(shape))):
        fitting = [each for each in found if each.rejected is None and (each.stored_bits or 0.0) <= bits]
        best = max(fitting, key=_quality, default=None)
        rejected += [_with_reason(each, bits, best) for each in found if each is not best]
        if best is not None:
            return Resolution(spec, bits, best, (*rejected, *_shipped(shape)))
    least = min(
        (each.stored_bits for each in rejected if each.stored_bits and each.source == WEIGHTS), default=MOST_BITS
    )
    rule = f"a budget without a profile of this model must be at least {least:g} stored bits"
    advice = f"{bits:g}, which needs calibration: kvtuner calibrate {model} --max-bits {bits:g}"
    looked = [f"{each.spec}: {each.rejected}" for each in rejected if each.source == OWN]
    raise ProfileError([f"{spec}: {rule}, but got {advice}", *looked])


def _quality(candidate: Candidate) -> tuple[float, float]:
    """More bits first, and among equals less KL; one that was not measured comes last."""
    return candidate.stored_bits or 0.0, -(float("inf") if candidate.kl_mean is None else candidate.kl_mean)


def _with_reason(candidate: Candidate, bits: float, best: Candidate | None) -> Candidate:
    reason = candidate.rejected
    if reason is None and candidate.stored_bits is not None and candidate.stored_bits > bits:
        reason = f"takes {candidate.stored_bits:g} stored bits of {bits:g}"
    if reason is None:
        assert best is not None
        reason = f"{best.spec} is better"
    return Candidate(candidate.spec, candidate.source, candidate.stored_bits, candidate.kl_mean, reason)


def _of_folder(model: str, shape: ModelShape) -> Iterator[Candidate]:
    """Profiles that lie in the model's own folder."""
    folder = Path(model) / FOLDER
    for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else ():
        spec = str(path)
        try:
            profile = load_profile(spec)
            resolved = profile.resolve(shape)
            if profile.statics is not None:
                load_statics(profile.statics, resolved)
        except ProfileError as error:
            yield Candidate(spec, OWN, None, rejected=error.problems[0].removeprefix(f"{spec}: "))
        else:
            yield Candidate(spec, OWN, resolved.stored_bits, _heldout_kl(profile))


def _heldout_kl(profile: Profile) -> float | None:
    """What calibration wrote of its held-out text, if it did."""
    scores: Any = profile.provenance.get("heldout_scores")
    own = scores.get("this profile") if isinstance(scores, dict) else None
    kl = own.get("kl_mean") if isinstance(own, dict) else None
    return float(kl) if isinstance(kl, int | float) and not isinstance(kl, bool) else None


def _built(shape: ModelShape) -> Iterator[Candidate]:
    """Pairs alone, as far as they need no data."""
    for pair in BUILT:
        try:
            yield Candidate(pair.name, WEIGHTS, load_profile(pair.name).resolve(shape).stored_bits)
        except ProfileError as error:
            yield Candidate(pair.name, WEIGHTS, None, rejected=error.problems[0].removeprefix(f"{pair.name}: "))


def _shipped(shape: ModelShape) -> Iterator[Candidate]:
    """Shipped profiles that fit the model's shape."""
    for name in shipped_profiles():
        try:
            bits = load_profile(name).resolve(shape).stored_bits
        except ProfileError:
            continue
        yield Candidate(name, SHIPPED, bits, rejected="names a shape and no weights; take it by its name")
