"""What search and held-out evaluation found, as files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import hypot
from pathlib import Path
from typing import Any

from kvtuner_tools.calibration.artifacts import Quality, read_artifact
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.problems import format_layers

SEARCH_SCHEMA = "kvtuner-search/1"
SEARCH_FILE = "search.json"
HELDOUT_SCHEMA = "kvtuner-heldout/1"
HELDOUT_FILE = "heldout.json"
PROFILE_ORIGIN = "this profile"
"""Origin of the chosen setting among the held-out scores."""


@dataclass(frozen=True)
class Scored:
    """A setting with its scores.

    Args:
        number: trial, or None for a setting that is none.
        origin: where it came from, such as ``uniform K4V4``, ``greedy`` or ``nsga2``.
        pairs: the pair of every layer.
        nominal_bits: mean over the layers.
        stored_bits: the same with scales and minima.
        quality: teacher-forced scores.
    """

    number: int | None
    origin: str
    pairs: Mapping[int, PrecisionPair]
    nominal_bits: float
    stored_bits: float
    quality: Quality

    def to_plain(self) -> dict[str, Any]:
        """As JSON's types; :meth:`from_plain` reads it back."""
        pairs = {str(layer): pair.name for layer, pair in self.pairs.items()}
        return {**vars(self), "pairs": pairs, "quality": asdict(self.quality)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Scored":
        pairs = {int(layer): PrecisionPair.parse(pair) for layer, pair in plain["pairs"].items()}
        return cls(**{**plain, "pairs": pairs, "quality": Quality(**plain["quality"])})


@dataclass(frozen=True)
class SearchResult:
    """What the search found.

    Args:
        study: name of the Optuna study.
        sampler: Optuna's sampler.
        seed: its seed.
        budget: in words.
        max_bits: the budget in mean stored bits.
        data: the text that settings were scored on: source, sha256, tokens.
        greedy: pairs of the greedy choice.
        integer_program: pairs of the choice that is exact for additive errors.
        chosen: the setting of the profile.
        scored: all settings with their scores, in the order of trials.
        trials: how many were ``scored``, ``duplicates`` of others, or ``over_budget``.
        evaluation_seconds: median time of a trial that was scored.
    """

    study: str
    sampler: str
    seed: int
    budget: str
    max_bits: float
    data: Mapping[str, Any]
    greedy: Mapping[int, PrecisionPair]
    integer_program: Mapping[int, PrecisionPair]
    chosen: Scored
    scored: tuple[Scored, ...]
    trials: Mapping[str, int]
    evaluation_seconds: float

    def find(self, pairs: Mapping[int, PrecisionPair]) -> Scored | None:
        """The scored setting with these pairs."""
        return next((each for each in self.scored if each.pairs == pairs), None)

    def write(self, out: Path) -> None:
        plain = {
            **vars(self),
            "greedy": {str(layer): pair.name for layer, pair in self.greedy.items()},
            "integer_program": {str(layer): pair.name for layer, pair in self.integer_program.items()},
            "chosen": self.chosen.to_plain(),
            "scored": [each.to_plain() for each in self.scored],
        }
        write_json(out / SEARCH_FILE, {"schema": SEARCH_SCHEMA, **plain})

    @classmethod
    def read(cls, out: Path) -> "SearchResult":
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: not readable or of another schema.
        """
        plain = read_artifact(out / SEARCH_FILE, SEARCH_SCHEMA, tuple(field.name for field in fields(cls)))
        for name in ("greedy", "integer_program"):
            plain[name] = {int(layer): PrecisionPair.parse(pair) for layer, pair in plain[name].items()}
        plain["chosen"] = Scored.from_plain(plain["chosen"])
        plain["scored"] = tuple(map(Scored.from_plain, plain["scored"]))
        return cls(**plain)


@dataclass(frozen=True)
class Heldout:
    """Scores on text that nothing was chosen by.

    Args:
        inputs: digest of what the engine was built from.
        data: the text: source, sha256, tokens.
        settings: first the profile's, then uniform ones, the greedy choice and the exact one; fewer while it is made.
    """

    inputs: str
    data: Mapping[str, Any]
    settings: tuple[Scored, ...]

    @property
    def chosen(self) -> Scored:
        return self.settings[0]

    @property
    def uniform(self) -> tuple[Scored, ...]:
        return tuple(each for each in self.settings if each.origin.startswith("uniform "))

    def write(self, out: Path) -> None:
        settings = [each.to_plain() for each in self.settings]
        write_json(out / HELDOUT_FILE, {"schema": HELDOUT_SCHEMA, **vars(self), "settings": settings})

    @classmethod
    def read(cls, out: Path) -> "Heldout":
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: not readable or of another schema.
        """
        plain = read_artifact(out / HELDOUT_FILE, HELDOUT_SCHEMA, tuple(field.name for field in fields(cls)))
        return cls(**{**plain, "settings": tuple(map(Scored.from_plain, plain["settings"]))})


def short_name(source: str) -> str:
    """A model or text as profiles and reports call it: an id as it is, a folder or file without where it lies."""
    return Path(source).name if Path(source).exists() else source


def format_pairs(pairs: Mapping[int, PrecisionPair]) -> str:
    """``K8V4: 0-3, 7; K4V2: 4-6``: a setting in one line, the same for equal settings."""
    layers: dict[PrecisionPair, list[int]] = {}
    for layer in sorted(pairs):
        layers.setdefault(pairs[layer], []).append(layer)
    return "; ".join(f"{pair}: {format_layers(layers[pair])}" for pair in sorted(layers, reverse=True))


def pareto_front(scored: Sequence[Scored]) -> list[Scored]:
    """The settings that no other beats in both mean KL and stored bits, from the fewest bits to the most."""
    front: list[Scored] = []
    for each in sorted(scored, key=lambda each: (each.stored_bits, each.quality.kl_mean)):
        if not front or each.quality.kl_mean < front[-1].quality.kl_mean:
            front.append(each)
    return front


def verdict(heldout: Heldout, max_bits: float) -> str:
    """What the search gained over the best uniform setting within the budget, in one sentence, errors considered."""
    chosen = heldout.chosen
    within = [each for each in heldout.uniform if each.stored_bits <= max_bits]
    if not within:
        return "No uniform setting fits the budget."
    best = min(within, key=lambda each: (each.quality.kl_mean, each.stored_bits))
    ours, theirs = chosen.quality, best.quality
    numbers = (
        f"mean KL {ours.kl_mean:.5f} ± {ours.kl_stderr:.5f} at {chosen.stored_bits:.3f} stored bits "
        f"({chosen.nominal_bits:.3f} nominal) against {theirs.kl_mean:.5f} ± {theirs.kl_stderr:.5f} at "
        f"{best.stored_bits:.3f} ({best.nominal_bits:.3f} nominal), on {ours.num_tokens:,} held-out tokens"
    )
    if chosen.pairs == best.pairs:
        return f"The profile is {best.origin}: no mixed setting within the budget scored better ({numbers})."
    noise = hypot(ours.kl_stderr, theirs.kl_stderr)
    if theirs.kl_mean - ours.kl_mean > noise:
        return f"The profile is better than {best.origin}, the best uniform setting within the budget: {numbers}."
    if ours.kl_mean - theirs.kl_mean > noise:
        return f"The profile is WORSE than {best.origin} on held-out text; use that instead: {numbers}."
    return f"{best.origin[0].upper()}{best.origin[1:]} is as good as the profile, within the standard error: {numbers}."
