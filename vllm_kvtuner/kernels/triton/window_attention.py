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

from vllm_kvtuner.kernels.checks import check_attention
from vllm_kvtuner.kernels.contract import AttentionShape, Launch, Queries, Span
from vllm_kvtuner.kernels.triton.merge import divisor, finite_reference, segment_weight
from vllm_kvtuner.pages.layout import MAX_HEAD_SIZE

BLOCK_N = 32
"""Tokens of a tile: a window of 64 tokens is two."""
SINK_TILE = 16
"""Sink tokens at most, which have a tile of their own."""
MAX_BLOCK_M = 32
NUM_WARPS = 2
"""With four, Triton takes Hopper's warp-group products, with which its 3.6 and later versions read outside of shared
memory where a kernel has several small ones (triton-lang/triton issues 10486 and 11366). These programs are so small
that two warps, with less shared memory, also let more of them run at once."""
LARGE_NUM_WARPS = 8
"""For head sizes whose outputs fill the registers of two warps; their products have fewer rows than a warp group's."""


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
def _attend(
    keys, values, queries, visible, top, total, output, scale_log2, SOFT_CAP: tl.constexpr, LARGE: tl.constexpr
):  # fmt: skip
    """Attention over another tile: the new greatest logits and totals [rows] and outputs [dimensions, rows], or
    [rows, dimensions] if LARGE, whose softmax is not normalized."""
    logits = tl.dot(keys, queries) * scale_log2
    if SOFT_CAP > 0:
        # c tanh(x / c), to base 2 as x is.
        cap: tl.constexpr = SOFT_CAP * 1.4426950408889634
        logits = cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634 / cap)) + 1.0))
    logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 0))
    reference = finite_reference(new_top)
    p = tl.exp2(logits - reference[None, :])
    decay = tl.exp2(top - reference)
    if LARGE:
        output = tl.dot(tl.trans(p.to(values.dtype)), values, output * decay[:, None])
    else:
        output = tl.dot(tl.trans(values), p.to(values.dtype), output * decay[None, :])
    return new_top, total * decay + tl.sum(p, 0), output


@triton.jit(do_not_specialize=["table_stride", "num_tokens"])
def _window_attention_kernel(
    query_ptr, cache_ptr, block_table_ptr, seq_lens_ptr, query_start_loc_ptr, output_ptr, lse_ptr,
    query_stride, output_stride, block_stride, head_stride, place_stride, table_stride, num_tokens, scale_log2,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW_TOKENS: tl.constexpr, SINK_TOKENS: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ROW_TILES: tl.constexpr, DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SINK_TILE: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Tokens are the rows of every tile and query rows its columns, as in paged_attention.

    SLIDING_WINDOW 0 and SOFT_CAP 0 mean none; logits are to base 2.
    """
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
    if LARGE:
        output = tl.zeros([BLOCK_M, PADDED], tl.float32)
    else:
        output = tl.zeros([PADDED, BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    begin = tl.maximum(seq_len - num_queries + 1 - WINDOW_TOKENS, 0)
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
        visible = present[:, None] & (distance >= 0) & ((distance < WINDOW_TOKENS) | (token < SINK_TOKENS)[:, None])
        if SLIDING_WINDOW > 0:
            visible &= distance < SLIDING_WINDOW
        top, total, output = _attend(keys, values, queries, visible, top, total, output, scale_log2, SOFT_CAP, LARGE)
    if SINK_TOKENS > 0:
        visible = is_sink[:, None] & is_row[None, :]
        if SLIDING_WINDOW > 0:
            visible &= position[None, :] - sink[:, None] < SLIDING_WINDOW
        top, total, output = _attend(
            sink_keys, sink_values, queries, visible, top, total, output, scale_log2, SOFT_CAP, LARGE
        )
    if LARGE:
        output = tl.trans(output)

    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    older = tl.load(lse_ptr + head * num_tokens + query, mask=is_row, other=float("-inf")) * 1.4426950408889634
    target = output_ptr + query.to(tl.int64)[None, :] * output_stride + head[None, :] * HEAD_SIZE + dim[:, None]
    packed = tl.load(target, mask=in_row, other=0.0)
    # Rows of padding see nothing in either.
    reference = finite_reference(tl.maximum(top, older))
    weight, older_weight = segment_weight(top, reference), segment_weight(older, reference)
    total = divisor(total * weight + older_weight)
    merged = (output * weight[None, :] + packed.to(tl.float32) * older_weight[None, :]) / total[None, :]
    tl.store(target, merged.to(output_ptr.dtype.element_ty), mask=in_row)


def window_attention(
    query: torch.Tensor,
    queries: Queries,
    rows: torch.Tensor,
    shape: AttentionShape,
    span: Span,
    output: torch.Tensor,
    lse: torch.Tensor,
    *,
    launch: Launch,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.WindowAttention`.

    Nothing is read back to the host and nothing allocated: the launch depends on shapes alone, so a CUDA graph may hold
    it. A request may have any number of query tokens, and at most SINK_TILE sink tokens.

    Args:
        launch: without workspace and config. Dependent needs compute capability 9.0 or later, and the kernel before may
            write output and lse alone of all arguments.
    """
    check_attention(query, queries, shape, output, lse)
    num_tokens, num_heads, head_size = query.shape
    _, num_kv_heads, block_size, row_size = rows.shape
    block_stride, head_stride, place_stride, in_row_stride = rows.stride()
    group = shape.group
    assert num_heads == group * num_kv_heads and row_size == 2 * head_size, (shape, rows.shape)
    assert in_row_stride == 1 and rows.dtype == query.dtype, (rows.stride(), rows.dtype)
    assert span.skip_first <= SINK_TILE, span
    max_query_len = queries.max_query_len
    pass_rows = group * (launch.pass_query_len or max_query_len)
    large = head_size > MAX_HEAD_SIZE
    block_m = 16 if large else min(max(triton.next_power_of_2(pass_rows), 16), MAX_BLOCK_M)
    row_tiles = triton.cdiv(group * max_query_len, block_m)
    _window_attention_kernel[(queries.num_reqs, num_kv_heads * row_tiles)](
        query, rows, queries.block_table, queries.seq_lens, queries.query_start_loc, output, lse,
        query.stride()[0], output.stride()[0], block_stride, head_stride, place_stride,
        queries.block_table.stride()[0], num_tokens, shape.scale * math.log2(math.e),
        GROUP=group, HEAD_SIZE=head_size, PADDED=triton.next_power_of_2(head_size),
        BLOCK_SIZE=block_size, WINDOW_TOKENS=span.skip_newest, SINK_TOKENS=span.skip_first,
        SLIDING_WINDOW=span.sliding_window or 0, SOFT_CAP=shape.logits_soft_cap,
        ROW_TILES=row_tiles, DEPENDENT=launch.dependent, BLOCK_M=block_m, BLOCK_N=BLOCK_N, SINK_TILE=SINK_TILE,
        LARGE=large, num_warps=LARGE_NUM_WARPS if large else NUM_WARPS, num_stages=2,
        **({"launch_pdl": True} if launch.dependent else {}),
    )  # fmt: skip
