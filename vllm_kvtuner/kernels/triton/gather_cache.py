"""Gather: dequantize a slice of each request's cached tokens back to model space."""

import torch
import triton
import triton.language as tl

from vllm_kvtuner.kernels.checks import check_gather
from vllm_kvtuner.kernels.contract import CachedTokens, Pages
from vllm_kvtuner.kernels.triton.codes import byte_columns, load_rows
from vllm_kvtuner.kernels.triton.common import (
    axis_of,
    hadamard_rows,
    load_positions,
    program_rows,
    rotated_offset,
    row_warps,
)

TOKENS_PER_PROGRAM = 32


@triton.jit(do_not_specialize=["num_tokens", "num_reqs", "search_steps", "table_stride"])
def _gather_cache_kernel(
    kv_cache_ptr, block_table_ptr, cu_seq_lens_ptr, seq_starts_ptr, key_ptr, value_ptr,
    offset_ptr, partner_ptr, cos_sin_ptr, axes_ptr, table_ptr, equalization_ptr, num_tokens, num_reqs, search_steps,
    block_stride, head_stride, table_stride, key_stride, value_stride,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, V_CODES: tl.constexpr, K_META: tl.constexpr, V_META: tl.constexpr,
    ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, AXES: tl.constexpr,
    KEY_HADAMARD: tl.constexpr, VALUE_HADAMARD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    keep = token < num_tokens
    # The request of a token: the first whose slice ends beyond it.
    first = tl.zeros([TOKENS], tl.int32)
    last = first + num_reqs - 1
    for _ in range(search_steps):
        middle = (first + last) // 2
        beyond = tl.load(cu_seq_lens_ptr + middle + 1, mask=keep, other=0) > token
        last = tl.where(beyond, middle, last)
        first = tl.where(beyond, first, tl.minimum(middle + 1, last))
    start = tl.load(seq_starts_ptr + first, mask=keep, other=0) - tl.load(cu_seq_lens_ptr + first, mask=keep, other=0)
    position = token + start
    entry = block_table_ptr + first.to(tl.int64) * table_stride + position // BLOCK_SIZE
    block = tl.load(entry, mask=keep, other=0).to(tl.int64)
    head = tl.program_id(1)
    chunk_ptr = kv_cache_ptr + head.to(tl.int64) * head_stride + block * block_stride
    offset = position % BLOCK_SIZE
    if tl.program_id(2) == 0:
        dim, in_row = byte_columns(HEAD_SIZE, K_BITS)
        valid = keep[:, None] & in_row[None, :]
        x = load_rows(chunk_ptr, offset, keep, HEAD_SIZE, K_ROW, 0, K_META, K_BITS)
        if KEY_HADAMARD:
            x = hadamard_rows(x, dim, HEAD_SIZE)
        if equalization_ptr is not None:
            x *= tl.load(equalization_ptr + head * HEAD_SIZE + dim, mask=in_row, other=1.0)[None, :]
        if offset_ptr is not None:
            heads = tl.zeros([TOKENS], tl.int32) + head
            if AXES > 0:
                row_ptr = table_ptr + (block * BLOCK_SIZE + offset) * AXES
                turned_by = load_positions(row_ptr, 1, keep, axis_of(axes_ptr, dim, ROTARY_DIM, IS_NEOX), AXES)
            else:
                turned_by = position[:, None]
            x += rotated_offset(
                offset_ptr, partner_ptr, cos_sin_ptr, heads, turned_by.to(tl.int64), dim, valid,
                HEAD_SIZE, ROTARY_DIM, IS_NEOX,
            )  # fmt: skip
        out = key_ptr + token.to(tl.int64)[:, None] * key_stride + head * HEAD_SIZE + dim[None, :]
        tl.store(out, x.to(key_ptr.dtype.element_ty), mask=valid)
    else:
        dim, in_row = byte_columns(HEAD_SIZE, V_BITS)
        x = load_rows(chunk_ptr, offset, keep, HEAD_SIZE, V_ROW, V_CODES, V_META, V_BITS)
        if VALUE_HADAMARD:
            x = hadamard_rows(x, dim, HEAD_SIZE)
        out = value_ptr + token.to(tl.int64)[:, None] * value_stride + head * HEAD_SIZE + dim[None, :]
        tl.store(out, x.to(value_ptr.dtype.element_ty), mask=keep[:, None] & in_row[None, :])


def gather_cache(pages: Pages, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.GatherCache`."""
    check_gather(pages, tokens, key_out, value_out)
    num_tokens = tokens.num_tokens
    if num_tokens == 0:
        return
    kv_cache, layout, transforms, _ = pages
    num_reqs, num_kv_heads = tokens.block_table.shape[0], pages.num_kv_heads
    block_stride, head_stride, _, _ = kv_cache.stride()
    rotary = transforms.rotary if transforms.key_offset is not None else None
    several = transforms.positions
    tokens_per_program = program_rows(layout.head_size, TOKENS_PER_PROGRAM)
    _gather_cache_kernel[(triton.cdiv(num_tokens, tokens_per_program), num_kv_heads, 2)](
        kv_cache, tokens.block_table, tokens.cu_seq_lens, tokens.seq_starts, key_out, value_out,
        transforms.key_offset, transforms.offset_partner, rotary and rotary.cos_sin, several and several.axes,
        pages.positions, transforms.key_equalization,
        num_tokens, num_reqs, num_reqs.bit_length(),
        block_stride, head_stride, tokens.block_table.stride()[0], key_out.stride()[0], value_out.stride()[0],
        HEAD_SIZE=layout.head_size, BLOCK_SIZE=layout.block_size, K_BITS=layout.k_bits, V_BITS=layout.v_bits,
        K_ROW=layout.k_row_bytes, V_ROW=layout.v_row_bytes, V_CODES=layout.v_codes_offset,
        K_META=layout.k_meta_offset, V_META=layout.v_meta_offset,
        ROTARY_DIM=rotary.rotary_dim if rotary else 0, IS_NEOX=rotary.is_neox if rotary else True,
        AXES=several.num_axes if several else 0,
        KEY_HADAMARD=transforms.key_hadamard, VALUE_HADAMARD=transforms.value_hadamard,
        TOKENS=tokens_per_program, num_warps=row_warps(layout.head_size),
    )  # fmt: skip
