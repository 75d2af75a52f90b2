"""Fold queries into the frame of the stored keys, in the order of their packed codes: slice by slice (codes.py)."""

import math

import torch
import triton
import triton.language as tl

from vllm_kvtuner.kernels.contract import AttentionShape
from vllm_kvtuner.kernels.triton.codes import num_slices, slice_dim, slice_shift, slice_width, slice_words
from vllm_kvtuner.kernels.triton.common import fp16_unit, hadamard_rows, program_rows, row_warps
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

ROW_CONSTANTS = 4
"""fp32 numbers per folded query row: factor of its logits, sum, factor and constant of the key offset."""
MIN_FOLDED_SIZE = 128
ROWS_PER_PROGRAM = 16


def folded_size(head_size: int) -> int:
    """Numbers of a folded query row, padding of the slices included: at most 8 slices of at least 16."""
    return max(MIN_FOLDED_SIZE, triton.next_power_of_2(head_size))


@triton.jit
def _store_terms(pointers, x, mask, STRIDE: tl.constexpr):
    """Store fp32 x as two 16-bit numbers that add up to it, STRIDE apart."""
    high = x.to(pointers.dtype.element_ty)
    tl.store(pointers, high, mask=mask)
    tl.store(pointers + STRIDE, (x - high.to(tl.float32)).to(high.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _fold_query_kernel(
    query_ptr, equalization_ptr, offset_ptr, folded_ptr, constants_ptr, coefficients_ptr,
    num_rows, scale, token_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr,
    FOLDED_SIZE: tl.constexpr, HADAMARD: tl.constexpr, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Folded query rows, each scaled by a power of two into fp16's range, and what undoes that in the logits.

    Logits come out to base 2 as constants[0] * (s_t dot + m_t constants[1] + offset dot * constants[2] + constants[3]),
    dot being the product of the folded row with the codes as subnormals.
    """
    WORDS: tl.constexpr = slice_words(HEAD_SIZE, BITS)
    WIDTH: tl.constexpr = slice_width(HEAD_SIZE, BITS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = row < num_rows
    head = row % NUM_HEADS
    source = query_ptr + (row // NUM_HEADS).to(tl.int64) * token_stride + head * HEAD_SIZE
    statics = head // GROUP * HEAD_SIZE
    column = tl.arange(0, num_slices(BITS) * WIDTH)
    dim = slice_dim(column // WIDTH, column % WIDTH, HEAD_SIZE, BITS)
    in_row = column % WIDTH < WORDS
    valid = keep[:, None] & in_row[None, :]
    x = tl.load(source[:, None] + dim[None, :], mask=valid, other=0.0).to(tl.float32)
    constant = tl.zeros([ROWS], tl.float32)
    if offset_ptr is not None:
        unrotated = valid & (dim >= ROTARY_DIM)[None, :]
        constant = tl.sum(x * tl.load(offset_ptr + statics[:, None] + dim[None, :], mask=unrotated, other=0.0), 1)
    if equalization_ptr is not None:
        x *= tl.load(equalization_ptr + statics[:, None] + dim[None, :], mask=valid, other=1.0)
    if HADAMARD:
        x = hadamard_rows(x, dim, HEAD_SIZE)
        x = tl.where(in_row[None, :], x, 0.0)
    # fp16 keeps numbers down to 2^-29 of the largest, less the 8 bits that slices are brought down by.
    unit = fp16_unit(x)
    weight = (1 << slice_shift(column // WIDTH, BITS)).to(tl.float32)[None, :]
    folded = tl.div_rn(x, unit[:, None] * weight).to(tl.float16)
    tl.store(folded_ptr + row.to(tl.int64)[:, None] * FOLDED_SIZE + column[None, :], folded, mask=keep[:, None])
    total = tl.sum(folded.to(tl.float32) * weight, 1)
    constants = constants_ptr + row * 4
    tl.store(constants, scale * unit * 2.0**24, mask=keep)
    tl.store(constants + 1, total * 2.0**-24, mask=keep)
    if offset_ptr is not None:
        tl.store(constants + 3, constant * 2.0**-24 / unit, mask=keep)
        if ROTARY_DIM > 0:
            HALF: tl.constexpr = ROTARY_DIM // 2
            pair = tl.arange(0, triton.next_power_of_2(HALF))
            first = pair if IS_NEOX else 2 * pair
            second = pair + HALF if IS_NEOX else 2 * pair + 1
            within = keep[:, None] & (pair < HALF)[None, :]
            q_a = tl.load(source[:, None] + first[None, :], mask=within, other=0.0).to(tl.float32)
            q_b = tl.load(source[:, None] + second[None, :], mask=within, other=0.0).to(tl.float32)
            m_a = tl.load(offset_ptr + statics[:, None] + first[None, :], mask=within, other=0.0)
            m_b = tl.load(offset_ptr + statics[:, None] + second[None, :], mask=within, other=0.0)
            # q . R_t m is the sum over pairs of (q_a m_a + q_b m_b) cos + (q_b m_a - q_a m_b) sin.
            cos, sin = q_a * m_a + q_b * m_b, q_b * m_a - q_a * m_b
            offset_unit = fp16_unit(tl.maximum(tl.abs(cos), tl.abs(sin)))
            tl.store(constants + 2, offset_unit * 2.0**-24 / unit, mask=keep)
            target = coefficients_ptr + row.to(tl.int64)[:, None] * (2 * ROTARY_DIM) + pair[None, :]
            _store_terms(target, tl.div_rn(cos, offset_unit[:, None]), within, ROTARY_DIM)
            _store_terms(target + HALF, tl.div_rn(sin, offset_unit[:, None]), within, ROTARY_DIM)


def fold_query(
    query: torch.Tensor,
    shape: AttentionShape,
    layout: PageLayout,
    transforms: LayerTransforms,
    folded: torch.Tensor,
    constants: torch.Tensor,
    coefficients: torch.Tensor,
) -> None:
    """Write what :func:`vllm_kvtuner.pages.transforms.fold_query` defines, ready for the matrix instructions.

    Args:
        query: [num_tokens, num_heads, head_size], a token's heads contiguous.
        shape: of the layer.
        layout: of its pages.
        transforms: of its keys.
        folded: [>= num_tokens * num_heads, folded_size(head_size)] fp16, each slice padded with zeros to at least 16.
        constants: [>= num_tokens * num_heads, ROW_CONSTANTS] fp32.
        coefficients: [>= num_tokens * num_heads * 2 * rotary_dim] fp16 or bf16: each row's factors on the cosines and
            sines of a position, in two terms; unwritten without a key offset.
    """
    num_rows = query.shape[0] * shape.num_heads
    rotary = transforms.rotary if transforms.key_offset is not None else None
    rows_per_program = program_rows(shape.head_size, ROWS_PER_PROGRAM)
    _fold_query_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        query, transforms.key_equalization, transforms.key_offset, folded, constants, coefficients,
        num_rows, shape.scale * math.log2(math.e), query.stride()[0],
        NUM_HEADS=shape.num_heads, GROUP=shape.group, HEAD_SIZE=shape.head_size, BITS=layout.k_bits,
        FOLDED_SIZE=folded.shape[1], HADAMARD=transforms.key_hadamard,
        ROTARY_DIM=rotary.rotary_dim if rotary else 0, IS_NEOX=rotary.is_neox if rotary else True,
        ROWS=rows_per_program, num_warps=row_warps(shape.head_size),
    )  # fmt: skip
