"""Store of one side, keys or values, with round feedback: what pages/feedback.py computes, a tile of rows a program."""

import torch
import triton
import triton.language as tl

from vllm_kvtuner.kernels.contract import Pages, WindowRows
from vllm_kvtuner.kernels.triton.codes import byte_columns, inverse_step, shrunk_range, write_rows
from vllm_kvtuner.kernels.triton.common import hadamard_rows, keep_rows, rotated_offset, row_warps
from vllm_kvtuner.pages.layout import FEEDBACK_BITS

KEYS, VALUES = "keys", "values"
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
    rows_ptr, kv_cache_ptr, slot_mapping_ptr, positions_ptr, offset_ptr, partner_ptr, cos_sin_ptr, equalization_ptr,
    columns_ptr, ranges_ptr, num_slots, token_stride, block_stride, head_stride,
    window_ptr, window_slots_ptr, window_block_stride, window_head_stride, window_place_stride,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr,
    CODES: tl.constexpr, META: tl.constexpr, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, HADAMARD: tl.constexpr,
    SCALE_BITS: tl.constexpr, RANGES: tl.constexpr, WINDOW_BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.zeros([ROWS], tl.int32) + tl.program_id(1)
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_slots, other=-1).to(tl.int64)
    keep = slot >= 0
    loaded = keep
    window_slot = slot
    if window_ptr is not None:
        window_slot = tl.load(window_slots_ptr + token, mask=token < num_slots, other=-1).to(tl.int64)
        loaded |= window_slot >= 0
    dim, in_row = byte_columns(HEAD_SIZE, BITS)
    valid = loaded[:, None] & in_row[None, :]
    source = rows_ptr + token.to(tl.int64)[:, None] * token_stride + (head * HEAD_SIZE)[:, None] + dim[None, :]
    x = tl.load(source, mask=valid, other=0.0)
    if window_ptr is not None:
        keep_rows(
            x, in_row, dim, window_ptr, window_slot, head, window_block_stride, window_head_stride,
            window_place_stride, WINDOW_BLOCK_SIZE,
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
    if HADAMARD:
        x = hadamard_rows(x, dim, HEAD_SIZE)

    present = in_row[None, :]
    nan = tl.max(tl.where(present & (x != x), 1, 0), 1) > 0
    x = tl.where(present & (x == x), tl.minimum(tl.maximum(x, -65504.0), 65504.0), 0.0)
    low = tl.min(tl.where(present, x, float("inf")), 1)
    high = tl.max(tl.where(present, x, float("-inf")), 1)
    columns_ptr += tl.program_id(1) * HEAD_SIZE * HEAD_SIZE
    scale, minimum = shrunk_range(low, high, tl.load(ranges_ptr), tl.load(ranges_ptr + 1), BITS, SCALE_BITS)
    codes, cost = _round_rows(x, scale, minimum, dim, in_row, columns_ptr, HEAD_SIZE, BITS)
    for index in range(1, RANGES):
        stretch, shift = tl.load(ranges_ptr + 2 * index), tl.load(ranges_ptr + 2 * index + 1)
        trial_scale, trial_minimum = shrunk_range(low, high, stretch, shift, BITS, SCALE_BITS)
        trial, trial_cost = _round_rows(x, trial_scale, trial_minimum, dim, in_row, columns_ptr, HEAD_SIZE, BITS)
        better = trial_cost < cost
        cost = tl.where(better, trial_cost, cost)
        codes = tl.where(better[:, None], trial, codes)
        scale, minimum = tl.where(better, trial_scale, scale), tl.where(better, trial_minimum, minimum)
    unknown = tl.full([ROWS], float("nan"), tl.float16)
    scale, minimum = tl.where(nan, unknown, scale), tl.where(nan, unknown, minimum)
    chunk_ptr = kv_cache_ptr + slot // BLOCK_SIZE * block_stride + head.to(tl.int64) * head_stride
    write_rows(codes, scale, minimum, chunk_ptr, slot % BLOCK_SIZE, keep, ROW_BYTES, CODES, META, BITS, SCALE_BITS)


def rounds(side: str, pages: Pages) -> bool:
    """Whether rows of a side, KEYS or VALUES, are rounded with feedback."""
    layout, transforms = pages.layout, pages.transforms
    if side == KEYS:
        return transforms.key_feedback is not None and layout.k_bits in FEEDBACK_BITS
    return transforms.value_feedback is not None and layout.v_bits in FEEDBACK_BITS


def store_side(
    side: str,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    pages: Pages,
    window: WindowRows | None,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.ReshapeAndCache`, of the side alone, which :func:`rounds`."""
    kv_cache, layout, transforms = pages
    keys = side == KEYS
    rows, bits, feedback = (
        (key, layout.k_bits, transforms.key_feedback) if keys else (value, layout.v_bits, transforms.value_feedback)
    )
    assert feedback is not None
    offset = transforms.key_offset if keys else None
    rotary = transforms.rotary if offset is not None else None
    kept, kept_slots = (None, None) if window is None else window
    kept_strides = (0, 0, 0) if kept is None else kept.stride()
    if kept is not None and not keys:
        kept = kept[..., layout.head_size :]  # a value beside its key
    block_stride, head_stride, _, _ = kv_cache.stride()
    num_slots = slot_mapping.shape[0]
    _feedback_store_kernel[(triton.cdiv(num_slots, ROWS), key.shape[1])](
        rows, kv_cache, slot_mapping, positions if offset is not None else None,
        offset, transforms.offset_partner if keys else None, rotary and rotary.cos_sin,
        transforms.key_equalization if keys else None, feedback.columns, feedback.range_factors[bits],
        num_slots, rows.stride()[0], block_stride, head_stride,
        kept, kept_slots, kept_strides[0], kept_strides[1], kept_strides[2],
        HEAD_SIZE=layout.head_size, BLOCK_SIZE=layout.block_size, BITS=bits,
        ROW_BYTES=layout.k_row_bytes if keys else layout.v_row_bytes,
        CODES=layout.k_codes_offset if keys else layout.v_codes_offset,
        META=layout.k_meta_offset if keys else layout.v_meta_offset, SCALE_BITS=layout.scale_bits,
        ROTARY_DIM=rotary.rotary_dim if rotary else 0, IS_NEOX=rotary.is_neox if rotary else True,
        HADAMARD=transforms.key_hadamard if keys else transforms.value_hadamard,
        RANGES=len(feedback.ranges[bits]), WINDOW_BLOCK_SIZE=0 if kept is None else kept.shape[2],
        ROWS=ROWS, num_warps=row_warps(layout.head_size),
    )  # fmt: skip
