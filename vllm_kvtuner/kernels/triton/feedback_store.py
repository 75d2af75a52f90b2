"""Store of one side, keys or values, with round feedback: what pages/feedback.py computes, a tile of rows a program."""

import torch
import triton
import triton.language as tl

from vllm_kvtuner.kernels.contract import Pages, WindowRows
from vllm_kvtuner.kernels.triton.codes import byte_columns, inverse_step, shrunk_range, write_rows
from vllm_kvtuner.kernels.triton.common import FP16_MAX, load_rows_to_pack, program_rows, row_warps
from vllm_kvtuner.pages.transforms import KEY

ROWS = 16
"""Tokens of a program, which all have the same KV head and hence the same coefficients."""


@triton.jit
def _round_rows(x, scale, minimum, dim, in_row, columns_ptr, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """Codes of rows x [rows, columns], fp32, in one range for each, and what their errors cost, [rows].

    Args:
        scale: fp16 [rows].
        minimum: fp16 [rows].
        dim: int32 [columns], the dimension of each.
        in_row: bool [columns], False for padding.
        columns_ptr: of the head: fp16 [head_size, head_size], row j the coefficients of channel j, its weight at j.
    """
    step, base, inverse = scale.to(tl.float32), minimum.to(tl.float32), inverse_step(scale)
    aims = x
    codes = tl.zeros_like(x)
    cost = tl.zeros_like(step)
    for behind in range(HEAD_SIZE):
        channel = HEAD_SIZE - 1 - behind
        here = (in_row & (dim == channel))[None, :]
        aim = tl.sum(tl.where(here, aims, 0.0), 1)
        exact = tl.sum(tl.where(here, x, 0.0), 1)
        code = tl.minimum(tl.maximum(tl.floor((aim - base) * inverse + 0.5), 0.0), (1 << BITS) - 1.0)
        number = code * step + base
        codes = tl.where(here, code[:, None], codes)
        weight = tl.load(columns_ptr + channel * HEAD_SIZE + channel).to(tl.float32)
        cost += weight * weight * (aim - number) * (aim - number)
        before = in_row & (dim < channel)
        coefficient = tl.load(columns_ptr + channel * HEAD_SIZE + dim, mask=before, other=0.0).to(tl.float32)
        aims += coefficient[None, :] * (exact - number)[:, None]
    return codes, cost


@triton.jit(do_not_specialize=["num_slots"])
def _feedback_store_kernel(
    rows_ptr, kv_cache_ptr, slot_mapping_ptr, positions_ptr, axis_stride, axes_ptr, table_ptr,
    offset_ptr, partner_ptr, cos_sin_ptr, equalization_ptr, columns_ptr, ranges_ptr,
    num_slots, token_stride, block_stride, head_stride,
    window_ptr, window_slots_ptr, window_block_stride, window_head_stride, window_place_stride,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr,
    CODES: tl.constexpr, META: tl.constexpr, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, AXES: tl.constexpr,
    HADAMARD: tl.constexpr, RANGES: tl.constexpr, WINDOW_BLOCK_SIZE: tl.constexpr, WINDOW_BEGIN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.zeros([ROWS], tl.int32) + tl.program_id(1)
    present = token < num_slots
    slot = tl.load(slot_mapping_ptr + token, mask=present, other=-1).to(tl.int64)
    dim, in_row = byte_columns(HEAD_SIZE, BITS)
    x = load_rows_to_pack(
        rows_ptr, token_stride, token, head, present, slot, dim, in_row,
        positions_ptr, axis_stride, axes_ptr, table_ptr, offset_ptr, partner_ptr, cos_sin_ptr, equalization_ptr,
        window_ptr, window_slots_ptr, window_block_stride, window_head_stride, window_place_stride,
        HEAD_SIZE, ROTARY_DIM, IS_NEOX, AXES, HADAMARD, WINDOW_BLOCK_SIZE, WINDOW_BEGIN,
    )  # fmt: skip

    valid = in_row[None, :]
    nan = tl.max(tl.where(valid & (x != x), 1, 0), 1) > 0
    x = tl.where(valid & (x == x), tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX), 0.0)
    low = tl.min(tl.where(valid, x, float("inf")), 1)
    high = tl.max(tl.where(valid, x, float("-inf")), 1)
    columns_ptr += tl.program_id(1) * HEAD_SIZE * HEAD_SIZE
    scale, minimum = shrunk_range(low, high, tl.load(ranges_ptr), tl.load(ranges_ptr + 1))
    codes, cost = _round_rows(x, scale, minimum, dim, in_row, columns_ptr, HEAD_SIZE, BITS)
    for index in range(1, RANGES):
        stretch, shift = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)
        trial_scale, trial_minimum = shrunk_range(low, high, stretch, shift)
        trial, trial_cost = _round_rows(x, trial_scale, trial_minimum, dim, in_row, columns_ptr, HEAD_SIZE, BITS)
        better = trial_cost < cost
        cost = tl.where(better, trial_cost, cost)
        codes = tl.where(better[:, None], trial, codes)
        scale, minimum = tl.where(better, trial_scale, scale), tl.where(better, trial_minimum, minimum)
    unknown = tl.full([ROWS], float("nan"), tl.float16)
    scale, minimum = tl.where(nan, unknown, scale), tl.where(nan, unknown, minimum)
    chunk_ptr = kv_cache_ptr + slot // BLOCK_SIZE * block_stride + head.to(tl.int64) * head_stride
    write_rows(codes, scale, minimum, chunk_ptr, slot % BLOCK_SIZE, slot >= 0, ROW_BYTES, CODES, META, BITS)


def store_side(
    side: str,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    pages: Pages,
    window: WindowRows | None,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.ReshapeAndCache`, of the side alone, which has round feedback."""
    kv_cache, layout, transforms, _ = pages
    keys = side == KEY
    rows, bits = (key, layout.k_bits) if keys else (value, layout.v_bits)
    feedback = transforms.feedback(side, bits)
    assert feedback is not None
    offset = transforms.key_offset if keys else None
    rotary = transforms.rotary if offset is not None else None
    several = transforms.positions if keys else None
    kept, kept_slots = (None, None) if window is None else window
    kept_strides = (0, 0, 0) if kept is None else kept.stride()
    block_stride, head_stride, _, _ = kv_cache.stride()
    num_slots, rows_per_program = slot_mapping.shape[0], program_rows(layout.head_size, ROWS)
    _feedback_store_kernel[(triton.cdiv(num_slots, rows_per_program), key.shape[1])](
        rows, kv_cache, slot_mapping, positions if offset is not None else None,
        positions.stride()[0] if several and positions is not None else 0,
        several and several.axes, several and pages.positions,
        offset, transforms.offset_partner if keys else None, rotary and rotary.cos_sin,
        transforms.key_equalization if keys else None, feedback.columns, feedback.range_factors[bits],
        num_slots, rows.stride()[0], block_stride, head_stride,
        kept, kept_slots, kept_strides[0], kept_strides[1], kept_strides[2],
        HEAD_SIZE=layout.head_size, BLOCK_SIZE=layout.block_size, BITS=bits,
        ROW_BYTES=layout.k_row_bytes if keys else layout.v_row_bytes,
        CODES=layout.k_codes_offset if keys else layout.v_codes_offset,
        META=layout.k_meta_offset if keys else layout.v_meta_offset,
        ROTARY_DIM=rotary.rotary_dim if rotary else 0, IS_NEOX=rotary.is_neox if rotary else True,
        AXES=several.num_axes if several else 0,
        HADAMARD=transforms.key_hadamard if keys else transforms.value_hadamard,
        RANGES=len(feedback.ranges[bits]), WINDOW_BLOCK_SIZE=0 if kept is None else kept.shape[2],
        WINDOW_BEGIN=0 if keys else layout.head_size, ROWS=rows_per_program,
        num_warps=row_warps(layout.head_size),
    )  # fmt: skip
