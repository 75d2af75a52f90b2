"""Store: transform, quantize, pack and scatter new tokens to their slots, keys and values in one launch, and as they
are to those of a recent window."""

import torch
import triton
import triton.language as tl

from vllm_kvtuner.kernels.contract import RecentRows, check_cache
from vllm_kvtuner.kernels.triton.common import byte_columns, hadamard_rows, rotated_offset, row_warps
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

MANY_ROWS = 1 << 14
"""(token, KV head) rows from which larger programs still fill any card."""


@triton.jit
def _range(low, high, step, BITS: tl.constexpr):
    """Scale and minimum, fp16, of rows between low and high when their range shrinks by factor number ``step``.

    The factors are reference.RANGE_FACTORS; they become fp32 where the reference rounds them.
    """
    stretch = 1.0 / ((1 << BITS) - 1)
    shift = 0.0
    for index in tl.static_range(1, 11):
        stretch = tl.where(step == index, (1.0 - 0.05 * index) / ((1 << BITS) - 1), stretch)
        shift = tl.where(step == index, 0.5 * (1.0 - (1.0 - 0.05 * index)), shift)
    scale = tl.minimum((high - low) * stretch, 65504.0)
    minimum = low + (high - low) * shift
    return scale.to(tl.float16), tl.minimum(tl.maximum(minimum, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def _codes(x, scale, minimum, BITS: tl.constexpr):
    """Codes, as fp32, of rows x [rows, columns] under fp16 scale and minimum [rows]."""
    step = scale.to(tl.float32)
    inverse = tl.where(step > 0, tl.math.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
    codes = tl.floor((x - minimum.to(tl.float32)[:, None]) * inverse[:, None] + 0.5)
    return tl.minimum(tl.maximum(codes, 0.0), (1 << BITS) - 1.0)


@triton.jit
def _store_rows(
    x, valid, chunk_ptr, offset, keep,
    ROW_BYTES: tl.constexpr, CODES: tl.constexpr, META: tl.constexpr, BITS: tl.constexpr, RANGE_SEARCH: tl.constexpr,
):  # fmt: skip
    """Quantize rows x [rows, columns], columns as byte_columns has them, and write codes and meta.

    Args:
        valid: bool [1, columns], False for padding.
        chunk_ptr: uint8 pointers [rows], the chunk that holds each row's slot.
        offset: int64 [rows], the slot's place within its block.
        keep: bool [rows], False for rows that are not stored.
    """
    ROWS: tl.constexpr = x.shape[0]
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = x.shape[1] // FIELDS
    low = tl.min(tl.where(valid, x, float("inf")), 1)
    high = tl.max(tl.where(valid, x, float("-inf")), 1)
    scale, minimum = _range(low, high, 0, BITS)
    if RANGE_SEARCH and BITS < 8:
        best = tl.full([ROWS], float("inf"), tl.float32)
        for step in range(11):
            trial_scale, trial_minimum = _range(low, high, step, BITS)
            back = _codes(x, trial_scale, trial_minimum, BITS) * trial_scale.to(tl.float32)[:, None]
            error = tl.where(valid, x - (back + trial_minimum.to(tl.float32)[:, None]), 0.0)
            error = tl.sum(error * error, 1)
            scale = tl.where(error < best, trial_scale, scale)
            minimum = tl.where(error < best, trial_minimum, minimum)
            best = tl.minimum(error, best)
    packed = _codes(x, scale, minimum, BITS).to(tl.int32)
    if FIELDS > 1:
        shift = tl.arange(0, FIELDS) * BITS
        packed = tl.sum(tl.reshape(packed, [ROWS, FIELDS, WIDTH]) << shift[None, :, None], 1)
    byte = tl.arange(0, WIDTH)
    codes_ptr = (chunk_ptr + (CODES + offset * ROW_BYTES))[:, None] + byte[None, :]
    tl.store(codes_ptr, packed.to(tl.uint8), mask=keep[:, None] & (byte < ROW_BYTES)[None, :])
    word = scale.to(tl.uint16, bitcast=True).to(tl.uint32)
    word |= minimum.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    tl.store((chunk_ptr + (META + offset * 4)).to(tl.pointer_type(tl.uint32)), word, mask=keep)


@triton.jit
def _keep_rows(
    x, in_row, dim, row_ptr, slot, head, block_stride, head_stride, place_stride, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Write rows x [rows, columns], whose columns are the dimensions ``dim``, as they are to their window's slots."""
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    row_ptr += block * block_stride + head.to(tl.int64) * head_stride + place * place_stride
    tl.store(row_ptr[:, None] + dim[None, :], x, mask=(slot >= 0)[:, None] & in_row[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _reshape_and_cache_kernel(
    key_ptr, value_ptr, kv_cache_ptr, slot_mapping_ptr, positions_ptr,
    offset_ptr, partner_ptr, cos_sin_ptr, equalization_ptr, num_rows,
    key_stride, value_stride, block_stride, head_stride,
    recent_ptr, recent_slots_ptr, recent_block_stride, recent_head_stride, recent_place_stride,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    V_CODES: tl.constexpr, K_META: tl.constexpr, V_META: tl.constexpr, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr,
    KEY_HADAMARD: tl.constexpr, VALUE_HADAMARD: tl.constexpr, RANGE_SEARCH: tl.constexpr,
    RECENT_BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, head = row // NUM_KV_HEADS, row % NUM_KV_HEADS
    slot = tl.load(slot_mapping_ptr + token, mask=row < num_rows, other=-1).to(tl.int64)
    keep = slot >= 0
    loaded = keep
    recent_slot = slot
    if recent_ptr is not None:
        recent_slot = tl.load(recent_slots_ptr + token, mask=row < num_rows, other=-1).to(tl.int64)
        loaded |= recent_slot >= 0
    chunk_ptr = kv_cache_ptr + slot // BLOCK_SIZE * block_stride + head.to(tl.int64) * head_stride
    offset = slot % BLOCK_SIZE
    if tl.program_id(1) == 0:
        dim, in_row = byte_columns(HEAD_SIZE, K_BITS)
        valid = loaded[:, None] & in_row[None, :]
        source = key_ptr + token.to(tl.int64)[:, None] * key_stride + (head * HEAD_SIZE)[:, None] + dim[None, :]
        x = tl.load(source, mask=valid, other=0.0)
        if recent_ptr is not None:
            _keep_rows(
                x, in_row, dim, recent_ptr, recent_slot, head, recent_block_stride, recent_head_stride,
                recent_place_stride, RECENT_BLOCK_SIZE,
            )  # fmt: skip
        x = x.to(tl.float32)
        if offset_ptr is not None:
            position = tl.load(positions_ptr + token, mask=keep, other=0)
            x -= rotated_offset(
                offset_ptr, partner_ptr, cos_sin_ptr, head, position, dim, valid, HEAD_SIZE, ROTARY_DIM, IS_NEOX
            )
        if equalization_ptr is not None:
            factor = tl.load(equalization_ptr + (head * HEAD_SIZE)[:, None] + dim[None, :], mask=valid, other=1.0)
            x = tl.math.div_rn(x, factor)
        if KEY_HADAMARD:
            x = hadamard_rows(x, dim, HEAD_SIZE)
        _store_rows(x, in_row[None, :], chunk_ptr, offset, keep, K_ROW, 0, K_META, K_BITS, RANGE_SEARCH)
    else:
        dim, in_row = byte_columns(HEAD_SIZE, V_BITS)
        valid = loaded[:, None] & in_row[None, :]
        source = value_ptr + token.to(tl.int64)[:, None] * value_stride + (head * HEAD_SIZE)[:, None] + dim[None, :]
        x = tl.load(source, mask=valid, other=0.0)
        if recent_ptr is not None:
            _keep_rows(
                x, in_row, dim, recent_ptr + HEAD_SIZE, recent_slot, head, recent_block_stride, recent_head_stride,
                recent_place_stride, RECENT_BLOCK_SIZE,
            )  # fmt: skip
        x = x.to(tl.float32)
        if VALUE_HADAMARD:
            x = hadamard_rows(x, dim, HEAD_SIZE)
        _store_rows(x, in_row[None, :], chunk_ptr, offset, keep, V_ROW, V_CODES, V_META, V_BITS, RANGE_SEARCH)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    layout: PageLayout,
    transforms: LayerTransforms,
    recent: RecentRows | None = None,
) -> None:
    """Transform, quantize, pack and scatter new tokens to their slots, in place.

    As :func:`reshape_and_cache_ref`, which has the arguments' shapes. Where a number lies
    within rounding of the middle between two codes, this kernel may take the other code.

    Args:
        recent: where a recent window keeps the tokens, as :func:`store_rows_ref` does.
    """
    num_tokens, num_kv_heads, head_size = key.shape
    assert head_size == layout.head_size and value.shape == key.shape, (key.shape, value.shape, layout)
    for rows in (key, value):
        assert rows.stride(2) == 1 and rows.stride(1) == head_size, "a token's heads must be contiguous"
    check_cache(kv_cache, layout)
    assert kv_cache.shape[1] == num_kv_heads and slot_mapping.shape[0] <= num_tokens
    assert slot_mapping.is_contiguous() and slot_mapping.dtype == torch.int64
    if transforms.key_offset is not None:
        assert positions is not None and positions.is_contiguous() and positions.dtype == torch.int64
    if recent is not None:
        recent.check(key, slot_mapping.shape[0])
    num_rows = slot_mapping.shape[0] * num_kv_heads
    if num_rows == 0:
        return
    rotary = transforms.rotary if transforms.key_offset is not None else None
    rows_per_program = 32 if num_rows >= MANY_ROWS else 16
    _reshape_and_cache_kernel[(triton.cdiv(num_rows, rows_per_program), 2)](
        key, value, kv_cache, slot_mapping, positions if transforms.key_offset is not None else None,
        transforms.key_offset, transforms.offset_partner, rotary and rotary.cos_sin, transforms.key_equalization,
        num_rows, key.stride(0), value.stride(0), kv_cache.stride(0), kv_cache.stride(1),
        recent and recent.kv_cache, recent and recent.slot_mapping,
        *(recent.kv_cache.stride()[:3] if recent else (0, 0, 0)),
        NUM_KV_HEADS=num_kv_heads, HEAD_SIZE=head_size, BLOCK_SIZE=layout.block_size,
        K_BITS=layout.k_bits, V_BITS=layout.v_bits, K_ROW=layout.k_row_bytes, V_ROW=layout.v_row_bytes,
        V_CODES=layout.v_codes_offset, K_META=layout.k_meta_offset, V_META=layout.v_meta_offset,
        ROTARY_DIM=rotary.rotary_dim if rotary else 0, IS_NEOX=rotary.is_neox if rotary else True,
        KEY_HADAMARD=transforms.key_hadamard, VALUE_HADAMARD=transforms.value_hadamard,
        RANGE_SEARCH=transforms.range_search, RECENT_BLOCK_SIZE=recent.kv_cache.shape[2] if recent else 0,
        ROWS=rows_per_program, num_warps=row_warps(head_size),
    )  # fmt: skip
