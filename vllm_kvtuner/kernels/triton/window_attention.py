"""Decode beside a recent window of 16 bits: attention over sink tokens and newest ones, merged with that over the
packed pages, in one launch. Where a card can, it begins while the kernel before it ends, and waits for that one only to
merge.

A program takes one request and up to BLOCK_M of the query rows that share a KV head. The tokens it reads are few, so
that splitting them would only cost a merge.
"""

import math

import torch
import triton
import triton.language as tl

BLOCK_N = 32
"""Tokens of a tile: a window of 64 tokens is two."""
SINK_TILE = 16
"""Sink tokens at most, which have a tile of their own."""
MAX_BLOCK_M = 32
NUM_WARPS = 2
"""With four, Triton takes Hopper's warp-group products, with which its 3.6 and later versions read outside of shared
memory where a kernel has several small ones (triton-lang/triton issues 10486 and 11366). These programs are so small
that two warps, with less shared memory, also let more of them run at once."""


@triton.jit
def _load_rows(
    rows_ptr, table, token, present, dim, block_stride, place_stride,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys and values [tokens, dimensions] of one KV head, 0 where not present."""
    block = tl.load(table + token // BLOCK_SIZE, mask=present, other=0)
    place = block.to(tl.int64) * block_stride + token % BLOCK_SIZE * place_stride
    rows = rows_ptr + place[:, None] + dim[None, :]
    held = present[:, None] & (dim < HEAD_SIZE)[None, :]
    return tl.load(rows, mask=held, other=0.0), tl.load(rows + HEAD_SIZE, mask=held, other=0.0)


@triton.jit
def _attend(keys, values, queries, visible, top, total, output, scale_log2, SOFT_CAP: tl.constexpr):
    """Attention over another tile: the new greatest logits and totals [rows] and outputs [dimensions, rows], whose
    softmax is not normalized."""
    logits = tl.dot(keys, queries) * scale_log2
    if SOFT_CAP > 0:
        # c tanh(x / c), to base 2 as x is.
        cap: tl.constexpr = SOFT_CAP * 1.4426950408889634
        logits = cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634 / cap)) + 1.0))
    logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 0))
    # A row that has seen nothing yet keeps a finite reference, so that nothing becomes inf - inf.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(logits - reference[None, :])
    decay = tl.exp2(top - reference)
    output = tl.dot(tl.trans(values), p.to(values.dtype), output * decay[None, :])
    return new_top, total * decay + tl.sum(p, 0), output


@triton.jit(do_not_specialize=["table_stride", "num_tokens"])
def _recent_attention_kernel(
    query_ptr, cache_ptr, block_table_ptr, seq_lens_ptr, query_start_loc_ptr, output_ptr, lse_ptr,
    query_stride, output_stride, block_stride, head_stride, place_stride, table_stride, num_tokens, scale_log2,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, RECENT: tl.constexpr, SINK_TOKENS: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, ROW_TILES: tl.constexpr, DEPENDENT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SINK_TILE: tl.constexpr,
):  # fmt: skip
    """Tokens are the rows of every tile and query rows its columns, as in paged_attention. WINDOW 0 and SOFT_CAP 0 mean
    none; logits are to base 2."""
    request = tl.program_id(0)
    kv_head = tl.program_id(1) // ROW_TILES
    seq_len = tl.load(seq_lens_ptr + request)
    first_query = tl.load(query_start_loc_ptr + request)
    num_queries = tl.load(query_start_loc_ptr + request + 1) - first_query
    if num_queries <= tl.program_id(1) % ROW_TILES * BLOCK_M // GROUP:
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()  # the next kernel takes this one's end for the end of the one before too
        return
    member = tl.program_id(1) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    query_index = member // GROUP
    is_row = query_index < num_queries
    query = first_query + query_index
    head = kv_head * GROUP + member % GROUP
    position = seq_len - num_queries + query_index

    dim = tl.arange(0, PADDED)
    in_row = (dim < HEAD_SIZE)[:, None] & is_row[None, :]
    column = query.to(tl.int64)[None, :] * query_stride + head[None, :] * HEAD_SIZE + dim[:, None]
    queries = tl.load(query_ptr + column, mask=in_row, other=0.0)
    output = tl.zeros([PADDED, BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    begin = tl.maximum(seq_len - num_queries + 1 - RECENT, 0)
    table = block_table_ptr + request.to(tl.int64) * table_stride
    rows_ptr = cache_ptr + kv_head * head_stride
    if SINK_TOKENS > 0:
        # Asked for before the window and needed after it: another turn to memory would take as long as a tile.
        sink = tl.arange(0, SINK_TILE)
        is_sink = sink < tl.minimum(begin, SINK_TOKENS)
        sink_keys, sink_values = _load_rows(
            rows_ptr, table, sink, is_sink, dim, block_stride, place_stride, HEAD_SIZE, BLOCK_SIZE
        )
    for start in tl.range(begin, seq_len, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        present = token < seq_len
        keys, values = _load_rows(
            rows_ptr, table, token, present, dim, block_stride, place_stride, HEAD_SIZE, BLOCK_SIZE
        )
        distance = position[None, :] - token[:, None]
        visible = present[:, None] & (distance >= 0) & ((distance < RECENT) | (token < SINK_TOKENS)[:, None])
        if WINDOW > 0:
            visible &= distance < WINDOW
        top, total, output = _attend(keys, values, queries, visible, top, total, output, scale_log2, SOFT_CAP)
    if SINK_TOKENS > 0:
        visible = is_sink[:, None] & is_row[None, :]
        if WINDOW > 0:
            visible &= position[None, :] - sink[:, None] < WINDOW
        top, total, output = _attend(sink_keys, sink_values, queries, visible, top, total, output, scale_log2, SOFT_CAP)

    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    older = tl.load(lse_ptr + head * num_tokens + query, mask=is_row, other=float("-inf")) * 1.4426950408889634
    target = output_ptr + query.to(tl.int64)[None, :] * output_stride + head[None, :] * HEAD_SIZE + dim[:, None]
    packed = tl.load(target, mask=in_row, other=0.0)
    most = tl.maximum(top, older)
    most = tl.where(most == float("-inf"), 0.0, most)
    share, older_share = tl.exp2(top - most), tl.exp2(older - most)
    sums = total * share + older_share
    # Rows of padding see nothing in either.
    sums = tl.where(sums > 0, sums, 1.0)
    merged = (output * share[None, :] + packed.to(tl.float32) * older_share[None, :]) / sums[None, :]
    tl.store(target, merged.to(output_ptr.dtype.element_ty), mask=in_row)


def recent_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
    recent: int,
    sink_tokens: int,
    output: torch.Tensor,
    lse: torch.Tensor,
    sliding_window: int | None = None,
    logits_soft_cap: float = 0.0,
    *,
    dependent: bool = False,
    pass_query_len: int | None = None,
) -> None:
    """As :func:`vllm_kvtuner.kernels.reference.window_attention.recent_attention_ref`; ``lse`` contiguous.

    Nothing is read back to the host and nothing allocated: the launch depends on shapes alone, so a CUDA graph may hold
    it. Rows of output beyond the last query are left as they are.

    Args:
        dependent: begin before the kernel before on the stream has ended, if that one allows it (compute capability 9.0
            and later). Of all arguments, it may write output and lse alone.
        pass_query_len: query tokens of a request that a program has room for, max_query_len if None; less where few
            requests have as many as that.
    """
    num_tokens, num_heads, head_size = query.shape
    num_reqs, num_kv_heads, block_size = block_table.shape[0], kv_cache.shape[1], kv_cache.shape[2]
    group = num_heads // num_kv_heads
    assert num_heads == group * num_kv_heads and kv_cache.shape[3] == 2 * head_size, (query.shape, kv_cache.shape)
    assert kv_cache.stride(3) == 1 and kv_cache.dtype == query.dtype, (kv_cache.stride(), kv_cache.dtype)
    for tokens in (query, output):
        assert tokens.shape == query.shape and tokens.stride(2) == 1 and tokens.stride(1) == head_size, tokens.stride()
    assert seq_lens.shape == (num_reqs,) and query_start_loc.shape == (num_reqs + 1,)
    for lengths in (block_table, seq_lens, query_start_loc):
        assert lengths.dtype == torch.int32 and lengths.stride(-1) == 1
    assert lse.shape == (num_heads, num_tokens) and lse.is_contiguous() and lse.dtype == torch.float32
    assert sink_tokens <= SINK_TILE, sink_tokens
    block_m = min(max(triton.next_power_of_2(group * (pass_query_len or max_query_len)), 16), MAX_BLOCK_M)
    row_tiles = triton.cdiv(group * max_query_len, block_m)
    _recent_attention_kernel[(num_reqs, num_kv_heads * row_tiles)](
        query, kv_cache, block_table, seq_lens, query_start_loc, output, lse,
        query.stride(0), output.stride(0), *kv_cache.stride()[:3], block_table.stride(0), num_tokens,
        scale * math.log2(math.e),
        NUM_HEADS=num_heads, GROUP=group, HEAD_SIZE=head_size, PADDED=triton.next_power_of_2(head_size),
        BLOCK_SIZE=block_size, RECENT=recent, SINK_TOKENS=sink_tokens, WINDOW=sliding_window or 0,
        SOFT_CAP=logits_soft_cap,
        ROW_TILES=row_tiles, DEPENDENT=dependent, BLOCK_M=block_m, BLOCK_N=BLOCK_N,
        SINK_TILE=SINK_TILE, num_warps=NUM_WARPS, num_stages=2,
        **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip
