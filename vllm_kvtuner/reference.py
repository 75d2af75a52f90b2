"""Reference of every kernel in torch, on the packed bytes of layout.py; on a CPU, the implementation itself.

Each function carries the name of the kernel it defines plus ``_ref`` and takes the same arguments. Arithmetic is
fp32; there is no Python loop over tokens.
"""

import torch

from vllm_kvtuner.layout import META_BYTES, PageLayout, PrecisionPair
from vllm_kvtuner.transforms import (
    LayerTransforms,
    fold_query,
    restore_keys,
    rotate_values,
    rotated_offset,
    transform_keys,
)

RANGE_FACTORS = tuple(1.0 - 0.05 * step for step in range(11))
"""Factors 1, 0.95, ..., 0.5 that range search shrinks a row's [min, max] by, about its middle."""
FP16_MAX = 65504.0
BATCH_TOKENS = 1 << 15
"""Cached tokens of several requests that paged attention dequantizes at a time; one longer request goes alone."""
SCORES_PER_SLICE = 1 << 24
"""Scores of one head group held at a time when many queries attend."""


def quantize_rows(
    rows: torch.Tensor, bits: int, range_search: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-row asymmetric quantization: row ~ scale * code + minimum.

    Scale and minimum are rounded to fp16 before the codes are taken, so that codes match what a reader multiplies
    by; a constant row gets scale 0.

    Args:
        rows: [..., head_size], any float dtype.
        bits: 2, 4 or 8.
        range_search: among RANGE_FACTORS take the range with the least squared error, if bits < 8.

    Returns:
        codes uint8 [..., head_size], scale fp16 [...], minimum fp16 [...].
    """
    rows = rows.float()
    low, high = rows.amin(-1), rows.amax(-1)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    best_error = torch.empty(0)
    for factor in RANGE_FACTORS if range_search and bits < 8 else (1.0,):
        shrink = (high - low) * (0.5 * (1.0 - factor))
        scale = ((high - low) * (factor / (2**bits - 1))).clamp(max=FP16_MAX).half()
        minimum = (low + shrink).clamp(-FP16_MAX, FP16_MAX).half()
        step, base = scale.float()[..., None], minimum.float()[..., None]
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        codes = ((rows - base) * inverse + 0.5).floor().clamp(0, 2**bits - 1)
        error = (rows - (codes * step + base)).square().sum(-1)
        if best is None:
            best, best_error = (codes, scale, minimum), error
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (
                torch.where(better[..., None], codes, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, minimum, best[2]),
            )
    assert best is not None
    return best[0].to(torch.uint8), best[1], best[2]


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., head_size] to bytes uint8 [..., head_size * bits / 8], in layout.py's order."""
    slices = codes.chunk(8 // bits, dim=-1)
    packed = slices[0].clone()
    for index, part in enumerate(slices[1:], 1):
        packed |= part << (index * bits)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_codes`."""
    if bits == 8:
        return packed
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)


def page_parts(
    kv_cache: torch.Tensor, layout: PageLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a layer's cache [num_blocks, num_kv_heads, block_size, content_bytes] uint8, chunk by chunk.

    Returns:
        key codes [num_blocks, num_kv_heads, block_size, k_row_bytes] uint8, value codes likewise, key meta and value
        meta [num_blocks, num_kv_heads, block_size, 2] fp16 (scale, minimum).
    """
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    assert block_size == layout.block_size and content == layout.content_bytes, (kv_cache.shape, layout)
    assert kv_cache.stride(3) == 1 and kv_cache.stride(2) == content, "a chunk must be contiguous"

    def part(offset: int, row_bytes: int) -> torch.Tensor:
        return kv_cache.as_strided(
            (num_blocks, num_kv_heads, block_size, row_bytes),
            (kv_cache.stride(0), kv_cache.stride(1), row_bytes, 1),
            kv_cache.storage_offset() + offset,
        )

    return (
        part(layout.k_codes_offset, layout.k_row_bytes),
        part(layout.v_codes_offset, layout.v_row_bytes),
        part(layout.k_meta_offset, META_BYTES).view(torch.float16),
        part(layout.v_meta_offset, META_BYTES).view(torch.float16),
    )


def dequantize(packed: torch.Tensor, meta: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows fp32 [..., head_size] of packed codes [..., row_bytes] and meta [..., 2]."""
    scale, minimum = meta.float().unsqueeze(-1).unbind(-2)
    return unpack_codes(packed, bits).float() * scale + minimum


def reshape_and_cache_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    layout: PageLayout,
    transforms: LayerTransforms,
) -> None:
    """Transform, quantize, pack and scatter new tokens to their slots, in place.

    Args:
        key: [num_tokens, num_kv_heads, head_size], after RoPE.
        value: as key.
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] uint8.
        slot_mapping: [num_slots] int64, num_slots <= num_tokens; block * block_size + offset, or -1 for a token that
            is not stored. Tokens beyond num_slots are padding.
        positions: [>= num_slots] int64, the tokens' positions; needed with a key offset only.
        layout: the layer's page.
        transforms: the layer's transforms.
    """
    keep = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[keep]
    block, offset = slots // layout.block_size, slots % layout.block_size
    k_codes, v_codes, k_meta, v_meta = page_parts(kv_cache, layout)
    keys = transform_keys(key[keep], None if positions is None else positions[keep], transforms)
    values = rotate_values(value[keep], transforms)
    for rows, bits, codes_part, meta_part in (
        (keys, layout.k_bits, k_codes, k_meta),
        (values, layout.v_bits, v_codes, v_meta),
    ):
        codes, scale, minimum = quantize_rows(rows, bits, transforms.range_search)
        codes_part[block, :, offset] = pack_codes(codes, bits)
        meta_part[block, :, offset] = torch.stack([scale, minimum], dim=-1)


def read_back_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor | None,
    pair: PrecisionPair,
    transforms: LayerTransforms,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values fp32 in model space that :func:`gather_cache_ref` would give of tokens stored at ``pair``;
    arguments as :func:`reshape_and_cache_ref`."""
    keys, values = (
        codes.float() * scale.float()[..., None] + minimum.float()[..., None]
        for codes, scale, minimum in (
            quantize_rows(transform_keys(key, positions, transforms), pair.k_bits, transforms.range_search),
            quantize_rows(rotate_values(value, transforms), pair.v_bits, transforms.range_search),
        )
    )
    return restore_keys(keys, positions, transforms), rotate_values(values, transforms)


def gather_cache_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    seq_starts: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    layout: PageLayout,
    transforms: LayerTransforms,
    *,
    num_tokens: int,
) -> None:
    """Dequantize a slice of each request's cached tokens back to model space, in place.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] uint8.
        block_table: [num_reqs, max_blocks] int32.
        cu_seq_lens: [num_reqs + 1] int32, rows of the output where each request's slice begins, and the end.
        seq_starts: [num_reqs] int32, the first token of each request's slice.
        key_out: [>= num_tokens, num_kv_heads, head_size], any float dtype.
        value_out: as key_out.
        layout: the layer's page.
        transforms: the layer's transforms.
        num_tokens: tokens gathered, cu_seq_lens[-1], known to the host.
    """
    block, offset, position = _gathered_slots(block_table, cu_seq_lens, seq_starts, num_tokens, layout.block_size)
    k_codes, v_codes, k_meta, v_meta = page_parts(kv_cache, layout)
    keys = dequantize(k_codes[block, :, offset], k_meta[block, :, offset], layout.k_bits)
    values = dequantize(v_codes[block, :, offset], v_meta[block, :, offset], layout.v_bits)
    key_out[:num_tokens] = restore_keys(keys, position, transforms).to(key_out.dtype)
    value_out[:num_tokens] = rotate_values(values, transforms).to(value_out.dtype)


def _gathered_slots(
    block_table: torch.Tensor, cu_seq_lens: torch.Tensor, seq_starts: torch.Tensor, num_tokens: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block, offset in it and position, each [num_tokens] int64, of the tokens that gather_cache_ref takes."""
    lengths = (cu_seq_lens[1:] - cu_seq_lens[:-1]).long()
    requests = torch.arange(lengths.shape[0], device=lengths.device)
    request = torch.repeat_interleave(requests, lengths, output_size=num_tokens)
    row = torch.arange(num_tokens, device=lengths.device)
    position = row - cu_seq_lens[:-1].long()[request] + seq_starts.long()[request]
    return block_table[request, position // block_size].long(), position % block_size, position


def store_rows_ref(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Scatter new tokens to their slots as they are, in place; arguments as :func:`reshape_and_cache_ref`, but

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size] of the keys' dtype, each key beside its value.
    """
    keep = (slot_mapping >= 0).nonzero().squeeze(1)
    slots, block_size = slot_mapping[keep], kv_cache.shape[2]
    kv_cache[slots // block_size, :, slots % block_size] = torch.cat([key[keep], value[keep]], dim=-1)


def gather_rows_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    seq_starts: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    *,
    num_tokens: int,
) -> None:
    """As :func:`gather_cache_ref`, from a cache that :func:`store_rows_ref` wrote."""
    block, offset, _ = _gathered_slots(block_table, cu_seq_lens, seq_starts, num_tokens, kv_cache.shape[2])
    key_out[:num_tokens], value_out[:num_tokens] = kv_cache[block, :, offset].chunk(2, dim=-1)


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
