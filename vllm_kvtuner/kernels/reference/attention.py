"""Attention on packed pages and on plain tensors, in torch; on a CPU without a C++ compiler, what serves.

Each function carries the name of the kernel it defines plus ``_ref`` and takes the same arguments. Arithmetic is
fp32; there is no Python loop over tokens.
"""

import torch

from vllm_kvtuner.kernels.contract import AttentionShape, Pages, Queries, Segment, Span
from vllm_kvtuner.pages.transforms import fold_query, rotate_values, rotated_offset
from vllm_kvtuner.pages.views import page_sides

BATCH_TOKENS = 1 << 15
"""Cached tokens of several requests that paged attention dequantizes at a time; one longer request goes alone."""
SCORES_PER_SLICE = 1 << 24
"""Scores of one head group held at a time when many queries attend."""


def paged_attention_ref(
    query: torch.Tensor,
    queries: Queries,
    pages: Pages,
    shape: AttentionShape,
    span: Span,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.PagedAttention`, queries of any length."""
    folded = fold_query(query, pages.transforms, shape.num_kv_heads) * shape.scale
    lens, starts = queries.seq_lens.tolist(), queries.query_start_loc.tolist()
    for begin, end in _request_batches(lens):
        first, last = starts[begin], starts[end]
        if max(lens[begin:end]) == 0:
            output[first:last] = 0
            if lse is not None:
                lse[:, first:last] = -torch.inf if pages.sinks is None else pages.sinks[:, None]
            continue
        batch = _Batch(queries, begin, end, pages.layout.block_size)
        token = batch.query_tokens
        keys, values = batch.dequantize(pages, span)
        padded = batch.pad(folded[token], shape)
        scores = padded.flatten(2, 3) @ keys.transpose(-1, -2)
        scores = scores.view(*padded.shape[:4], -1)
        if pages.transforms.key_offset is not None:
            raw = batch.pad(query[token].float() * shape.scale, shape)
            if pages.positions is None:
                offset = rotated_offset(pages.transforms, torch.arange(batch.max_len, device=query.device))
                scores[..., : batch.max_len] += torch.einsum("rkgnd,tkd->rkgnt", raw, offset)
            else:
                positions = batch.positions_of_tokens(pages.positions, pages.layout.block_size)
                offset = rotated_offset(pages.transforms, positions.flatten(1)).unflatten(0, positions.shape[1:])
                scores += torch.einsum("rkgnd,rtkd->rkgnt", raw, offset)
        visible = _visible(batch.positions, batch.tokens, span)
        probabilities, sums = _softmax(scores, visible[:, None, None], shape.logits_soft_cap)
        result = batch.unpad((probabilities.flatten(2, 3) @ values).view(padded.shape))
        seen = Segment(result, batch.unpad(sums[..., None])[..., 0].T)
        if pages.sinks is not None:
            seen = _with_sinks(seen, pages.sinks)
        output[token] = rotate_values(seen.output, pages.transforms).to(output.dtype)
        if lse is not None:
            lse[:, token] = seen.lse


class _Batch:
    """Requests ``begin .. end - 1`` of a step, padded to the longest: [request, KV head, group, query, ...]."""

    def __init__(self, queries: Queries, begin: int, end: int, block_size: int) -> None:
        device = queries.block_table.device
        self.seq_lens = queries.seq_lens[begin:end]
        starts = queries.query_start_loc[begin : end + 1].long()
        self.query_lens = starts.diff()
        self.max_len = int(self.seq_lens.max())
        blocks = queries.block_table[begin:end, : -(-self.max_len // block_size)].long()
        # Table entries beyond a request's length are stale: point them at a block that exists; the mask drops them.
        needed = torch.arange(blocks.shape[1], device=device) * block_size
        self.blocks = torch.where(needed < self.seq_lens[:, None], blocks, 0)
        self.tokens = torch.arange(blocks.shape[1] * block_size, device=device)
        index = torch.arange(int(self.query_lens.max()), device=device)
        self.present = index < self.query_lens[:, None]
        self.query_tokens = (starts[:-1, None] + index)[self.present]
        self.positions = self.seq_lens[:, None].long() - self.query_lens[:, None] + index

    def positions_of_tokens(self, table: torch.Tensor, block_size: int) -> torch.Tensor:
        """[num_axes, requests, tokens] of a table by slot; of tokens that are not there, whatever it holds."""
        slots = self.blocks[:, :, None] * block_size + torch.arange(block_size, device=table.device)
        return table[slots.flatten(1)].permute(2, 0, 1)

    def dequantize(self, pages: Pages, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [requests, num_kv_heads, tokens, head_size] fp32.

        Bytes of tokens that no query sees may be anything, NaN included, which a probability of 0 would not silence:
        beyond what the newest query sees (where a recent window serves the newest tokens, they may not be packed yet),
        and in blocks that have left a sliding window (which may be another request's, in another format).
        """
        filled = self.tokens < (self.seq_lens - span.skip_newest)[:, None]
        if span.sliding_window is not None:
            filled &= self.tokens > (self.seq_lens - self.query_lens - span.sliding_window)[:, None]
        filled = filled.view(*self.blocks.shape, 1, pages.layout.block_size, 1)
        keys, values = (
            side.format.dequantize(side.codes[self.blocks], side.meta[self.blocks].where(filled, 0))
            .permute(0, 2, 1, 3, 4)
            .flatten(2, 3)
            for side in page_sides(pages.kv_cache, pages.layout)
        )
        return keys, values

    def pad(self, rows: torch.Tensor, shape: AttentionShape) -> torch.Tensor:
        """[requests, num_kv_heads, group, queries, head_size] of rows [query tokens, num_heads, head_size]."""
        padded = torch.zeros(*self.present.shape, *rows.shape[1:], device=rows.device)
        padded[self.present] = rows
        return padded.unflatten(2, (shape.num_kv_heads, shape.group)).permute(0, 2, 3, 1, 4)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`pad`, for any last dimension."""
        return padded.permute(0, 3, 1, 2, 4).flatten(2, 3)[self.present]


def attention_ref(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shape: AttentionShape,
    visible: Span | torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> None:
    """Causal attention of one request's newest tokens over contiguous keys and values, in model space.

    Args:
        query: [num_queries, num_heads, head_size], the newest tokens of the request.
        key: [num_keys, num_kv_heads, head_size], num_keys >= num_queries, the last num_queries being the queries' own.
        value: as key.
        shape: of the layer.
        visible: what each query sees: a span of consecutive tokens, or [num_queries, num_keys] bool where keys are not
            consecutive tokens.
        output: [num_queries, num_heads, head_size], written in place.
        lse: [num_heads, num_queries], as in :func:`paged_attention_ref`.
    """
    num_queries, num_keys = query.shape[0], key.shape[0]
    heads = query.float().unflatten(1, (shape.num_kv_heads, shape.group)).permute(1, 2, 0, 3) * shape.scale
    keys = key.float().permute(1, 2, 0)[:, None]
    values = value.float().transpose(0, 1)[:, None]
    step = max(1, SCORES_PER_SLICE // (shape.num_heads * num_keys))
    for begin in range(0, num_queries, step):
        rows = heads[:, :, begin : begin + step]
        end = begin + rows.shape[2]
        stop = num_keys - num_queries + end
        if isinstance(visible, Span):
            position = torch.arange(stop, device=query.device)
            seen = _visible(position[stop - rows.shape[2] :], position, visible)
        else:
            seen = visible[begin:end, :stop]
        probabilities, sums = _softmax(rows @ keys[..., :stop], seen, shape.logits_soft_cap)
        result = (probabilities @ values[:, :, :stop]).permute(2, 0, 1, 3)
        output[begin:end] = result.flatten(1, 2).to(output.dtype)
        if lse is not None:
            lse[:, begin:end] = sums.flatten(0, 1)


def unmasked_attention_ref(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shape: AttentionShape,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attention over keys and values that all queries see, in model space; of no keys it is 0, and -inf.

    Args:
        query: [num_queries, num_heads, head_size].
        key: [num_keys, num_kv_heads, head_size].
        value: as key.
        shape: of the layer.
        output: [num_queries, num_heads, head_size], written in place.
        lse: [num_heads, num_queries] fp32, likewise.
    """
    heads = query.float().unflatten(1, (shape.num_kv_heads, shape.group)).permute(1, 2, 0, 3) * shape.scale
    keys, values = key.float().permute(1, 2, 0)[:, None], value.float().transpose(0, 1)[:, None]
    step = max(1, SCORES_PER_SLICE // (shape.num_heads * max(1, key.shape[0])))
    for begin in range(0, query.shape[0], step):
        scores = heads[:, :, begin : begin + step] @ keys
        seen = torch.ones(scores.shape[-1], dtype=torch.bool, device=query.device)
        probabilities, sums = _softmax(scores, seen, shape.logits_soft_cap)
        output[begin : begin + step] = (probabilities @ values).permute(2, 0, 1, 3).flatten(1, 2).to(output.dtype)
        lse[:, begin : begin + step] = sums.flatten(0, 1)


def merge_segments_ref(first: Segment, second: Segment, output: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Attention over the tokens of two segments from that over each, by log-sum-exp, in place.

    Args:
        first: a segment; a row's log-sum-exp may be -inf in one or (padding) in both. +inf counts as -inf.
        second: another.
        output: as the segments' outputs.
        lse: as the segments', of both together, if wanted.
    """
    sums = torch.stack([first.lse, second.lse])
    sums = torch.where(sums.isposinf(), -torch.inf, sums)
    weights = torch.softmax(sums, dim=0).nan_to_num(0.0).transpose(1, 2).unsqueeze(-1)
    merged = weights[0] * first.output.float() + weights[1] * second.output.float()
    if lse is not None:
        lse.copy_(sums.logsumexp(0))
    output.copy_(merged)


def _with_sinks(segment: Segment, sinks: torch.Tensor) -> Segment:
    """A segment that counts attention sinks [num_heads] too: a segment more, of output 0."""
    both = Segment.into(torch.empty_like(segment.output))
    nothing = torch.zeros(1, device=sinks.device).expand(segment.output.shape)
    merge_segments_ref(segment, Segment(nothing, sinks.float()[:, None].expand_as(segment.lse)), both.output, both.lse)
    return both


def _request_batches(lens: list[int]) -> list[tuple[int, int]]:
    """Consecutive requests to dequantize together: at most BATCH_TOKENS when padded to their longest, or one."""
    batches, begin = [], 0
    while begin < len(lens):
        end, longest = begin + 1, lens[begin]
        while end < len(lens) and max(longest, lens[end]) * (end + 1 - begin) <= BATCH_TOKENS:
            longest = max(longest, lens[end])
            end += 1
        batches.append((begin, end))
        begin = end
    return batches


def _visible(position: torch.Tensor, key_position: torch.Tensor, span: Span) -> torch.Tensor:
    """[..., num_keys] bool: which keys a query at ``position`` [...] sees."""
    distance = position[..., None] - key_position
    visible = (distance >= span.skip_newest) & (key_position >= span.skip_first)
    return visible if span.sliding_window is None else visible & (distance < span.sliding_window)


def _softmax(scores: torch.Tensor, visible: torch.Tensor, soft_cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the visible scores and their log-sum-exp; a row that sees nothing becomes 0, and -inf."""
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0), torch.logsumexp(scores, dim=-1)
