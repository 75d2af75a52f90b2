"""QAQ (Dong et al. 2024, arXiv 2403.04643): bits of each token by how attention uses it, and the authors' code."""

import math
from collections.abc import Sequence

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


class Qaq(Method):
    """Each row of a head in as many bits as keep the error of attention's output below a target.

    With a the largest weight that a token got from the WINDOW queries from itself on, and n tokens, errors are at most

        values    sqrt(target) / (n a)
        keys      sqrt(target / head_size) / (n q x),    x = max_j |(diag(a) - a a^T)_j|

    with q the largest number of queries. Rows are rounded uniformly about their mean, outliers apart; a token is exact
    until its window has passed. With groups of query heads, a is the largest of them.

    Args:
        target: of the squared error, which decides the bits.
    """

    calibrates = True

    def __init__(self, target: float = 1.0) -> None:
        if target <= 0:
            raise ValueError(f"qaq: target must be positive, but got {target}")
        self.label = f"qaq:{target:g}"
        self._target = target

    def prepare(self, layer: Layer, texts: Sequence[Rows]) -> float:
        """The largest magnitude of queries."""
        return max(float(rows.query.abs().max()) for rows in texts)

    def view(self, layer: Layer, statics: float, rows: Rows) -> View:
        used = largest_weights(layer, rows)
        count = rows.num_tokens
        value_error = math.sqrt(self._target) / count / used
        key_error = math.sqrt(self._target / layer.head_size) / count / (statics * sensitivity(used))
        key, key_bits = round_rows(rows.key, key_error)
        value, value_bits = round_rows(rows.value, value_error)
        exact = newest(count, WINDOW, rows.key.device)
        return View(key, value, Storage((key_bits + value_bits) / 2, WINDOW - 1), exact, exact)


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
    ordered = rows.sort(-1).values
    low = ordered[..., math.ceil(OUTLIERS / 2 * size) - 1, None]
    high = ordered[..., math.floor((1 - OUTLIERS / 2) * size) - 1, None]
    outliers = (rows <= low) | (rows > high)
    inside = ~outliers
    mean = (rows * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
    least = rows.masked_fill(outliers, float("inf")).amin(-1, keepdim=True)
    most = rows.masked_fill(outliers, float("-inf")).amax(-1, keepdim=True)
    span = (most - least).clamp(min=0)
    bits = torch.log2(span / (2 * error[..., None]) + 1).ceil().clamp(LEAST_BITS, MOST_BITS)
    step = (span / 2**bits).half().float().clamp(min=1e-10)
    mean = mean.half().float()
    codes = ((rows - mean) / step).round()
    codes = torch.minimum(torch.maximum(codes, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    read = torch.where(outliers, rows, codes * step + mean)
    stored = float(bits.mean()) + ROW_BITS / size + OUTLIER_BITS * float(outliers.float().mean())
    return read, stored
