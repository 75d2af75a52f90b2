"""Where ``auto`` looks for a model's profiles, and what it finds there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvtuner import envs
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile import hub
from vllm_kvtuner.profile.auto_request import Budget
from vllm_kvtuner.profile.load import load_profile, shipped_profiles
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import Profile
from vllm_kvtuner.profile.statics import load_statics

BUILT = tuple(map(PrecisionPair.parse, ("K8V8", "K8V4", "K4V4", "K4V2")))
"""Pairs that are built without data, the one with the least error first. Keys need bits more than values do."""
OWN, HUB, USER = "the model's folder", "the model's repository", "the user's folder"
SHIPPED, WEIGHTS = "shipped", "built from weights"
NOT_HERE = "which are not on this machine yet"


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

    @property
    def bits(self) -> float:
        return 0.0 if self.stored_bits is None else self.stored_bits

    @property
    def loss(self) -> float:
        """The mean KL; infinite where nobody measured it."""
        return float("inf") if self.kl_mean is None else self.kl_mean


Place = Callable[[ModelFiles, ModelShape, Budget], Iterator[Candidate]]


def of_model(files: ModelFiles, shape: ModelShape, budget: Budget) -> Iterator[Candidate]:
    """Profiles in the model's own folder, or in its revision on the hub."""
    if files.is_folder:
        for path in _profiles(Path(files.model) / hub.FOLDER):
            yield _look(str(path), OWN, (files, shape, budget))
        return
    if not hub.is_model_id(files.model):
        return
    repository = hub.Repository(files.model, files.revision, files.download_dir, files.token)
    asked = str(repository)
    try:
        names = hub.profiles_among(hub.list_files(repository, asked))
    except ProfileError as error:
        yield Candidate(asked, HUB, None, rejected=error.problems[0].removeprefix(f"{asked}: "))
        return
    for name in names:
        try:
            fetched = hub.fetch_file(repository, name, f"{asked}/{name}")
        except ProfileError as error:
            yield Candidate(f"{asked}/{name}", HUB, None, rejected=error.problems[0])
        else:
            yield _look(str(fetched.path), f"{HUB}, commit {fetched.commit[:12]}", (files, shape, budget))


def of_user(files: ModelFiles, shape: ModelShape, budget: Budget) -> Iterator[Candidate]:
    """What was calibrated for these weights on this machine."""
    folder = envs.profile_folder()
    if not any(folder.glob("*/*.yaml")):
        return  # without reading weights, which may lie on a slow disk
    if files.weights is not None:
        for path in _profiles(folder / files.weights):
            yield _look(str(path), USER, (files, shape, budget))
    else:
        yield Candidate(str(folder), USER, None, rejected=f"needs the model's weights, {NOT_HERE}")


def shipped(files: ModelFiles, shape: ModelShape, budget: Budget) -> Iterator[Candidate]:
    """Shipped profiles that fit the model's shape; those for its very weights can be taken."""
    for name in shipped_profiles():
        profile = load_profile(name)
        try:
            bits = profile.resolve(shape).stored_bits
        except ProfileError:
            continue
        if profile.weights is None or files.weights is None:
            needs = f"needs the model's weights, {NOT_HERE}"
            why = "names a shape and no weights" if profile.weights is None else needs
            yield Candidate(name, SHIPPED, bits, heldout_kl(profile), f"{why}; take it by its name")
        else:
            yield _look(name, SHIPPED, (files, shape, budget))


def built(shape: ModelShape, budget: Budget) -> Iterator[Candidate]:
    """Pairs alone, as far as they need no data."""
    for pair in BUILT:
        try:
            resolved = load_profile(pair.name).resolve(shape)
        except ProfileError as error:
            yield Candidate(pair.name, WEIGHTS, None, rejected=error.problems[0].removeprefix(f"{pair.name}: "))
        else:
            yield Candidate(pair.name, WEIGHTS, resolved.stored_bits, None, budget.exceeded_by(resolved))


def _profiles(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml")) if folder.is_dir() else []


def _look(spec: str, source: str, wanted: tuple[ModelFiles, ModelShape, Budget]) -> Candidate:
    """A profile as it is for a model and a budget."""
    files, shape, budget = wanted
    try:
        profile = load_profile(spec)
        resolved = profile.resolve(shape)
        if profile.statics is not None:
            load_statics(profile.statics, resolved)
    except ProfileError as error:
        return Candidate(spec, source, None, rejected=error.problems[0].removeprefix(f"{spec}: "))
    weights = None if profile.weights is None else files.weights  # reading them for nothing would cost time
    reason = profile.weights_problem(weights) or budget.exceeded_by(resolved)
    return Candidate(spec, source, resolved.stored_bits, heldout_kl(profile), reason)


def heldout_kl(profile: Profile) -> float | None:
    """What calibration wrote of its held-out text, if it did."""
    scores: Any = profile.provenance.get("heldout_scores")
    own = scores.get("this profile") if isinstance(scores, dict) else None
    kl = own.get("kl_mean") if isinstance(own, dict) else None
    return float(kl) if isinstance(kl, int | float) and not isinstance(kl, bool) else None
