"""QAQ (Dong et al. 2024, arXiv 2403.04643): bits of each token by how attention uses it, and the authors' code."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View, newest

OUTLIERS = 0.01
"""Share of a row's numbers that are kept as they are, half of them at each end, rounded up."""
OUTLIER_BITS = 32
LEAST_BITS, MOST_BITS = 1, 8
ROW_BITS = 32 + 4
"""Of a row: its mean and scale in fp16, and its number of bits."""
WINDOW = 5
"""Queries whose attention tells a token's use; the paper's attention window."""


@dataclass(frozen=True)
class _Statics:
    """Of a layer: the largest magnitude of its queries, and all layers' targets."""

    query: float
    key_target: float
    value_target: float


class Qaq(Method):
    """Each row of a head in as many bits as keep the error of attention's output below a target.

    With a the largest weight that a token got from the WINDOW queries from itself on, and n tokens, errors are at most

        values    sqrt(target) / (n a)
        keys      sqrt(target / head_size) / (n q x),    x = max_j |(diag(a) - a a^T)_j|

    with q the largest number of a layer's queries. Rows are rounded uniformly about their mean, outliers apart; a token
    is exact until its window has passed. With groups of query heads, a is the largest of them. Both targets, one for
    all layers, are those with which calibration text has the wanted mean bits.

    Args:
        key_bits: of a key's codes, on average.
        value_bits: of a value's codes, on average.
    """

    calibrates = True

    def __init__(self, key_bits: float = 4.0, value_bits: float = 2.0) -> None:
        for bits in (key_bits, value_bits):
            if not LEAST_BITS < bits < MOST_BITS:
                raise ValueError(f"qaq: bits must be between {LEAST_BITS} and {MOST_BITS}, but got {bits}")
        self.label = f"qaq:{key_bits:g}:{value_bits:g}"
        self._bits = key_bits, value_bits

    def prepare_all(self, layers: Sequence[Layer], texts: Mapping[int, Sequence[Rows]]) -> dict[int, _Statics]:
        largest = {layer.index: max(float(rows.query.abs().max()) for rows in texts[layer.index]) for layer in layers}
        needs: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for layer in layers:
            for rows in texts[layer.index]:
                errors = _errors(layer, rows, _Statics(largest[layer.index], 1.0, 1.0))
                for need, side, error in zip(needs, (rows.key, rows.value), errors, strict=True):
                    need.append(((inside(side)[1]) / (2 * error[..., None])).flatten())
        targets = [target_of(torch.cat(need), bits) for need, bits in zip(needs, self._bits, strict=True)]
        return {layer.index: _Statics(largest[layer.index], *targets) for layer in layers}

    def view(self, layer: Layer, statics: _Statics, rows: Rows) -> View:
        key_error, value_error = _errors(layer, rows, statics)
        key, key_bits = round_rows(rows.key, key_error)
        value, value_bits = round_rows(rows.value, value_error)
        exact = newest(rows.num_tokens, WINDOW, rows.key.device)
        return View(key, value, Storage((key_bits + value_bits) / 2, WINDOW - 1), exact, exact)


def _errors(layer: Layer, rows: Rows, statics: _Statics) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest errors of keys and of values, [num_tokens, num_kv_heads] each."""
    used = largest_weights(layer, rows)
    count = rows.num_tokens
    key_error = math.sqrt(statics.key_target / layer.head_size) / count / (statics.query * sensitivity(used))
    return key_error, math.sqrt(statics.value_target) / count / used


def target_of(needs: torch.Tensor, bits: float) -> float:
    """The target with which rows have ``bits`` on average.

    Args:
        needs: [rows], half of each row's range over the error that a target of 1 allows.
        bits: wanted.
    """
    low, high = -20.0, 60.0  # of the target's logarithm to base 2
    for _ in range(60):
        middle = (low + high) / 2
        mean = float(_row_bits(needs / 2 ** (middle / 2)).mean())
        low, high = (middle, high) if mean > bits else (low, middle)
    return 2.0**high


def _row_bits(needs: torch.Tensor) -> torch.Tensor:
    return torch.log2(needs + 1).ceil().clamp(LEAST_BITS, MOST_BITS)


def largest_weights(layer: Layer, rows: Rows) -> torch.Tensor:
    """[num_tokens, num_kv_heads]: of each token the largest weight from the WINDOW queries from its own on."""
    count, heads = rows.num_tokens, layer.num_kv_heads
    query = rows.query.view(count, heads, layer.group, layer.head_size)
    position = rows.positions
    hidden = position[None, :] > position[:, None]
    counted = ~hidden & (position[:, None] < position[None, :] + WINDOW)
    found = torch.empty(count, heads, device=query.device)
    for head in range(heads):
        logits = query[:, head].transpose(0, 1) @ rows.key[:, head].T * layer.scale
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        found[:, head] = (weights * counted).amax((0, 1))
    return found.clamp(min=1e-20)


def sensitivity(used: torch.Tensor) -> torch.Tensor:
    """x of keys, shaped as ``used`` [num_tokens, num_kv_heads]: the largest magnitude of a row of diag(a) - a a^T."""
    top = used.topk(2, dim=0).values if len(used) > 1 else used.expand(2, -1)
    others = torch.where(used == top[0], top[1], top[0])
    return torch.maximum((used - used.square()).abs(), used * others)


def round_rows(rows: torch.Tensor, error: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Rows in as many bits as keep the error of each number, and the mean bits of a number.

    Args:
        rows: [num_tokens, num_kv_heads, head_size] fp32.
        error: [num_tokens, num_kv_heads], the largest that a number may have.
    """
    size = rows.shape[-1]
    mean, span, outliers = inside(rows)
    bits = _row_bits(span / (2 * error[..., None]))
    step = (span / 2**bits).half().float().clamp(min=1e-10)
    mean = mean.half().float()
    codes = ((rows - mean) / step).round()
    codes = torch.minimum(torch.maximum(codes, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    read = torch.where(outliers, rows, codes * step + mean)
    stored = float(bits.mean()) + ROW_BITS / size + OUTLIER_BITS * float(outliers.float().mean())
    return read, stored


def inside(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and range [..., 1] of each row without its outliers, and those, bool shaped as ``rows``."""
    size = rows.shape[-1]
    ordered = rows.sort(-1).values
    low = ordered[..., math.ceil(OUTLIERS / 2 * size) - 1, None]
    high = ordered[..., math.floor((1 - OUTLIERS / 2) * size) - 1, None]
    outliers = (rows <= low) | (rows > high)
    kept = ~outliers
    mean = (rows * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)
    least = rows.masked_fill(outliers, float("inf")).amin(-1, keepdim=True)
    most = rows.masked_fill(outliers, float("-inf")).amax(-1, keepdim=True)
    return mean, (most - least).clamp(min=0), outliers
