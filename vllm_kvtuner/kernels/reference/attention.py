"""Attention on packed pages and on plain tensors, in torch; on a CPU, the implementation itself.

Each function carries the name of the kernel it defines plus ``_ref`` and takes the same arguments. Arithmetic is
fp32; there is no Python loop over tokens.
"""

import torch

from vllm_kvtuner.pages.codes import dequantize
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import (
    LayerTransforms,
    fold_query,
    rotate_values,
    rotated_offset,
)
from vllm_kvtuner.pages.views import page_parts

BATCH_TOKENS = 1 << 15
"""Cached tokens of several requests that paged attention dequantizes at a time; one longer request goes alone."""
SCORES_PER_SLICE = 1 << 24
"""Scores of one head group held at a time when many queries attend."""


def paged_attention_ref(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
    layout: PageLayout,
    transforms: LayerTransforms,
    output: torch.Tensor,
    sliding_window: int | None = None,
    logits_soft_cap: float = 0.0,
    skip_newest: int = 0,
    lse: torch.Tensor | None = None,
    skip_first: int = 0,
) -> None:
    """Attention of each request's newest tokens over its cached tokens, themselves included, on packed pages.

    Token i of the n query tokens of a request stands at position seq_len - n + i and sees the tokens up to itself
    (with a sliding window, the newest ``sliding_window`` of them). A request of seq_len 0 is padding: its rows of
    output become 0.

    Args:
        query: [num_tokens, num_heads, head_size].
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] uint8.
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32, tokens in the cache, the query's included.
        query_start_loc: [num_reqs + 1] int32.
        max_query_len: the longest query, at most 16 in the kernel; no limit here.
        scale: factor on the logits, 1 / sqrt(head_size) as a rule.
        layout: the layer's page.
        transforms: the layer's transforms.
        output: [num_tokens, num_heads, head_size], written in place.
        sliding_window: tokens a query sees, itself included, or None for all.
        logits_soft_cap: c > 0 replaces each logit x by c tanh(x / c).
        skip_newest: tokens, the newest of those a query sees and itself the first, that are left out: another segment
            holds them. With a sliding window they count as part of it.
        lse: [num_heads, num_tokens] fp32, written in place: log-sum-exp of each row's logits, by which segments
            merge; -inf where a query sees nothing (its output is 0).
        skip_first: tokens of a request, from its first on, that are left out likewise.
    """
    num_heads, head_size = query.shape[1:]
    num_kv_heads = kv_cache.shape[1]
    folded = fold_query(query, transforms, num_kv_heads) * scale
    parts = page_parts(kv_cache, layout)
    lens, starts = seq_lens.tolist(), query_start_loc.tolist()
    for begin, end in _request_batches(lens):
        num_reqs, max_len = end - begin, max(lens[begin:end])
        first, last = starts[begin], starts[end]
        if max_len == 0:
            output[first:last] = 0
            if lse is not None:
                lse[:, first:last] = -torch.inf
            continue
        blocks = block_table[begin:end, : -(-max_len // layout.block_size)].long()
        # Table entries beyond a request's length are stale: point them at a block that exists; the mask drops them.
        needed = torch.arange(blocks.shape[1], device=blocks.device) * layout.block_size
        blocks = torch.where(needed < seq_lens[begin:end, None], blocks, 0)
        query_lens = torch.tensor([starts[r + 1] - starts[r] for r in range(begin, end)], device=query.device)
        # [num_reqs, max_blocks, num_kv_heads, block_size, ...] to [num_reqs, num_kv_heads, tokens, head_size]. Bytes
        # beyond a request's length, and in blocks that have left its sliding window (which may be another request's,
        # in another format), may be anything, NaN included, which a probability of 0 would not silence.
        tokens = torch.arange(blocks.shape[1] * layout.block_size, device=blocks.device)
        filled = tokens < seq_lens[begin:end, None]
        if sliding_window is not None:
            filled &= tokens > (seq_lens[begin:end] - query_lens - sliding_window)[:, None]
        filled = filled.view(num_reqs, blocks.shape[1], 1, layout.block_size, 1)
        keys, values = (
            dequantize(codes[blocks], meta[blocks].where(filled, 0), bits)
            .permute(0, 2, 1, 3, 4)
            .reshape(num_reqs, num_kv_heads, -1, head_size)
            for codes, meta, bits in ((parts[0], parts[2], layout.k_bits), (parts[1], parts[3], layout.v_bits))
        )
        rows = int(query_lens.max())
        index = torch.arange(rows, device=query.device)
        present = index < query_lens[:, None]
        token = (query_start_loc[begin:end, None].long() + index)[present]

        padded = torch.zeros(num_reqs, rows, num_heads, head_size, device=query.device)
        padded[present] = folded[token]
        group = num_heads // num_kv_heads
        heads = padded.view(num_reqs, rows, num_kv_heads, group, head_size).permute(0, 2, 3, 1, 4)
        scores = heads.reshape(num_reqs, num_kv_heads, group * rows, head_size) @ keys.transpose(-1, -2)
        scores = scores.view(num_reqs, num_kv_heads, group, rows, -1)
        if transforms.key_offset is not None:
            raw = torch.zeros_like(padded)
            raw[present] = query[token].float() * scale
            raw = raw.view(num_reqs, rows, num_kv_heads, group, head_size)
            offset = rotated_offset(transforms, torch.arange(max_len, device=query.device))
            scores[..., :max_len] += torch.einsum("rnkgd,tkd->rkgnt", raw, offset)
        position = seq_lens[begin:end, None].long() - query_lens[:, None] + index
        visible = _visible(position, tokens, sliding_window, skip_newest) & (tokens >= skip_first)
        probabilities, sums = _softmax(scores, visible[:, None, None], logits_soft_cap)
        result = probabilities.view(num_reqs, num_kv_heads, group * rows, -1) @ values
        result = result.view(num_reqs, num_kv_heads, group, rows, head_size).permute(0, 3, 1, 2, 4)
        result = result.reshape(num_reqs, rows, num_heads, head_size)
        output[token] = rotate_values(result[present], transforms).to(output.dtype)
        if lse is not None:
            lse[:, token] = sums.reshape(num_reqs, num_heads, rows).transpose(1, 2)[present].T


def attention_ref(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    output: torch.Tensor,
    sliding_window: int | None = None,
    logits_soft_cap: float = 0.0,
    skip_newest: int = 0,
    lse: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
) -> None:
    """Causal attention of one request's newest tokens over contiguous keys and values, in model space.

    Args:
        query: [num_queries, num_heads, head_size], the newest tokens of the request.
        key: [num_keys, num_kv_heads, head_size], num_keys >= num_queries, the last num_queries being the queries' own.
        value: as key.
        scale: factor on the logits.
        output: [num_queries, num_heads, head_size], written in place.
        sliding_window: as in :func:`paged_attention_ref`.
        logits_soft_cap: as in :func:`paged_attention_ref`.
        skip_newest: as in :func:`paged_attention_ref`.
        lse: [num_heads, num_queries], as in :func:`paged_attention_ref`.
        visible: [num_queries, num_keys] bool, which keys each query sees, where these are not consecutive tokens; the
            windows do not count then.
    """
    num_queries, num_heads, head_size = query.shape
    num_keys, num_kv_heads = key.shape[:2]
    group = num_heads // num_kv_heads
    heads = query.float().view(num_queries, num_kv_heads, group, head_size).permute(1, 2, 0, 3) * scale
    keys = key.float().permute(1, 2, 0)[:, None]
    values = value.float().transpose(0, 1)[:, None]
    step = max(1, SCORES_PER_SLICE // (num_heads * num_keys))
    for begin in range(0, num_queries, step):
        rows = heads[:, :, begin : begin + step]
        end = begin + rows.shape[2]
        stop = num_keys - num_queries + end
        position = torch.arange(stop, device=query.device)
        if visible is None:
            seen = _visible(position[stop - rows.shape[2] :], position, sliding_window, skip_newest)
        else:
            seen = visible[begin:end, :stop]
        probabilities, sums = _softmax(rows @ keys[..., :stop], seen, logits_soft_cap)
        result = (probabilities @ values[:, :, :stop]).permute(2, 0, 1, 3)
        output[begin:end] = result.reshape(end - begin, num_heads, head_size).to(output.dtype)
        if lse is not None:
            lse[:, begin:end] = sums.reshape(num_heads, end - begin)


def merge_segments_ref(
    outputs: tuple[torch.Tensor, torch.Tensor], lses: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor
) -> None:
    """Attention over the tokens of two segments from that over each, in place.

    Args:
        outputs: two of [num_tokens, num_heads, head_size].
        lses: two of [num_heads, num_tokens] fp32; a row may be -inf in one or (padding) in both.
        output: as the outputs.
    """
    weights = torch.softmax(torch.stack(lses), dim=0).nan_to_num(0.0).transpose(1, 2).unsqueeze(-1)
    output.copy_(weights[0] * outputs[0].float() + weights[1] * outputs[1].float())


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


def _visible(
    position: torch.Tensor, key_position: torch.Tensor, sliding_window: int | None, skip_newest: int
) -> torch.Tensor:
    """[..., num_keys] bool: which keys a query at ``position`` [...] sees."""
    distance = position[..., None] - key_position
    visible = distance >= skip_newest
    return visible if sliding_window is None else visible & (distance < sliding_window)


def _softmax(scores: torch.Tensor, visible: torch.Tensor, soft_cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the visible scores and their log-sum-exp; a row that sees nothing becomes 0, and -inf."""
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0), torch.logsumexp(scores, dim=-1)
