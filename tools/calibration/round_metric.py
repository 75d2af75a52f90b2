"""What errors of packed rows cost the model, from captured attention alone: the metrics that round feedback rests on.

An error e of the key at position j moves the logit of a query i by q_i . e, and its head's output by p_ij (v_j - o_i)
times that. An error e of a value moves the output by p_ij e, in all heads that share the value. What the model makes of
an output's error is a quadratic form: its Gram, G_hh' = W_h^T M W_h', with W_h the head's part of the output projection
and M that of what reads the residual stream after it. So per KV head,

    keys      sum over queries and heads of (sum_j p_ij^2 |v_j - o_i|_G^2) q q^T
    values    sum over pairs of heads of (sum_ij p_ijh p_ijh') G_hh'

over those tokens j that a query reads packed. Queries are turned back by the position they attend to, the mean j by
weight p_ij^2, which gives the metric of keys before RoPE. That of keys after it is its mean over the positions served.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from kvtuner_tools.calibration.captured import CapturedLayer, Turns, Window
from kvtuner_tools.calibration.rotation import undo_rotary
from vllm_kvtuner.pages.transforms import LayerTransforms, RotaryTable, hadamard
from vllm_kvtuner.profile.profile import RecentWindow

QUERIES_AT_ONCE = 128
"""Queries whose attention weights are held at once, so that long windows need no more memory."""
DAMPING = 0.02
"""Part of a metric's mean diagonal that is added to it, before the transforms: text is finite."""
PACKED_DAMPING = 1e-3
"""The same after the transforms, whose factors may have made the metric nearly singular."""


@dataclass(frozen=True)
class RoundMetrics:
    """Metrics of a layer's keys and values, fp64 and symmetric.

    Args:
        keys: [num_kv_heads, head_size, head_size], before RoPE; from :meth:`at_positions` on after it.
        values: likewise.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __add__(self, other: "RoundMetrics") -> "RoundMetrics":
        """Of the queries of both."""
        return RoundMetrics(self.keys + other.keys, self.values + other.values)

    def at_positions(self, turns: Turns | None) -> "RoundMetrics":
        """With that of keys after RoPE, averaged over positions; as it is where nothing rotates."""
        return self if turns is None else replace(self, keys=turns.mean(self.keys))

    def packed(self, transforms: LayerTransforms) -> "RoundMetrics":
        """Damped, for rows after the transforms, as pages hold them."""
        factors = transforms.key_equalization
        keys = _packed(_damped(self.keys, DAMPING), factors, transforms.key_hadamard)
        return RoundMetrics(keys, _packed(_damped(self.values, DAMPING), None, transforms.value_hadamard))


def round_metrics(
    layer: CapturedLayer,
    windows: Iterable[Window],
    output_gram: torch.Tensor,
    rotary: RotaryTable | None,
    recent_window: RecentWindow | None,
) -> RoundMetrics:
    """Sums over all queries of the windows, which hold every token's.

    Takes, beside a window, about 10 num_heads QUERIES_AT_ONCE num_tokens numbers in fp32.

    Args:
        layer: the layer.
        windows: its windows.
        output_gram: [num_kv_heads, group, head_size, group, head_size], G of each KV head's query heads.
        rotary: row t rotates a window's token t; None where nothing does.
        recent_window: tokens of each query that it does not read packed; None where it reads all so.
    """
    heads, size, group = layer.num_kv_heads, layer.head_size, layer.num_heads // layer.num_kv_heads
    gram = output_gram.float()
    own = gram.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [num_kv_heads, group, head_size, head_size]
    keys = torch.zeros(heads, size, size, dtype=torch.float64, device=gram.device)
    masses = torch.zeros(heads, group, group, dtype=torch.float64, device=gram.device)
    for window in windows:
        value = window.value.transpose(0, 1)[:, None]  # [num_kv_heads, 1, num_tokens, head_size]
        value_norm = ((value @ own) * value).sum(-1)
        positions = torch.arange(window.key.shape[0], device=gram.device).float()
        for reads in _reads(layer, window, recent_window):
            packed = reads.weights * reads.is_packed
            masses += torch.einsum("hgqt,hkqt->hgk", packed, packed)
            square = (packed * reads.slopes).square()
            mass = square.sum(-1)
            # sum_j p^2 |v_j - o|_G^2, multiplied out.
            cross = ((square @ value) * (reads.outputs @ own)).sum(-1)
            norm = ((reads.outputs @ own) * reads.outputs).sum(-1)
            cost = (square * value_norm[:, :, None]).sum(-1) - 2 * cross + mass * norm
            attended = (square @ positions / mass.clamp(min=torch.finfo(torch.float32).tiny)).round().long()
            queries = reads.queries
            if rotary is not None:
                flat = queries.reshape(-1, 1, size)
                queries = undo_rotary(flat, attended.flatten(), rotary).view(queries.shape)
            rows = (queries * cost.clamp(min=0).sqrt()[..., None]).flatten(1, 2)
            keys += rows.mT @ rows
    values = torch.einsum("hgk,hgikj->hij", masses, gram.double())
    return RoundMetrics(_symmetric(keys), _symmetric(values))


@dataclass(frozen=True)
class _Reads:
    """What some queries of a window read.

    Args:
        queries: [num_kv_heads, group, num_queries, head_size] fp32.
        weights: [num_kv_heads, group, num_queries, num_tokens] fp32, of attention.
        slopes: likewise, or 1.0: change of a logit with q . k, but for the layer's scale.
        is_packed: [num_queries, num_tokens], whether the query reads the token packed.
        outputs: [num_kv_heads, group, num_queries, head_size] fp32.
    """

    queries: torch.Tensor
    weights: torch.Tensor
    slopes: torch.Tensor | float
    is_packed: torch.Tensor
    outputs: torch.Tensor


def _reads(layer: CapturedLayer, window: Window, recent_window: RecentWindow | None) -> Iterator[_Reads]:
    keys, values = window.key.permute(1, 2, 0)[:, None], window.value.transpose(0, 1)[:, None]
    tokens = torch.arange(window.key.shape[0], device=keys.device)
    for query, position in zip(
        window.query.split(QUERIES_AT_ONCE), window.query_position.split(QUERIES_AT_ONCE), strict=True
    ):
        grouped = query.view(len(query), layer.num_kv_heads, -1, layer.head_size).permute(1, 2, 0, 3)
        logits = (grouped * layer.scale) @ keys
        slopes: torch.Tensor | float = 1.0
        if layer.logits_soft_cap > 0:
            capped = torch.tanh(logits / layer.logits_soft_cap)
            logits, slopes = layer.logits_soft_cap * capped, 1.0 - capped.square()
        distance = position[:, None] - tokens
        seen = distance >= 0
        if layer.sliding_window is not None:
            seen &= distance < layer.sliding_window
        is_packed = seen
        if recent_window is not None:
            is_packed = seen & (distance >= recent_window.tokens) & (tokens >= recent_window.sink_tokens)
        weights = layer.softmax(logits.masked_fill(~seen, -torch.inf))
        yield _Reads(grouped, weights, slopes, is_packed, weights @ values)


def _packed(metric: torch.Tensor, factors: torch.Tensor | None, is_rotated: bool) -> torch.Tensor:
    """Of errors z that the way back from a page makes factors * (Hadamard z)."""
    if factors is not None:
        metric = factors.double()[:, :, None] * metric * factors.double()[:, None]
    if is_rotated:
        turn = hadamard(metric.shape[-1], metric.device, torch.float64)
        metric = turn @ metric @ turn
    return _symmetric(_damped(metric, PACKED_DAMPING))


def _damped(metric: torch.Tensor, part: float) -> torch.Tensor:
    size = metric.shape[-1]
    level = metric.diagonal(dim1=1, dim2=2).mean(1)
    # A head whose rows nobody reads packed costs nothing, whatever its errors: nearest rounding is as good as any.
    level = torch.where(level > 0, part * level, 1.0)
    return metric + level[:, None, None] * torch.eye(size, dtype=metric.dtype, device=metric.device)


def _symmetric(metric: torch.Tensor) -> torch.Tensor:
    return (metric + metric.mT) / 2
