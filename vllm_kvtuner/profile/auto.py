"""What ``auto`` means as a profile: the best that is known of a model within a budget.

It is looked for in this order, and the first place that has one within the budget gives it:

1. ``kvtuner/*.yaml`` in the model's own folder, or in its revision on the hub;
2. the user's folder of calibrated profiles, by a digest of the model's weights;
3. shipped profiles that were measured with these weights, by the same digest;
4. a pair alone (profile/pair.py), whose treatment is built of configuration and weights when the model is loaded.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_kvtuner.profile.auto_request import AutoRequest, Budget, parse_request
from vllm_kvtuner.profile.load import AUTO, load_profile
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.places import SHIPPED, WEIGHTS, Candidate, Place, built, of_model, of_user, shipped
from vllm_kvtuner.profile.problems import ProfileError

CALIBRATION_BITS = 0.5
"""Stored bits that calibration is worth, about: a pair with more than so many besides is better than a profile."""

FEWEST = "K2V2"
"""The pair of fewest bits, which only calibration's mixes come near to."""


@dataclass(frozen=True)
class Resolution:
    """What ``auto`` means for a model.

    Args:
        asked: the spec.
        budget: in words.
        chosen: the profile that is taken.
        rejected: all others that were looked at, in order.
    """

    asked: str
    budget: str
    chosen: Candidate
    rejected: tuple[Candidate, ...]


def is_auto(spec: str) -> bool:
    """Whether a profile's spec is ``auto``, with or without a budget, right or wrong."""
    return spec.partition(":")[0].lower() == AUTO


def resolve_auto(spec: str, files: ModelFiles, shape: ModelShape, memory: int | None = None) -> Resolution:
    """The best profile of a model within a budget, and every other one with the reason that it was not taken.

    Args:
        spec: ``auto``, with ``:BITS``, ``:fit=CONTEXTxREQUESTS`` and ``,calibrate`` as asked. Nothing is calibrated
            here (engine/calibrate_once.py is where).
        files: the model's.
        shape: its.
        memory: bytes of all layers' keys and values, for a budget by need.

    Raises:
        ProfileError: no such budget, nothing within it, or a model that is not served.
    """
    request = parse_request(spec)
    budget = make_budget(spec, request, shape, memory)
    pairs = list(built(shape, budget))
    found = find_calibrated(files, shape, budget, _best(pairs))
    if request.calibrate and found.chosen is None:
        rule = "a profile of this model must be known, since only an engine that starts calibrates one"
        made = _command(files.model, f"--quick {budget.arguments}")
        raise ProfileError([f"{spec}: {rule}, but got none; {made} makes one now"])
    chosen = found.chosen or _best(pairs)
    if chosen is None:
        raise ProfileError(_nothing(spec, budget, [*found.rejected, *pairs], shape, files.model))
    others = [each for each in pairs if each is not chosen]
    return Resolution(spec, str(budget), chosen, (*found.rejected, *(_with_reason(each, chosen) for each in others)))


def make_budget(spec: str, request: AutoRequest, shape: ModelShape, memory: int | None) -> Budget:
    """What was asked for, with the memory that there is.

    Raises:
        ProfileError: a model that is not served, or a budget by need without memory.
    """
    if shape.unsupported:
        raise ProfileError([f"{spec}: model {shape.name} {reason}" for reason in shape.unsupported])
    if request.need is not None and memory is None:
        rule = "a budget by need must be given with the memory of keys and values (--memory)"
        raise ProfileError([f"{spec}: {rule}, but got none"])
    return Budget(request, memory)


@dataclass(frozen=True)
class Search:
    """What the places before the last one have.

    Args:
        chosen: the best of the first that has one; None where none has.
        rejected: the others, in order.
    """

    chosen: Candidate | None
    rejected: tuple[Candidate, ...]


def find_calibrated(files: ModelFiles, shape: ModelShape, budget: Budget, pair: Candidate | None) -> Search:
    """The best profile that somebody has made for the model.

    Args:
        files: the model's.
        shape: its.
        budget: what must hold it.
        pair: the best pair within the budget, if there is one.
    """
    rejected: list[Candidate] = []
    chosen = None
    places: tuple[Place, ...] = (of_model, of_user, shipped)
    for place in places:
        candidates = list(place(files, shape, budget))
        best = _best(candidates) if chosen is None else None
        # What lies beside the model is what is meant where no bits are asked for.
        is_meant = place is of_model and budget.request == AutoRequest()
        if best is not None and pair is not None and not is_meant and best.bits + CALIBRATION_BITS < pair.bits:
            better = f"where {pair.spec} holds {pair.bits:g} within the budget"
            candidates = [
                each
                if each.rejected
                else dataclasses.replace(each, rejected=f"holds {each.bits:g} stored bits, {better}")
                for each in candidates
            ]
            best = None
        chosen = chosen or best
        rejected += [_with_reason(each, chosen) for each in candidates if each is not best]
    return Search(chosen, tuple(rejected))


def best_pair(shape: ModelShape, budget: Budget) -> Candidate | None:
    """The best pair alone within a budget, if there is one."""
    return _best(built(shape, budget))


def _best(candidates: Iterable[Candidate]) -> Candidate | None:
    """More bits first, and among equals less KL; one that was not measured comes last."""
    fitting = [each for each in candidates if each.rejected is None]
    return max(fitting, key=lambda each: (each.bits, -each.loss), default=None)


def _with_reason(candidate: Candidate, chosen: Candidate | None) -> Candidate:
    if candidate.rejected is not None:
        return candidate
    assert chosen is not None
    return dataclasses.replace(candidate, rejected=f"{chosen.spec} is better")


def _nothing(spec: str, budget: Budget, looked: Iterable[Candidate], shape: ModelShape, model: str) -> list[str]:
    """The refusal where nothing is within the budget: what would be, and what calibration could do."""
    looked = list(looked)
    others = [f"{each.spec}: {each.rejected}" for each in looked if each.source not in (SHIPPED, WEIGHTS)]
    pairs = [each for each in looked if each.source == WEIGHTS and each.stored_bits is not None]
    if not pairs:
        return [f"{spec}: a model must be served with a pair, but got {each.rejected}" for each in looked[-1:]] + others
    least = min(pairs, key=lambda each: each.bits)
    need, command = budget.request.need, _command(model, budget.arguments)
    if need is None:
        rule = f"a budget without a profile of this model must be at least {least.bits:g} stored bits"
        return [f"{spec}: {rule}, but got {budget.request.bits:g}, which needs calibration: {command}", *others]
    resolved, fewest = (load_profile(each).resolve(shape) for each in (least.spec, FEWEST))
    could = f"; fewer bits need calibration: {command}" if budget.exceeded_by(fewest) is None else ""
    got = f"{need.bytes_of(resolved):,} of {least.spec} ({least.bits:g} stored bits)"
    rule = f"{need} must fit in {budget.memory or 0:,} bytes"
    return [f"{spec}: {rule}, but got {got}; of it fit {budget.fits_in(resolved)}{could}", *others]


def _command(model: str, arguments: str) -> str:
    return f"kvtuner calibrate {model} {arguments} --out calibration/"
