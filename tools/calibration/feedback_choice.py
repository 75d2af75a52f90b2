"""Round feedback of each layer: metrics from its captured attention, factors from them, and ranges by measured error.

Metrics come from all windows but every fourth, and choose nothing: on the windows left out, each side is rounded with
feedback in each of the candidates' ranges, and to the nearest codes. What is measured there is the error of the
attention output as what reads it counts it. A side keeps feedback where that is less than with nearest codes, by the
geometric mean over 2 and 4 bits, at the captured positions and at far ones. Its factors are then those of all windows.

Rows of keys may be equalized otherwise than for nearest codes, since feedback needs channels that are alike more than
it needs queries that are (:mod:`~kvtuner_tools.calibration.key_statics`). Where that is less, keys take it.

Ranges of strong feedback are wide, since a number takes up what others lack; those of weak feedback are narrow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from kvtuner_tools.calibration.artifacts import digest, read_artifact, unquantized_tokens
from kvtuner_tools.calibration.attention_error import AttentionMeter, Ranges
from kvtuner_tools.calibration.captured import Capture, CapturedLayer, Window
from kvtuner_tools.calibration.key_statics import WHITENING, KeyStatics, PairLayout
from kvtuner_tools.calibration.round_metric import DAMPING, PACKED_DAMPING, RoundMetrics, round_metrics
from kvtuner_tools.calibration.transform_choice import (
    TransformChoice,
    default_device,
    layer_transforms,
    pair_layout,
)
from kvtuner_tools.progress import track
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.feedback import RoundFeedback, triangular_factors
from vllm_kvtuner.pages.layout import FEEDBACK_BITS
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import RecentWindow, TransformSettings
from vllm_kvtuner.profile.statics import (
    FEEDBACK_KINDS,
    LINEAR_TRANSFORMS,
    FeedbackStatics,
    LayerStatics,
    save_statics,
)

FEEDBACK_SCHEMA = "kvtuner-feedback/2"
FEEDBACK_FILE = "feedback.json"
"""Name of the choice in a calibration's output folder."""
FEEDBACK_STATICS_FILE = "feedback.statics.safetensors"
"""Holds the statics of the transforms, and those of round feedback with them."""
RANGES: Mapping[int, tuple[tuple[float, ...], ...]] = {
    2: ((0.52, 0.62, 0.72), (0.6, 0.7, 0.8), (0.7, 0.82, 0.95), (0.8, 0.95, 1.1)),
    4: ((0.8, 0.88, 0.96), (0.85, 0.92, 1.0), (0.89, 0.96, 1.03), (0.93, 1.0, 1.05)),
}
"""Bits -> candidates, from narrow to wide."""
ONE_RANGE_FLOOR = 0.02
"""Loss in error for which one range is taken instead of three, which cost the store three times the work."""
HELDOUT_EVERY = 4
"""Windows of which one is held out."""
QUERIES = 256
"""Queries of a window that errors are measured on."""
NEAREST, FEEDBACK = "nearest", "feedback"
KEYS, VALUES = FEEDBACK_KINDS


@dataclass(frozen=True)
class SideChoice:
    """Round feedback of a layer's keys or values.

    Args:
        is_on: whether it is used.
        ranges: bits -> factors on a row's range.
        errors: ``nearest`` and ``feedback`` -> bits -> error of the attention output on held-out windows, at the
            captured positions.
        ratio: of feedback's to nearest codes' error, the geometric mean over bits at the worse positions.
    """

    is_on: bool
    ranges: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, Mapping[str, float]]
    ratio: float


@dataclass(frozen=True)
class LayerFeedback:
    """What was chosen for one layer.

    Args:
        index: decoder layer.
        transforms: all of its transforms, round feedback with them.
        keys: of its keys; None where ``note`` says why.
        values: likewise.
        equalization: what the keys' factors are from instead of those without feedback, or None.
        note: why keys, or both, have no round feedback, or None.
    """

    index: int
    transforms: TransformSettings
    keys: SideChoice | None
    values: SideChoice | None
    equalization: str | None
    note: str | None


@dataclass(frozen=True)
class FeedbackChoice:
    """Transforms of all layers, round feedback with them.

    Args:
        inputs: digest of what it follows from.
        statics: name of the safetensors file beside it, or None if no layer needs one.
        layers: in the model's order.
    """

    inputs: str
    statics: str | None
    layers: tuple[LayerFeedback, ...]

    @property
    def transforms(self) -> dict[int, TransformSettings]:
        """Layer -> its transforms."""
        return {layer.index: layer.transforms for layer in self.layers}

    def write(self, out_dir: Path) -> None:
        """Write ``feedback.json``."""
        write_json(out_dir / FEEDBACK_FILE, {"schema": FEEDBACK_SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, out_dir: Path) -> "FeedbackChoice":
        """Read what :meth:`write` wrote.

        Raises:
            ProfileError: not readable, or of another schema.
        """
        path = out_dir / FEEDBACK_FILE
        document = read_artifact(path, FEEDBACK_SCHEMA, tuple(field.name for field in fields(cls)))
        layers = tuple(
            LayerFeedback(
                index=layer["index"],
                transforms=TransformSettings(**layer["transforms"]),
                keys=_read_side(layer["keys"]),
                values=_read_side(layer["values"]),
                equalization=layer["equalization"],
                note=layer["note"],
            )
            for layer in document.pop("layers")
        )
        return cls(**document, layers=layers)


def choose_feedback(
    capture: Capture,
    choice: TransformChoice,
    out_dir: Path,
    *,
    recent_window: RecentWindow | None = None,
    device: torch.device | str | None = None,
) -> FeedbackChoice:
    """Make and choose round feedback for every layer; write ``feedback.json`` and, where needed, its statics file.

    A choice that is there already, from the same inputs, is read instead. Layers come one at a time, and windows of a
    layer too but for those held out.

    Args:
        capture: what to measure on.
        choice: transforms of every layer, without round feedback.
        out_dir: the calibration's output folder; holds the choice's statics.
        recent_window: tokens of each query that are not quantized; None where all are.
        device: where to measure; by default the first GPU, or the CPU.
    """
    device = device or default_device()
    inputs = digest(
        {
            "schema": FEEDBACK_SCHEMA,
            "capture": capture.inputs,
            "transforms": choice.inputs,
            "ranges": {str(bits): ranges for bits, ranges in RANGES.items()},
            "method": [ONE_RANGE_FLOOR, HELDOUT_EVERY, QUERIES, DAMPING, PACKED_DAMPING],
            "equalization": WHITENING,
            **unquantized_tokens(recent_window),
        }
    )
    if (found := _find(out_dir, inputs)) is not None:
        return found
    statics_path = None if choice.statics is None else out_dir / choice.statics
    transforms = layer_transforms(choice.transforms, statics_path, device)
    layout = pair_layout(capture)
    layers, statics = [], {}
    for layer in track(capture.layers, "round feedback", "layer", total=len(capture.layers)):
        known = transforms[layer.index]
        taken = _LayerCalibration(capture, layer, known, layout, recent_window, device).choose()
        keys, values = (taken.sides.get(kind) for kind in FEEDBACK_KINDS)
        settings = replace(
            choice.transforms[layer.index],
            key_equalization=taken.transforms.key_equalization is not None,
            **{kind: kind in taken.feedback for kind in FEEDBACK_KINDS},
        )
        layers.append(LayerFeedback(layer.index, settings, keys, values, taken.equalization, taken.note))
        static = _layer_statics(taken.transforms, settings, taken.feedback)
        if any(each is not None for each in vars(static).values()):
            statics[layer.index] = static
    if statics:
        metadata = _metadata(statics_path) if statics_path is not None else {}
        metadata |= {} if layout is None else layout.metadata
        metadata |= {"model": capture.model["name"], "method": "calibration", "data": capture.data["source"]}
        save_statics(out_dir / FEEDBACK_STATICS_FILE, statics, metadata)
    result = FeedbackChoice(inputs, FEEDBACK_STATICS_FILE if statics else None, tuple(layers))
    result.write(out_dir)
    return result


class _Found(NamedTuple):
    """Round feedback of one layer.

    Args:
        transforms: of the layer, without round feedback, with the equalization that goes with it.
        sides: name of a transform -> what was chosen.
        feedback: of those that are used.
        equalization: what the keys' factors are from, if not from what was known.
        note: why some are missing.
    """

    transforms: LayerTransforms
    sides: Mapping[str, SideChoice] = {}
    feedback: Mapping[str, RoundFeedback] = {}
    equalization: str | None = None
    note: str | None = None


class _LayerCalibration:
    """Finds the round feedback of one layer.

    Args:
        capture: what to measure on.
        layer: of it.
        transforms: of the layer, without round feedback.
        layout: which channels of keys share a factor; None where none may.
        recent_window: tokens of each query that are not quantized.
        device: where to measure.
    """

    def __init__(
        self,
        capture: Capture,
        layer: CapturedLayer,
        transforms: LayerTransforms,
        layout: PairLayout | None,
        recent_window: RecentWindow | None,
        device: torch.device | str,
    ) -> None:
        self._capture = capture
        self._layer = layer
        self._transforms = transforms
        self._layout = layout
        self._recent_window = recent_window
        self._device = device
        self._rotary = capture.load_rotary(layer, device)

    def choose(self) -> _Found:
        """What is used, and why it is no more."""
        gram = self._capture.load_output_gram(self._layer, self._device)
        windows = range(len(self._capture.windows))
        heldout = [*windows[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]] or [*windows[1:]][-1:]
        if gram is None:
            return _Found(self._transforms, note=self._capture.gram_unsupported)
        if not heldout:
            note = "text must have at least two windows, one of them to measure on"
            return _Found(self._transforms, note=note)
        seen = self._metrics([each for each in windows if each not in heldout], gram)
        every = seen + self._metrics(heldout, gram)
        meters = self._meters(heldout, gram)
        transforms, name, sides = self._transforms, None, {}
        if self._layer.offset_unsupported is None:
            name, transforms, sides[KEYS] = self._choose_keys(seen, meters)
        factors = self._factors(seen, self._transforms)[VALUES]
        sides[VALUES] = _choose_side([self._value_measure(meters[0], factors)])
        factors = self._factors(every, transforms)
        used = {
            kind: RoundFeedback(factors[kind], {int(bits): ranges for bits, ranges in side.ranges.items()})
            for kind, side in sides.items()
            if side.is_on
        }
        return _Found(transforms, sides, used, name, self._layer.offset_unsupported)

    def _choose_keys(
        self, seen: RoundMetrics, meters: list[AttentionMeter]
    ) -> tuple[str | None, LayerTransforms, SideChoice]:
        """What the factors of the best equalization are from, if not as known; the transforms with it, and the side."""
        found = []
        for name, transforms in self._equalized().items():
            given = replace(transforms, key_feedback=RoundFeedback(self._factors(seen, transforms)[KEYS], {}))
            measures = [
                Measure(partial(meter.key_errors, self._transforms), partial(meter.key_errors_by, given))
                for meter in meters
            ]
            found.append((name, transforms, _choose_side(measures)))
        best = min(found, key=lambda each: each[2].ratio)
        return best if best[2].is_on else found[0]

    def _equalized(self) -> dict[str | None, LayerTransforms]:
        """The transforms as they are known, under None, and with other factors by what these are from."""
        known: dict[str | None, LayerTransforms] = {None: self._transforms}
        if self._layout is None:
            return known
        # Of all windows, those held out too: two moments of a channel say nothing of single rows.
        every = range(len(self._capture.windows))
        windows = (each for number in every for each in self._capture.load_layer(self._layer, self._device, [number]))
        statics = KeyStatics.of(windows, None if self._rotary is None else self._rotary.near)
        factors = statics.factors_with_feedback(self._layout)
        return known | {name: replace(self._transforms, key_equalization=each) for name, each in factors.items()}

    def _meters(self, windows: list[int], gram: torch.Tensor) -> list[AttentionMeter]:
        """At the captured positions, and at far ones where there are any."""
        rows = [_sampled(each) for each in self._capture.load_windows(self._layer, windows, self._device)]
        near = None if self._rotary is None else self._rotary.near
        meter = AttentionMeter(self._layer, rows, near, self._recent_window, gram)
        return [meter] if self._rotary is None else [meter, meter.at_far_positions(self._rotary)]

    def _value_measure(self, meter: AttentionMeter, factors: torch.Tensor) -> "Measure":
        """By one meter, since positions do not change values."""
        given = replace(self._transforms, value_feedback=RoundFeedback(factors, {}))
        return Measure(partial(meter.value_errors, self._transforms), partial(meter.value_errors_by, given))

    def _metrics(self, windows: list[int], gram: torch.Tensor) -> RoundMetrics:
        near = None if self._rotary is None else self._rotary.near
        rows = self._capture.load_windows(self._layer, windows, self._device)
        return round_metrics(self._layer, rows, gram, near, self._recent_window)

    def _factors(self, metrics: RoundMetrics, transforms: LayerTransforms) -> dict[str, torch.Tensor]:
        """Transform's name -> factors, for rows after these transforms."""
        turns = None if self._rotary is None else self._rotary.turns
        packed = metrics.at_positions(turns).packed(transforms)
        factors = (triangular_factors(each) for each in (packed.keys, packed.values))
        return dict(zip(FEEDBACK_KINDS, factors, strict=True))


def _sampled(window: Window) -> Window:
    """With evenly spaced queries, at most QUERIES; the few of other stages leave the choice of ranges to chance."""
    count = len(window.query)
    rows = torch.arange(count - 1, 0, -math.ceil(count / QUERIES), device=window.query.device).flip(0)
    return replace(window, query=window.query[rows], query_position=window.query_position[rows])


class Measure(NamedTuple):
    """What rounding costs by one meter.

    Args:
        nearest: bits -> error per bits, of the nearest codes.
        feedback: bits and candidates of ranges -> the error of each.
    """

    nearest: Callable[[Sequence[int]], dict[int, float]]
    feedback: Callable[[int, Sequence[Ranges]], list[float]]


def _choose_side(measures: list[Measure]) -> SideChoice:
    """Ranges of least error over all measures, and whether feedback is better than nearest codes by each of them."""
    ranges: dict[int, tuple[float, ...]] = {}
    errors: list[dict[int, float]] = [{} for _ in measures]

    def measured(bits: int, candidates: Sequence[tuple[float, ...]]) -> list[list[float]]:
        """Of each candidate the error by each measure."""
        by_measure = [measure.feedback(bits, candidates) for measure in measures]
        return [list(each) for each in zip(*by_measure, strict=True)]

    for bits, candidates in RANGES.items():
        found = measured(bits, candidates)
        best = min(range(len(candidates)), key=lambda number: _geometric_mean(found[number]))
        chosen, taken = candidates[best], found[best]
        (middle,) = measured(bits, [chosen[1:2]])
        if _geometric_mean(middle) <= (1 + ONE_RANGE_FLOOR) * _geometric_mean(taken):
            chosen, taken = chosen[1:2], middle
        ranges[bits] = chosen
        for of_measure, error in zip(errors, taken, strict=True):
            of_measure[bits] = error
    nearest = [measure.nearest(FEEDBACK_BITS) for measure in measures]
    ratio = max(map(_ratio, errors, nearest))
    return SideChoice(
        is_on=ratio < 1,
        ranges={str(bits): each for bits, each in ranges.items()},
        errors={NEAREST: _by_name(nearest[0]), FEEDBACK: _by_name(errors[0])},
        ratio=ratio,
    )


def _geometric_mean(errors: Sequence[float]) -> float:
    return math.prod(errors) ** (1 / len(errors))


def _by_name(errors: Mapping[int, float]) -> dict[str, float]:
    return {str(bits): error for bits, error in errors.items()}


def _ratio(errors: Mapping[int, float], nearest: Mapping[int, float]) -> float:
    """Geometric mean over bits; 1 where nothing is read packed."""
    pairs = [(errors[bits], nearest[bits]) for bits in nearest if nearest[bits] > 0 and errors[bits] > 0]
    return math.exp(sum(math.log(mine / theirs) for mine, theirs in pairs) / len(pairs)) if pairs else 1.0


def _layer_statics(
    transforms: LayerTransforms, settings: TransformSettings, feedback: Mapping[str, RoundFeedback]
) -> LayerStatics:
    """All of a layer's statics, as the file holds them."""

    def plain(tensor: torch.Tensor | None) -> np.ndarray | None:
        return None if tensor is None else tensor.cpu().numpy()

    used = {
        kind: FeedbackStatics(
            each.factors.cpu().numpy(),
            each.ranges,
            tuple(name for name in LINEAR_TRANSFORMS[kind] if getattr(settings, name)),
        )
        for kind, each in feedback.items()
    }
    return LayerStatics(plain(transforms.key_offset), plain(transforms.key_equalization), **used)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def _read_side(raw: dict[str, Any] | None) -> SideChoice | None:
    if raw is None:
        return None
    return SideChoice(**{**raw, "ranges": {bits: tuple(each) for bits, each in raw["ranges"].items()}})


def _find(out_dir: Path, inputs: str) -> FeedbackChoice | None:
    """The choice from the same inputs, if it is there."""
    try:
        found = FeedbackChoice.read(out_dir)
    except ProfileError:
        return None
    there = found.statics is None or (out_dir / found.statics).exists()
    return found if found.inputs == inputs and there else None
