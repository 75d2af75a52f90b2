"""The project's own formats: pages of a precision profile, or of a pair that no page holds yet, with its transforms."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvtuner_tools.calibration.transform_choice import layer_transforms
from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View, first, newest
from vllm_kvtuner.engine.key_bias import largest_pairs
from vllm_kvtuner.engine.query_energy import key_feedback
from vllm_kvtuner.pages.codes import UniformCodes
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import PAIR_FORM
from vllm_kvtuner.pages.transforms import (
    KEY,
    VALUE,
    LayerTransforms,
    restore_keys,
    rotate_values,
    transform_keys,
)
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.profile import FROM_WEIGHTS, ResolvedProfile

UNSERVED_BITS = 3
"""Of codes that pages have no form for, and that are simulated to tell whether they should."""
UNSERVED_RANGES = ((0.64, 0.73, 0.83), (0.71, 0.8, 0.9), (0.79, 0.88, 0.99), (0.86, 0.97, 1.08))
"""Candidates for their ranges, between those of 2 and of 4 bits (calibration/feedback_choice.py)."""
META_BITS = 32
"""Of a row's scale and minimum."""


@dataclass(frozen=True)
class _Statics:
    """Of a layer: its transforms, and per side the ranges of codes of UNSERVED_BITS."""

    transforms: LayerTransforms
    ranges: dict[str, tuple[float, ...]]


class Kvtuner(Method):
    """Rows as a profile's pages give them back, its recent window and first tokens read as they were.

    Rounding, transforms and statics are the product's own code. Of a pair alone the window is the best one, where an
    engine may take a smaller one. With a pair of codes of 3 bits, whose page does not exist, rows are rounded in the
    same way, and the ranges of round feedback are those of least weighted error on calibration text.

    Args:
        spec: a profile's name, file or pair; behind a colon a pair that all quantized layers take in its place.
        shape: the model.

    Raises:
        ProfileError: no such profile, or it does not fit the model.
        ValueError: what cannot be simulated.
    """

    def __init__(self, spec: str, shape: ModelShape) -> None:
        self.label = f"kvtuner:{spec}"
        head, colon, last = spec.rpartition(":")
        match = PAIR_FORM.fullmatch(last) if colon else None
        self._bits: tuple[int, int] | None = None
        if match is not None:
            self._bits = int(match[1]), int(match[2])
            if not set(self._bits) <= {2, 3, 4, 8}:
                raise ValueError(f"{self.label}: the pair must have codes of 2, 3, 4 or 8 bits, but got {last}")
        self._resolved: ResolvedProfile = load_profile(head if match is not None else spec).resolve(shape)
        for layer in self._resolved.layers:
            if layer.recent is not None and layer.recent.bits != 16:
                raise ValueError(f"{self.label}: recent windows must have 16 bits, but got {layer.recent.bits}")
        self._precisions = {layer.index: layer for layer in self._resolved.layers}
        self.calibrates = self._bits is not None and UNSERVED_BITS in self._bits

    def _pair(self, layer: Layer) -> tuple[int, int]:
        pair = self._precisions[layer.index].pair
        return self._bits if self._bits is not None and pair.is_quantized else (pair.k_bits, pair.v_bits)

    def prepare(self, layer: Layer, texts: Sequence[Rows]) -> _Statics | None:
        precision = self._precisions[layer.index]
        if not precision.pair.is_quantized:
            return None
        settings = precision.transforms
        offset = None
        device = layer.rotary.cos_sin.device if layer.rotary is not None else "cpu"
        if settings.key_offset == FROM_WEIGHTS:
            assert layer.weights is not None
            bias = layer.weights()[2].view(layer.num_kv_heads, layer.head_size)
            if bias.any():
                offset, _ = largest_pairs(bias, layer.rotary)
            settings = replace(settings, key_offset=False)
        of_weights = settings.key_round_feedback == FROM_WEIGHTS
        if of_weights:
            settings = replace(settings, key_round_feedback=False)
        path = self._resolved.profile.statics
        transforms = layer_transforms({layer.index: settings}, path, device)[layer.index]
        if of_weights:
            assert layer.query_energy is not None
            known = key_feedback(layer.query_energy()[0], layer.rotary, transforms.key_equalization)
            transforms = replace(transforms, key_feedback=known)
        offset = transforms.key_offset if offset is None else offset
        transforms = replace(transforms, key_offset=offset, rotary=None if offset is None else layer.rotary)
        sides = zip((KEY, VALUE), self._pair(layer), strict=True)
        feedbacks = {KEY: transforms.key_feedback, VALUE: transforms.value_feedback}
        ranges = {}
        for side, bits in sides:
            feedback = feedbacks[side]
            if bits == UNSERVED_BITS and feedback is not None:
                ranges[side] = _best_ranges(feedback, [_packed(side, rows, transforms) for rows in texts])
        return _Statics(transforms, ranges)

    def view(self, layer: Layer, statics: _Statics | None, rows: Rows) -> View:
        if statics is None:
            return View(rows.key, rows.value, Storage(16.0))
        transforms = statics.transforms
        key_bits, value_bits = self._pair(layer)
        key = self._round(KEY, key_bits, statics, _packed(KEY, rows, transforms))
        value = self._round(VALUE, value_bits, statics, _packed(VALUE, rows, transforms))
        recent = self._precisions[layer.index].recent
        exact, tokens = None, 0
        if recent is not None:
            exact = newest(rows.num_tokens, recent.tokens, key.device) | first(
                rows.num_tokens, recent.sink_tokens, key.device
            )
            tokens = recent.tokens + recent.sink_tokens
        bits = (key_bits + value_bits) / 2 + META_BITS / layer.head_size
        return View(
            key=restore_keys(key, rows.positions, transforms),
            value=rotate_values(value, transforms),
            storage=Storage(bits, tokens, beside=True),
            exact_keys=exact,
            exact_values=exact,
        )

    def _round(self, side: str, bits: int, statics: _Statics, rows: torch.Tensor) -> torch.Tensor:
        transforms = statics.transforms
        feedback = transforms.feedback(side, bits)
        if (ranges := statics.ranges.get(side)) is not None:
            known = transforms.key_feedback if side == KEY else transforms.value_feedback
            assert known is not None
            feedback = RoundFeedback(known.factors, {bits: ranges})
        return UniformCodes(bits).round_trip(rows, transforms.range_search, feedback)


def _packed(side: str, rows: Rows, transforms: LayerTransforms) -> torch.Tensor:
    """A side's rows as they are packed."""
    if side == KEY:
        return transform_keys(rows.key, rows.positions, transforms)
    return rotate_values(rows.value, transforms)


def _best_ranges(feedback: RoundFeedback, texts: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Of UNSERVED_RANGES those of least weighted error."""

    def error(ranges: tuple[float, ...]) -> float:
        tried = RoundFeedback(feedback.factors, {UNSERVED_BITS: ranges})
        codes = UniformCodes(UNSERVED_BITS)
        return sum(float(tried.weighted_error(rows - codes.round_trip(rows, feedback=tried)).sum()) for rows in texts)

    return min(UNSERVED_RANGES, key=error)
