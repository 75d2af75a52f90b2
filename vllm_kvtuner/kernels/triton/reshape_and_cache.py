"""Store: transform, quantize, pack and scatter new tokens to their slots, keys and values in one launch, and as they
are to those of a recent window. Sides with round feedback have launches of their own (feedback_store.py)."""

import torch
import triton
import triton.language as tl

from vllm_kvtuner.kernels.checks import check_store
from vllm_kvtuner.kernels.contract import Pages, WindowRows
from vllm_kvtuner.kernels.triton import feedback_store
from vllm_kvtuner.kernels.triton.codes import byte_columns, store_rows
from vllm_kvtuner.kernels.triton.common import load_rows_to_pack, program_rows, row_warps
from vllm_kvtuner.pages.transforms import SIDES

MANY_ROWS = 1 << 14
"""(token, KV head) rows from which larger programs still fill any card."""


@triton.jit(do_not_specialize=["num_rows"])
def _reshape_and_cache_kernel(
    key_ptr, value_ptr, kv_cache_ptr, slot_mapping_ptr, positions_ptr, axis_stride, axes_ptr, table_ptr,
    offset_ptr, partner_ptr, cos_sin_ptr, equalization_ptr, num_rows,
    key_stride, value_stride, block_stride, head_stride,
    window_ptr, window_slots_ptr, window_block_stride, window_head_stride, window_place_stride,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    V_CODES: tl.constexpr, K_META: tl.constexpr, V_META: tl.constexpr,
    ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, AXES: tl.constexpr,
    KEY_HADAMARD: tl.constexpr, VALUE_HADAMARD: tl.constexpr, RANGE_SEARCH: tl.constexpr,
    WINDOW_BLOCK_SIZE: tl.constexpr, FIRST_SIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head, present = row // NUM_KV_HEADS, row % NUM_KV_HEADS, row < num_rows
    slot = tl.load(slot_mapping_ptr + token, mask=present, other=-1).to(tl.int64)
    keep = slot >= 0
    chunk_ptr = kv_cache_ptr + slot // BLOCK_SIZE * block_stride + head.to(tl.int64) * head_stride
    offset = slot % BLOCK_SIZE
    if tl.program_id(1) + FIRST_SIDE == 0:
        dim, in_row = byte_columns(HEAD_SIZE, K_BITS)
        x = load_rows_to_pack(
            key_ptr, key_stride, token, head, present, slot, dim, in_row,
            positions_ptr, axis_stride, axes_ptr, table_ptr, offset_ptr, partner_ptr, cos_sin_ptr, equalization_ptr,
            window_ptr, window_slots_ptr, window_block_stride, window_head_stride, window_place_stride,
            HEAD_SIZE, ROTARY_DIM, IS_NEOX, AXES, KEY_HADAMARD, WINDOW_BLOCK_SIZE, 0,
        )  # fmt: skip
        store_rows(x, in_row[None, :], chunk_ptr, offset, keep, K_ROW, 0, K_META, K_BITS, RANGE_SEARCH)
    else:
        dim, in_row = byte_columns(HEAD_SIZE, V_BITS)
        x = load_rows_to_pack(
            value_ptr, value_stride, token, head, present, slot, dim, in_row,
            None, 0, None, None, None, None, None, None,
            window_ptr, window_slots_ptr, window_block_stride, window_head_stride, window_place_stride,
            HEAD_SIZE, 0, IS_NEOX, 0, VALUE_HADAMARD, WINDOW_BLOCK_SIZE, HEAD_SIZE,
        )  # fmt: skip
        store_rows(x, in_row[None, :], chunk_ptr, offset, keep, V_ROW, V_CODES, V_META, V_BITS, RANGE_SEARCH)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    pages: Pages,
    window: WindowRows | None = None,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.ReshapeAndCache`.

    Where a number lies within rounding of the middle between two codes, this kernel may take the other code than the
    reference; with round feedback, codes of channels before it then follow.
    """
    check_store(key, value, slot_mapping, positions, pages, window)
    kv_cache, layout, transforms, _ = pages
    block_stride, head_stride, _, _ = kv_cache.stride()
    num_kv_heads, head_size = key.shape[1], layout.head_size
    num_rows = slot_mapping.shape[0] * num_kv_heads
    if num_rows == 0:
        return
    sides = []
    for side, bits in zip(SIDES, (layout.k_bits, layout.v_bits), strict=True):
        if transforms.feedback(side, bits) is None:
            sides.append(side)
        else:
            feedback_store.store_side(side, key, value, slot_mapping, positions, pages, window)
    if not sides:
        return
    has_offset = transforms.key_offset is not None
    rotary, several = transforms.rotary if has_offset else None, transforms.positions
    rows, row_slots = (None, None) if window is None else window
    row_strides = (0, 0, 0) if rows is None else rows.stride()
    rows_per_program = program_rows(head_size, 32 if num_rows >= MANY_ROWS else 16)
    _reshape_and_cache_kernel[(triton.cdiv(num_rows, rows_per_program), len(sides))](
        key, value, kv_cache, slot_mapping, positions if has_offset else None,
        positions.stride()[0] if several and positions is not None else 0, several and several.axes, pages.positions,
        transforms.key_offset, transforms.offset_partner, rotary and rotary.cos_sin, transforms.key_equalization,
        num_rows, key.stride()[0], value.stride()[0], block_stride, head_stride,
        rows, row_slots, row_strides[0], row_strides[1], row_strides[2],
        NUM_KV_HEADS=num_kv_heads, HEAD_SIZE=head_size, BLOCK_SIZE=layout.block_size,
        K_BITS=layout.k_bits, V_BITS=layout.v_bits, K_ROW=layout.k_row_bytes, V_ROW=layout.v_row_bytes,
        V_CODES=layout.v_codes_offset, K_META=layout.k_meta_offset, V_META=layout.v_meta_offset,
        ROTARY_DIM=rotary.rotary_dim if rotary else 0, IS_NEOX=rotary.is_neox if rotary else True,
        AXES=several.num_axes if several else 0,
        KEY_HADAMARD=transforms.key_hadamard, VALUE_HADAMARD=transforms.value_hadamard,
        RANGE_SEARCH=transforms.range_search, WINDOW_BLOCK_SIZE=0 if rows is None else rows.shape[2],
        FIRST_SIDE=SIDES.index(sides[0]), ROWS=rows_per_program, num_warps=row_warps(head_size),
    )  # fmt: skip
