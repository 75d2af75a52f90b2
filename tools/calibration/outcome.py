"""What search and held-out evaluation found, as files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvtuner_tools.calibration.artifacts import Quality, read_artifact
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.problems import format_layers

SEARCH_SCHEMA = "kvtuner-search/2"
SEARCH_FILE = "search.json"
HELDOUT_SCHEMA = "kvtuner-heldout/3"
HELDOUT_FILE = "heldout.json"
PROFILE_FILE = "profile.yaml"
REPORT_FILE = "report.html"
UNIFORM = "uniform "
"""How origins of uniform settings begin."""
PROFILE_ORIGIN = "this profile"
"""Origin of the chosen setting among the held-out scores."""


@dataclass(frozen=True)
class Setting:
    """A pair for every layer.

    Args:
        number: trial, or None for a setting that is none.
        origin: where it came from, such as ``uniform K4V4``, ``greedy`` or ``nsga2``.
        pairs: the pair of every layer.
        nominal_bits: mean over the layers.
        stored_bits: the same with scales and minima.
    """

    number: int | None
    origin: str
    pairs: Mapping[int, PrecisionPair]
    nominal_bits: float
    stored_bits: float

    def to_plain(self) -> dict[str, Any]:
        """As JSON's types; :meth:`from_plain` reads it back."""
        return {**vars(self), "pairs": {str(layer): pair.name for layer, pair in self.pairs.items()}}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        return cls(**{**plain, "pairs": _read_pairs(plain["pairs"])})


@dataclass(frozen=True)
class Scored(Setting):
    """A setting with its scores.

    Args:
        quality: teacher-forced scores.
    """

    quality: Quality

    def to_plain(self) -> dict[str, Any]:
        return {**super().to_plain(), "quality": asdict(self.quality)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        return cls(**{**plain, "pairs": _read_pairs(plain["pairs"]), "quality": Quality(**plain["quality"])})


SETTING_KEYS = tuple(field.name for field in fields(Setting))


def _read_pairs(plain: Mapping[str, str]) -> dict[int, PrecisionPair]:
    return {int(layer): PrecisionPair.parse(pair) for layer, pair in plain.items()}


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
        scored: all settings with their scores, in the order of trials; none where the choice was made without.
        trials: how many were ``scored``, ``duplicates`` of others, or ``over_budget``.
        evaluation_seconds: median time of a trial that was scored; None where none was.
    """

    study: str
    sampler: str
    seed: int
    budget: str
    max_bits: float
    data: Mapping[str, Any]
    greedy: Mapping[int, PrecisionPair]
    integer_program: Mapping[int, PrecisionPair]
    chosen: Setting
    scored: tuple[Scored, ...]
    trials: Mapping[str, int]
    evaluation_seconds: float | None

    def find(self, pairs: Mapping[int, PrecisionPair]) -> Scored | None:
        """The scored setting with these pairs."""
        return next((each for each in self.scored if each.pairs == pairs), None)

    def write(self, out: Path) -> None:
        plain = {
            **vars(self),
            "greedy": {str(layer): pair.name for layer, pair in self.greedy.items()},
            "integer_program": {str(layer): pair.name for layer, pair in self.integer_program.items()},
            "chosen": Setting(**{name: getattr(self.chosen, name) for name in SETTING_KEYS}).to_plain(),
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
            plain[name] = _read_pairs(plain[name])
        plain["chosen"] = Setting.from_plain(plain["chosen"])
        plain["scored"] = tuple(map(Scored.from_plain, plain["scored"]))
        return cls(**plain)


@dataclass(frozen=True)
class Heldout:
    """Scores on text that nothing was chosen by.

    Args:
        inputs: digest of what the engine was built from.
        data: the text: source, sha256, tokens.
        settings: first the profile's, then others, none of which has its pairs; fewer while it is made.
        differences: origin of each other setting -> its KL less the profile's on the same tokens, the mean and its
            standard error.
        kinds: origin of each setting -> kind of text -> ``kl_mean``, ``kl_stderr`` and ``tokens``.
    """

    inputs: str
    data: Mapping[str, Any]
    settings: tuple[Scored, ...]
    differences: Mapping[str, tuple[float, float]]
    kinds: Mapping[str, Mapping[str, Mapping[str, float]]]

    @property
    def chosen(self) -> Scored:
        return self.settings[0]

    @property
    def uniform(self) -> tuple[Scored, ...]:
        """Uniform settings other than the profile."""
        return tuple(each for each in self.settings[1:] if each.origin.startswith(UNIFORM))

    @property
    def uniform_pair(self) -> PrecisionPair | None:
        """The one pair of the profile's quantized layers; None where there are several."""
        return uniform_pair(self.chosen.pairs)

    def rival(self, max_bits: float) -> Scored | None:
        """The best uniform setting within a budget, in stored bits, other than the profile."""
        within = [each for each in self.uniform if each.stored_bits <= max_bits]
        return min(within, key=lambda each: (each.quality.kl_mean, each.stored_bits), default=None)

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
        plain["settings"] = tuple(map(Scored.from_plain, plain["settings"]))
        plain["differences"] = {origin: (mean, stderr) for origin, (mean, stderr) in plain["differences"].items()}
        return cls(**plain)


def paired_difference(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """Mean of ``theirs - ours`` and its standard error, which takes tokens as independent.

    Args:
        theirs: [tokens] KL of a setting.
        ours: [tokens] KL of another on the same tokens.
    """
    difference = np.asarray(theirs, dtype=np.float64) - ours
    return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)


def uniform_pair(pairs: Mapping[int, PrecisionPair]) -> PrecisionPair | None:
    """The pair of all quantized layers; None where they have several, or where there are none."""
    found = {pair for pair in pairs.values() if pair.is_quantized}
    return found.pop() if len(found) == 1 else None


def uniform_file(setting: Scored) -> str:
    """Name of a uniform setting's profile in the output folder."""
    return f"{setting.origin.replace(' ', '_')}.yaml"


def label(origin: str) -> str:
    """How reports call a setting: a pair on the command line stores without what calibration found."""
    return (
        f"{origin.removeprefix(UNIFORM)} with this calibration's transforms" if origin.startswith(UNIFORM) else origin
    )


def bits_text(setting: Scored) -> str:
    return f"{setting.stored_bits:.3f} stored bits ({setting.nominal_bits:.3f} nominal)"


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
