"""What quantizing its keys and values costs a layer: errors of captured attention, by the quantizer that serves.

Errors are relative, over the sampled queries of all windows. With O the attention output of unquantized keys and values
and O' that of quantized ones, the output error is sqrt(sum |O' - O|^2 / sum |O|^2), per KV head over its query heads or
over all heads. With P and P' the attention weights, the score error is the mean over query rows of sum_t |P'_t - P_t|;
a row's weights, with that of its attention sink, sum to 1, so it is relative as it stands. With a recent window, each
query's newest tokens and the sink tokens at the head of its text are unquantized in O' and P'.

With the Gram of what reads the outputs, G, the squares are those of the output's numbers of a KV head's query heads
together: (O' - O)^T G (O' - O), and O^T G O. They count errors as the model does, those that round feedback makes too.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvtuner_tools.calibration.captured import CapturedLayer, RotaryRows, Window
from kvtuner_tools.calibration.rotation import apply_rotary, undo_rotary
from vllm_kvtuner.pages.codes import code_format
from vllm_kvtuner.pages.layout import QUANTIZED_BITS, QUANTIZED_PAIRS, PrecisionPair
from vllm_kvtuner.pages.transforms import (
    KEY,
    VALUE,
    LayerTransforms,
    RotaryTable,
    restore_keys,
    rotate_values,
    transform_keys,
)
from vllm_kvtuner.profile.profile import RecentWindow

Ranges = Sequence[float]
"""Factors on a row's range that round feedback tries."""


@dataclass(frozen=True)
class PairErrors:
    """Errors of one layer.

    Args:
        output: output error per quantized pair.
        output_per_head: the same per KV head.
        score: score error per key bits.
    """

    output: Mapping[PrecisionPair, float]
    output_per_head: Mapping[PrecisionPair, tuple[float, ...]]
    score: Mapping[int, float]


@dataclass(frozen=True)
class _Reads:
    """What the sampled queries of a window read, whatever the keys are quantized to.

    Args:
        num_queries: of the sample.
        rows: [num_kv_heads, group * num_queries, head_size] fp32, the queries times the layer's scale.
        scores: [num_kv_heads, group * num_queries, num_tokens] fp32, of unquantized keys; None where none is read so.
        is_hidden: [group * num_queries, num_tokens], whether the query does not see the token.
        is_unquantized: likewise, whether the token is a sink token or in the query's recent window; None for none.
    """

    num_queries: int
    rows: torch.Tensor
    scores: torch.Tensor | None
    is_hidden: torch.Tensor
    is_unquantized: torch.Tensor | None


class AttentionMeter:
    """Measures one layer on its windows.

    Holds the windows and, per window, num_queries num_heads num_tokens fp32 attention weights, with a recent window
    twice; a measurement takes up to four times the layer's keys beside that.

    Args:
        layer: the layer.
        windows: its windows.
        rotary: row t rotates a window's token t; None where the layer has no table.
        recent_window: tokens of each query whose keys and values are not quantized; None where all are.
        output_gram: [num_kv_heads, group, head_size, group, head_size] fp32, G; None for the identity.

    Attributes:
        windows: its windows.
    """

    def __init__(
        self,
        layer: CapturedLayer,
        windows: Sequence[Window],
        rotary: RotaryTable | None,
        recent_window: RecentWindow | None = None,
        output_gram: torch.Tensor | None = None,
    ) -> None:
        self._layer = layer
        self._gram = output_gram
        self.windows = windows
        self._rotary = rotary
        self._recent_window = recent_window
        self._lengths = [window.key.shape[0] for window in windows]
        self._keys = torch.cat([window.key for window in windows])
        self._values = torch.cat([window.value for window in windows])
        device = self._keys.device
        self._positions = torch.cat([torch.arange(length, device=device) for length in self._lengths])
        self._reads = [self._read(window) for window in windows]
        self._weights = self._attend(self._keys)
        values = self._split(self._values)
        self._outputs = [weights @ value for weights, value in zip(self._weights, values, strict=True)]
        self._norm = torch.stack([self._square(output) for output in self._outputs]).sum(0)

    def at_far_positions(self, rows: RotaryRows) -> "AttentionMeter":
        """The same windows as they would be at the far positions of the layer's rotary table."""
        moved = []
        for window in self.windows:
            positions = torch.arange(window.key.shape[0], device=window.key.device)
            key = apply_rotary(undo_rotary(window.key, positions, rows.near), positions, rows.far)
            query_before = undo_rotary(window.query, window.query_position, rows.near)
            query = apply_rotary(query_before, window.query_position, rows.far)
            moved.append(replace(window, key=key, query=query))
        return AttentionMeter(self._layer, moved, rows.far, self._recent_window, self._gram)

    def key_errors(self, transforms: LayerTransforms, bits: Sequence[int] = QUANTIZED_BITS) -> dict[int, float]:
        """Output error per key bits, with unquantized values."""
        quantized = self._quantized_keys(transforms, bits)
        return {each: self._error(self._attend(keys), self._values)[0] for each, keys in quantized}

    def value_errors(self, transforms: LayerTransforms, bits: Sequence[int] = QUANTIZED_BITS) -> dict[int, float]:
        """Output error per value bits, with unquantized keys."""
        quantized = self._quantized_values(transforms, bits)
        return {each: self._error(self._weights, values)[0] for each, values in quantized}

    def key_errors_by(self, transforms: LayerTransforms, bits: int, candidates: Sequence[Ranges]) -> list[float]:
        """As :meth:`key_errors` with each candidate's ranges in place of those of the keys' round feedback."""
        transforms = replace(transforms, rotary=self._rotary)
        assert transforms.key_feedback is not None
        rows = transform_keys(self._keys, self._positions, transforms)
        read = code_format(bits).round_trips(rows, transforms.key_feedback, candidates)
        keys = (restore_keys(each, self._positions, transforms) for each in read)
        return [self._error(self._attend(each), self._values)[0] for each in keys]

    def value_errors_by(self, transforms: LayerTransforms, bits: int, candidates: Sequence[Ranges]) -> list[float]:
        """Likewise of values."""
        assert transforms.value_feedback is not None
        read = code_format(bits).round_trips(
            rotate_values(self._values, transforms), transforms.value_feedback, candidates
        )
        return [self._error(self._weights, rotate_values(each, transforms))[0] for each in read]

    def pair_errors(self, transforms: LayerTransforms) -> PairErrors:
        """Errors of all quantized pairs."""
        values = dict(self._quantized_values(transforms, QUANTIZED_BITS))
        output, per_head, score = {}, {}, {}
        for k_bits, keys in self._quantized_keys(transforms, QUANTIZED_BITS):
            weights = self._attend(keys)
            difference = [(new - old).abs().sum(-1).flatten() for new, old in zip(weights, self._weights, strict=True)]
            score[k_bits] = float(torch.cat(difference).mean())
            for v_bits in QUANTIZED_BITS:
                pair = PrecisionPair(k_bits, v_bits)
                output[pair], per_head[pair] = self._error(weights, values[v_bits])
        return PairErrors(
            {pair: output[pair] for pair in QUANTIZED_PAIRS}, {pair: per_head[pair] for pair in QUANTIZED_PAIRS}, score
        )

    def _quantized_keys(self, transforms: LayerTransforms, wanted: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Per bits the keys as a reader gets them, in model space."""
        transforms = replace(transforms, rotary=self._rotary)
        rows = transform_keys(self._keys, self._positions, transforms)
        for bits in wanted:
            read = code_format(bits).round_trip(rows, transforms.range_search, transforms.feedback(KEY, bits))
            yield bits, restore_keys(read, self._positions, transforms)

    def _quantized_values(
        self, transforms: LayerTransforms, wanted: Sequence[int]
    ) -> Iterator[tuple[int, torch.Tensor]]:
        rows = rotate_values(self._values, transforms)
        for bits in wanted:
            read = code_format(bits).round_trip(rows, transforms.range_search, transforms.feedback(VALUE, bits))
            yield bits, rotate_values(read, transforms)

    def _attend(self, keys: torch.Tensor) -> list[torch.Tensor]:
        """Attention weights of the sampled queries, per window [num_kv_heads, group * num_queries, num_tokens]."""
        layer = self._layer
        weights = []
        for read, key in zip(self._reads, keys.split(self._lengths), strict=True):
            scores = read.rows @ key.permute(1, 2, 0)
            if read.is_unquantized is not None and read.scores is not None:
                scores = torch.where(read.is_unquantized, read.scores, scores)
            if layer.logits_soft_cap > 0:
                scores = layer.logits_soft_cap * torch.tanh(scores / layer.logits_soft_cap)
            scores = scores.masked_fill(read.is_hidden, -torch.inf).unflatten(1, (-1, read.num_queries))
            weights.append(layer.softmax(scores).flatten(1, 2))
        return weights

    def _error(self, weights: list[torch.Tensor], values: torch.Tensor) -> tuple[float, tuple[float, ...]]:
        """Output error over all heads, and per KV head."""
        squares = []
        for read, attention, value, exact, output in zip(
            self._reads, weights, self._split(values), self._split(self._values), self._outputs, strict=True
        ):
            got = attention @ value
            if read.is_unquantized is not None:
                got += (attention * read.is_unquantized) @ (exact - value)
            squares.append(self._square(got - output))
        square = torch.stack(squares).sum(0)
        per_head = (square / self._norm).sqrt()
        return float((square.sum() / self._norm.sum()).sqrt()), tuple(per_head.tolist())

    def _square(self, outputs: torch.Tensor) -> torch.Tensor:
        """[num_kv_heads], sums of squares of [num_kv_heads, group * num_queries, head_size]."""
        if self._gram is None:
            return outputs.square().sum((1, 2))
        heads, group, size = self._gram.shape[:3]
        together = outputs.view(heads, group, -1, size).transpose(1, 2).flatten(2)
        return ((together @ self._gram.flatten(3).flatten(1, 2)) * together).sum((1, 2)).clamp(min=0)

    def _split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Per window [num_kv_heads, num_tokens, head_size]."""
        return [value.transpose(0, 1) for value in values.split(self._lengths)]

    def _read(self, window: Window) -> _Reads:
        layer, recent = self._layer, self._recent_window
        num_queries = window.query.shape[0]
        grouped = window.query.view(num_queries, layer.num_kv_heads, -1, layer.head_size).permute(1, 2, 0, 3)
        group = grouped.shape[1]
        tokens = torch.arange(window.key.shape[0], device=window.key.device)
        distance = window.query_position[:, None] - tokens
        is_hidden = distance < 0
        if layer.sliding_window is not None:
            is_hidden = is_hidden | (distance >= layer.sliding_window)
        is_unquantized = None
        if recent is not None:
            is_sink = tokens < recent.sink_tokens
            is_unquantized = ((distance >= 0) & ((distance < recent.tokens) | is_sink)).repeat(group, 1)
        rows = (grouped * layer.scale).flatten(1, 2)
        scores = None if recent is None else rows @ window.key.permute(1, 2, 0)
        return _Reads(num_queries, rows, scores, is_hidden.repeat(group, 1), is_unquantized)
