"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079): section 3, and the authors' simulation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtuner_tools.calibration.rotation import apply_rotary, undo_rotary
from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View, first

OUTLIERS = 0.01
"""Share of numbers that are kept as they are, half of them at each end."""
OUTLIER_BITS = 32
"""Of an outlier beside its code: the number and its place, 16 bits each."""
ITERATIONS = 50
"""Of k-means, at most."""
SINKS = 1
"""First tokens that are kept as they are."""


@dataclass(frozen=True)
class Table:
    """Levels of a side.

    Args:
        levels: [2^bits] fp32, rising, of numbers normalized to [-1, 1]: what is read.
        bounds: [2^bits - 1] fp32 between the levels before Q-Norm, which numbers are compared with.
    """

    levels: torch.Tensor
    bounds: torch.Tensor

    def round(self, rows: torch.Tensor) -> torch.Tensor:
        return self.levels[torch.bucketize(rows, self.bounds)]


@dataclass(frozen=True)
class _Statics:
    """Of a layer: key channels' ends [num_kv_heads * head_size], and the tables of both sides."""

    low: torch.Tensor
    high: torch.Tensor
    keys: Table
    values: Table


class KvQuant(Method):
    """Keys before RoPE per channel, values per token, levels of a table per layer and side, and outliers apart.

    A key channel's range is its .5th to 99.5th percentile in calibration text, and a token's values, of all heads, have
    theirs as they come. What lies outside is stored sparsely. Levels are centroids of k-means over normalized
    calibration numbers, each weighted by its squared gradient (diagonal Fisher information). At 2 bits Q-Norm shifts
    and scales the centroids so that rounding keeps mean and deviation. The first token is kept as it is.

    Args:
        bits: of a code.
    """

    calibrates = True
    needs_gradients = True

    def __init__(self, bits: int = 3) -> None:
        if not 2 <= bits <= 5:
            raise ValueError(f"kvquant: bits must be 2 to 5, but got {bits}")
        self.label = f"kvquant:{bits}"
        self._bits = bits

    def prepare(self, layer: Layer, texts: Sequence[Rows]) -> _Statics:
        keys = torch.cat([_before_rope(layer, rows) for rows in texts])
        ends = torch.quantile(keys, torch.tensor([OUTLIERS / 2, 1 - OUTLIERS / 2], device=keys.device), dim=0)
        values = torch.cat([rows.value.flatten(1) for rows in texts])
        gradients = [(rows.key_gradient, rows.value_gradient) for rows in texts]
        key_weights, value_weights = (
            torch.cat([each.flatten(1).square() for each in side if each is not None])
            for side in zip(*gradients, strict=True)
        )
        low, high, _ = _token_ends(values)
        return _Statics(
            ends[0],
            ends[1],
            self._table(_normalized(keys, ends[0], ends[1]), key_weights),
            self._table(_normalized(values, low, high), value_weights),
        )

    def view(self, layer: Layer, statics: _Statics, rows: Rows) -> View:
        keys = _before_rope(layer, rows)
        outliers = (keys < statics.low) | (keys > statics.high)
        read = _round(keys, statics.low, statics.high, statics.keys, outliers)
        key = read.view_as(rows.key)
        if layer.rotary is not None:
            key = apply_rotary(key, rows.positions, layer.rotary)
        values = rows.value.flatten(1)
        low, high, value_outliers = _token_ends(values)
        value = _round(values, low, high, statics.values, value_outliers).view_as(rows.value)
        share = (outliers.float().mean() + value_outliers.float().mean()) / 2
        # A token's values have a scale and an offset; key channels' are static.
        bits = self._bits + OUTLIER_BITS * float(share) + 32 / values.shape[1] / 2
        exact = first(rows.num_tokens, SINKS, key.device).expand(rows.num_tokens, -1)
        return View(key, value, Storage(bits, SINKS), exact, exact)

    def _table(self, normalized: torch.Tensor, weights: torch.Tensor) -> Table:
        inside = normalized.abs() <= 1
        numbers = normalized[inside]
        centroids = weighted_means(numbers, weights[inside], 2**self._bits)
        bounds = (centroids[1:] + centroids[:-1]) / 2
        if self._bits > 2:
            return Table(centroids, bounds)
        rounded = centroids[torch.bucketize(numbers, bounds)]
        scale = numbers.std(correction=0) / rounded.std(correction=0)
        return Table((centroids - rounded.mean()) * scale + numbers.mean(), bounds)


def weighted_means(numbers: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """Centroids of k-means in one dimension, [count] fp32, rising; begun at evenly spaced quantiles.

    Args:
        numbers: [n] fp32.
        weights: [n] fp32, not negative.
        count: of centroids.
    """
    places = (torch.arange(count, device=numbers.device) + 0.5) / count * (len(numbers) - 1)
    centroids = numbers.sort().values[places.long()]
    weights = weights.double()
    for _ in range(ITERATIONS):
        nearest = torch.bucketize(numbers, (centroids[1:] + centroids[:-1]) / 2)
        mass = torch.zeros(count, dtype=torch.float64, device=numbers.device).index_add_(0, nearest, weights)
        sums = torch.zeros_like(mass).index_add_(0, nearest, weights * numbers)
        moved = torch.where(mass > 0, sums / mass.clamp(min=1e-300), centroids.double()).float()
        if torch.equal(moved, centroids):
            break
        centroids = moved.sort().values
    return centroids


def _before_rope(layer: Layer, rows: Rows) -> torch.Tensor:
    """[num_tokens, num_kv_heads * head_size]."""
    key = rows.key if layer.rotary is None else undo_rotary(rows.key, rows.positions, layer.rotary)
    return key.flatten(1)


def _token_ends(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least and largest number of each token [num_tokens, 1] without its outliers, and those [num_tokens, numbers]."""
    ends = torch.quantile(values, torch.tensor([OUTLIERS / 2, 1 - OUTLIERS / 2], device=values.device), dim=1)
    outliers = (values <= ends[0][:, None]) | (values >= ends[1][:, None])
    inside = values.masked_fill(outliers, float("nan"))
    low = inside.nan_to_num(nan=float("inf")).amin(1, keepdim=True)
    high = inside.nan_to_num(nan=float("-inf")).amax(1, keepdim=True)
    return low, high, outliers


def _normalized(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (rows - (high + low) / 2) / ((high - low) / 2).clamp(min=1e-10)


def _round(
    rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, table: Table, outliers: torch.Tensor
) -> torch.Tensor:
    read = table.round(_normalized(rows, low, high)) * ((high - low) / 2) + (high + low) / 2
    return torch.where(outliers, rows.half().float(), read)
