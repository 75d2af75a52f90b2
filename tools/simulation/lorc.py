"""LoRC (Zhang et al. 2024, arXiv 2410.03111): keys and values of low rank, by their projections' weights."""

from collections.abc import Mapping, Sequence

import torch

from kvtuner_tools.calibration.rotation import apply_rotary, undo_rotary
from kvtuner_tools.simulation.cache import UNQUANTIZED_BITS, Layer, Method, Rows, Storage, View

WIDEST = 1.25
"""Rank of the layers that keep most, over the mean rank; the paper gives its own per model."""

Bases = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Lorc(Method):
    """Keys before RoPE and values in the basis of their weights' largest singular vectors, all heads together.

    W = U S V^T of rank r stores r numbers x V S of a token, and gives back their product with U^T: a projection of the
    row onto U. A bias of keys is added when they are read. Ranks fall with the depth (the progressive strategy): with
    the condition numbers of W_k and W_v multiplied up from a layer to the last, the layer keeps

        d = d_max (1 - (max log c - log c) / (max log c - min log c) (1 - d_min / d_max))

    Here d_max is WIDEST times the mean rank, at most all, and d_min gives that mean.

    Args:
        share: of all dimensions that are kept, on average.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"lorc: share must be in (0, 1], but got {share}")
        self.label = f"lorc:{share:g}"
        self._share = share

    def prepare_all(self, layers: Sequence[Layer], texts: Mapping[int, Sequence[Rows]]) -> dict[int, Bases]:
        found = []
        logs = []
        for layer in layers:
            assert layer.weights is not None
            key, value, bias = layer.weights()
            key_basis, key_values, _ = torch.linalg.svd(key, full_matrices=False)
            value_basis, value_values, _ = torch.linalg.svd(value, full_matrices=False)
            logs.append(sum(float((each[0] / each[-1].clamp(min=1e-10)).log()) for each in (key_values, value_values)))
            found.append((key_basis, value_basis, bias))
        shares = progressive_shares(logs, self._share)
        bases = {}
        for layer, share, (key_basis, value_basis, bias) in zip(layers, shares, found, strict=True):
            rank = max(1, round(share * key_basis.shape[0]))
            bases[layer.index] = key_basis[:, :rank], value_basis[:, :rank], bias
        return bases

    def view(self, layer: Layer, statics: Bases, rows: Rows) -> View:
        key_basis, value_basis, bias = statics
        key = rows.key if layer.rotary is None else undo_rotary(rows.key, rows.positions, layer.rotary)
        key = ((key.flatten(1) - bias) @ key_basis).half().float() @ key_basis.T + bias
        key = key.view_as(rows.key)
        if layer.rotary is not None:
            key = apply_rotary(key, rows.positions, layer.rotary)
        value = (rows.value.flatten(1) @ value_basis).half().float() @ value_basis.T
        share = (key_basis.shape[1] + value_basis.shape[1]) / 2 / key_basis.shape[0]
        return View(key, value.view_as(rows.value), Storage(UNQUANTIZED_BITS * share))


def progressive_shares(logs: Sequence[float], share: float) -> list[float]:
    """Each layer's share of dimensions, their mean ``share``.

    Args:
        logs: of each layer's condition numbers' product.
        share: the mean.
    """
    cumulative = [sum(logs[place:]) for place in range(len(logs))]
    low, high = min(cumulative), max(cumulative)
    depth = [(high - each) / (high - low) if high > low else 0.0 for each in cumulative]
    widest = min(1.0, WIDEST * share)
    mean = sum(depth) / len(depth)
    if mean == 0:
        return [share] * len(logs)
    narrowest = widest - (widest - share) / mean
    if narrowest <= 0:
        widest, narrowest = share / (1 - mean), 0.0
    return [widest - each * (widest - narrowest) for each in depth]
