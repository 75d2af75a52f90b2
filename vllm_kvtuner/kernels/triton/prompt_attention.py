"""Attention of prompts over keys and values in memory as they are, for head sizes that FlashAttention does not take.

A program takes up to BLOCK_M tokens of one request in one query head, and goes through the keys that they see.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_kvtuner.kernels.checks import check_rows
from vllm_kvtuner.kernels.contract import AttentionShape, Segment
from vllm_kvtuner.kernels.triton.merge import divisor, finite_reference

BLOCK_M = 32
"""Query tokens of a program: less than a warp group's products take (window_attention.py says why)."""
BLOCK_N = 16
"""Keys of a tile: two tiles of keys and of values of 512 numbers fit 99 KB of shared memory beside the queries."""
NUM_WARPS = 8
NUM_STAGES = 2


@triton.jit(do_not_specialize=["num_tokens"])
def _prompt_attention_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, lse_ptr, cu_query_lens_ptr, cu_key_lens_ptr,
    query_stride, key_stride, value_stride, output_stride, num_tokens, scale_log2,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """WINDOW 0 and SOFT_CAP 0 mean none; logits are to base 2."""
    request, head = tl.program_id(2), tl.program_id(1)
    first_query = tl.load(cu_query_lens_ptr + request)
    num_queries = tl.load(cu_query_lens_ptr + request + 1) - first_query
    begin_query = tl.program_id(0) * BLOCK_M
    if begin_query >= num_queries:
        return
    first_key = tl.load(cu_key_lens_ptr + request)
    num_keys = tl.load(cu_key_lens_ptr + request + 1) - first_key
    index = begin_query + tl.arange(0, BLOCK_M)
    is_row = index < num_queries
    position = num_keys - num_queries + index  # of a query among its request's keys
    dim = tl.arange(0, PADDED)
    in_row = dim < HEAD_SIZE
    row = (first_query + index).to(tl.int64)
    queries = tl.load(
        query_ptr + row[:, None] * query_stride + (head * HEAD_SIZE + dim)[None, :],
        mask=is_row[:, None] & in_row[None, :],
        other=0.0,
    )

    begin, end = 0, num_keys
    if CAUSAL:
        end = tl.minimum(num_keys, num_keys - num_queries + begin_query + BLOCK_M)
    if WINDOW > 0:
        begin = tl.maximum(num_keys - num_queries + begin_query - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    within = head // GROUP * HEAD_SIZE + dim
    key_ptr += first_key.to(tl.int64) * key_stride
    value_ptr += first_key.to(tl.int64) * value_stride
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        present = token < num_keys
        held = present[:, None] & in_row[None, :]
        token_row = token.to(tl.int64)[:, None]
        keys = tl.load(key_ptr + token_row * key_stride + within[None, :], mask=held, other=0.0)
        values = tl.load(value_ptr + token_row * value_stride + within[None, :], mask=held, other=0.0)
        logits = tl.dot(queries, tl.trans(keys)) * scale_log2
        if SOFT_CAP > 0:
            # c tanh(x / c), to base 2 as x is.
            cap: tl.constexpr = SOFT_CAP * 1.4426950408889634
            logits = cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634 / cap)) + 1.0))
        visible = present[None, :] & is_row[:, None]
        distance = position[:, None] - token[None, :]
        if CAUSAL:
            visible &= distance >= 0
        if WINDOW > 0:
            visible &= distance < WINDOW
        logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        reference = finite_reference(new_top)
        p = tl.exp2(logits - reference[:, None])
        decay = tl.exp2(top - reference)
        output = tl.dot(p.to(values.dtype), values, output * decay[:, None])
        total = total * decay + tl.sum(p, 1)
        top = new_top

    output = output / divisor(total)[:, None]
    lse = (top + tl.log2(divisor(total))) * 0.6931471805599453  # -inf where nothing was seen, as top is
    tl.store(lse_ptr + head.to(tl.int64) * num_tokens + row, lse, mask=is_row)
    tl.store(
        output_ptr + row[:, None] * output_stride + (head * HEAD_SIZE + dim)[None, :],
        output.to(output_ptr.dtype.element_ty),
        mask=is_row[:, None] & in_row[None, :],
    )


class Prompts(NamedTuple):
    """Where each request's queries and keys are; its last query stands with its last key.

    Args:
        cu_query_lens: [num_reqs + 1] int32.
        cu_key_lens: [num_reqs + 1] int32.
        max_query_len: query tokens that a request has at most.
    """

    cu_query_lens: torch.Tensor
    cu_key_lens: torch.Tensor
    max_query_len: int


def prompt_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prompts: Prompts,
    shape: AttentionShape,
    causal: bool,
    sliding_window: int | None = None,
) -> Segment:
    """Attention of each request's queries over its keys; nothing is read back to the host.

    Args:
        query: [num_tokens, num_heads, head_size], a token's heads contiguous.
        key: [keys, num_kv_heads, head_size], likewise.
        value: as key.
        prompts: the requests.
        shape: of the layer; sinks are not counted.
        causal: queries do not see keys behind theirs.
        sliding_window: tokens a query sees, itself included, or None for all.

    Returns:
        of the query's dtype; a query that sees nothing has the output 0 and the log-sum-exp -inf.
    """
    for rows in (query, key, value):
        check_rows(rows)
    head_size = shape.head_size
    assert query.shape[1:] == (shape.num_heads, head_size), (query.shape, shape)
    assert key.shape[1:] == value.shape[1:] == (shape.num_kv_heads, head_size), (key.shape, value.shape, shape)
    cu_query_lens, cu_key_lens, max_query_len = prompts
    result = Segment.into(torch.empty(query.shape, dtype=query.dtype, device=query.device))
    _prompt_attention_kernel[(triton.cdiv(max_query_len, BLOCK_M), shape.num_heads, cu_query_lens.shape[0] - 1)](
        query, key, value, result.output, result.lse, cu_query_lens, cu_key_lens,
        query.stride()[0], key.stride()[0], value.stride()[0], result.output.stride()[0], len(query),
        shape.scale * math.log2(math.e),
        GROUP=shape.group, HEAD_SIZE=head_size, PADDED=triton.next_power_of_2(head_size), CAUSAL=causal,
        WINDOW=sliding_window or 0, SOFT_CAP=shape.logits_soft_cap, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return result
