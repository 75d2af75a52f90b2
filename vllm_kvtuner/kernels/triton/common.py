"""What several kernels share beside codes: loads of padded tiles and new rows, the key offset, Hadamard rotation."""

import triton
import triton.language as tl

from vllm_kvtuner.pages import layout

FP16_MAX = tl.constexpr(layout.FP16_MAX)
MAX_LARGE_ROWS = 8
"""Rows of a program above MAX_HEAD_SIZE, 32 of the Hadamard matrix's products there: from 64 on, Triton takes Hopper's
warp-group products (window_attention.py says why not)."""


def row_warps(head_size: int) -> int:
    """Warps of a program on whole rows of ``head_size``, the Hadamard matrix in registers included."""
    return 8 if head_size > 128 else 4


def program_rows(head_size: int, rows: int) -> int:
    """Of a program that takes ``rows`` where they fit."""
    return min(rows, MAX_LARGE_ROWS) if head_size > layout.MAX_HEAD_SIZE else rows


@triton.jit
def load_padded(pointers, index, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """A tile that ``index`` along one axis pads with zeros beyond SIZE, if PADDED; otherwise a plain load."""
    if PADDED:
        return tl.load(pointers, mask=index < SIZE, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def hadamard_rows(x, dim, HEAD_SIZE: tl.constexpr):
    """``x`` [rows, columns] fp32 times transforms.py's Hadamard matrix, with nearly fp32's accuracy.

    The matrix is made of +1, -1 and 0, exact in fp16; each row of x goes in as two fp16 terms, scaled by a power of
    two so that they hold 22 bits of every number that is within 2^-14 of the row's largest.

    Args:
        x: column c holds dimension dim[c]; padding columns hold 0.
        dim: int32 [columns], any order. What comes out in padding columns has no meaning.
        HEAD_SIZE: columns without padding.
    """
    ROWS: tl.constexpr = x.shape[0]
    ALL_COLUMNS: tl.constexpr = x.shape[1]
    if HEAD_SIZE > 256:
        # A matrix of 128 columns, and all of its products at once, rather than one that no shared memory holds.
        x, dim = _halves_apart(x, dim)
        x, dim = _halves_apart(x, dim)
    TALL_ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    unit = fp16_unit(x)
    scaled = tl.div_rn(x, unit[:, None])
    high = scaled.to(tl.float16)
    low = (scaled - high.to(tl.float32)).to(tl.float16)
    if COLUMNS > 128:
        # Half of the columns at a time, so that the matrix fits any card's shared memory.
        left, right = tl.split(tl.trans(tl.reshape(dim, [2, COLUMNS // 2])))
        y = tl.join(_times_signs(high, low, dim, left, HEAD_SIZE), _times_signs(high, low, dim, right, HEAD_SIZE))
        y = tl.reshape(tl.permute(y, [0, 2, 1]), [TALL_ROWS, COLUMNS])
    else:
        y = _times_signs(high, low, dim, dim, HEAD_SIZE)
    y *= (unit * (HEAD_SIZE & -HEAD_SIZE) ** -0.5)[:, None]
    if HEAD_SIZE > 256:
        y = tl.reshape(y, [ROWS, ALL_COLUMNS])
    return y


@triton.jit
def _halves_apart(x, dim):
    """The first step of a fast Hadamard transform: sums and differences of each row's halves, as rows of their own.

    What remains is the transform of every new row. Both halves have the same dimensions but for one bit, which the
    second has: so it is where a power of two of columns holds as many dimensions, in all orders that packed codes have.

    Returns:
        [2 * rows, columns / 2], and the dimensions of the first half.
    """
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))
    both = tl.permute(tl.join(left + right, left - right), [0, 2, 1])
    first, _ = tl.split(tl.trans(tl.reshape(dim, [2, HALF])))
    return tl.reshape(both, [2 * ROWS, HALF]), first


@triton.jit
def _times_signs(high, low, dim, out_dim, HEAD_SIZE: tl.constexpr):
    """(high + low) [rows, columns] times the signs of the Hadamard matrix for dimensions dim and out_dim."""
    BLOCK: tl.constexpr = HEAD_SIZE & -HEAD_SIZE
    shared = dim[:, None] & out_dim[None, :] & (BLOCK - 1)
    # Sylvester's matrix: the sign is the parity of the bits that both indices share.
    if BLOCK > 256:
        shared ^= shared >> 8
    shared ^= shared >> 4
    shared ^= shared >> 2
    shared ^= shared >> 1
    sign = tl.where((shared & 1) == 0, 1.0, -1.0)
    if BLOCK != HEAD_SIZE:
        sign = tl.where(dim[:, None] // BLOCK == out_dim[None, :] // BLOCK, sign, 0.0)
    sign = sign.to(tl.float16)
    return tl.dot(high, sign, tl.dot(low, sign))


@triton.jit
def fp16_unit(x):
    """A power of two [rows] by which rows ``x`` [rows, columns] fp32 can be divided to fill fp16's range."""
    bits = tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000
    return tl.maximum(bits.to(tl.float32, bitcast=True), 2.0**-100) * 2.0**-14


@triton.jit
def load_positions(row_ptr, axis_stride, keep, axis, AXES: tl.constexpr):
    """Of several positions of a token the one that turns a column: [rows, columns], of the table's type.

    Args:
        row_ptr: pointers [rows] to each token's first position.
        axis_stride: numbers from one of its positions to the next.
        keep: bool [rows]; elsewhere positions are 0.
        axis: int32 [columns], which position it is, less than AXES.
    """
    position = tl.load(row_ptr, mask=keep, other=0)[:, None]
    for index in tl.static_range(1, AXES):
        other = tl.load(row_ptr + index * axis_stride, mask=keep, other=0)
        position = tl.where(axis[None, :] == index, other[:, None], position)
    return position


@triton.jit
def axis_of(axes_ptr, dim, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr):
    """Which of a token's positions turns each dimension ``dim`` [columns]; 0 for those that nothing turns."""
    pair = dim % (ROTARY_DIM // 2) if IS_NEOX else dim // 2
    return tl.load(axes_ptr + pair, mask=dim < ROTARY_DIM, other=0)


@triton.jit
def rotated_offset(
    offset_ptr,
    partner_ptr,
    cos_sin_ptr,
    head,
    position,
    dim,
    valid,
    HEAD_SIZE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    IS_NEOX: tl.constexpr,
):
    """R_t m = m cos + partner sin: fp32 [rows, columns] for each row's KV head and position; 0 where not valid.

    Args:
        offset_ptr: [num_kv_heads, head_size] fp32, before RoPE.
        partner_ptr: as offset_ptr, what the sines multiply.
        cos_sin_ptr: [max_position, rotary_dim], unread if ROTARY_DIM is 0.
        head: int32 [rows].
        position: int64 [rows, 1], or [rows, columns] where columns turn by different ones.
        dim: int32 [columns].
        valid: bool [rows, columns].
    """
    index = head[:, None] * HEAD_SIZE + dim[None, :]
    offset = tl.load(offset_ptr + index, mask=valid, other=0.0)
    if ROTARY_DIM > 0:
        HALF: tl.constexpr = ROTARY_DIM // 2
        pair = dim % HALF if IS_NEOX else dim // 2
        row = cos_sin_ptr + position * ROTARY_DIM + pair[None, :]
        rotated = valid & (dim < ROTARY_DIM)[None, :]
        cos = tl.load(row, mask=rotated, other=1.0).to(tl.float32)
        sin = tl.load(row + HALF, mask=rotated, other=0.0).to(tl.float32)
        offset = offset * cos + tl.load(partner_ptr + index, mask=rotated, other=0.0) * sin
    return offset


@triton.jit
def load_rows_to_pack(
    rows_ptr, token_stride, token, head, present, slot, dim, in_row,
    positions_ptr, axis_stride, axes_ptr, table_ptr, offset_ptr, partner_ptr, cos_sin_ptr, equalization_ptr,
    window_ptr, window_slots_ptr, window_block_stride, window_head_stride, window_place_stride,
    HEAD_SIZE: tl.constexpr, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr, AXES: tl.constexpr,
    HADAMARD: tl.constexpr, WINDOW_BLOCK_SIZE: tl.constexpr, WINDOW_BEGIN: tl.constexpr,
):  # fmt: skip
    """Rows of new keys or values after the layer's transforms, fp32 [rows, columns]; the recent window gets them as
    they are.

    Rows without a slot have no meaning, as have padding columns.

    Args:
        rows_ptr: of keys or values, [num_tokens, num_kv_heads, head_size].
        token_stride: numbers from token to token.
        token: int32 [rows].
        head: int32 [rows], of KV heads.
        present: bool [rows], False beyond the last token.
        slot: int64 [rows], in the packed pages, or -1.
        dim: int32 [columns], as codes.byte_columns has them.
        in_row: bool [columns], False for padding.
        positions_ptr: int64 [num_tokens], or AXES of these rows, axis_stride apart; unread without an offset.
        axes_ptr: int32 [ROTARY_DIM / 2], which position turns a pair; unread if AXES is 0, as is the next.
        table_ptr: int32 [num_slots, AXES], where each token's positions are kept.
        offset_ptr: as rotated_offset, like the two after it, or None.
        equalization_ptr: [num_kv_heads, head_size] fp32, or None.
        window_ptr: of the recent window's cache, or None.
        window_slots_ptr: int64 [num_tokens], the window's slots, unread without one.
        window_block_stride: numbers, as are the next two, between blocks, KV heads and tokens of the window's cache.
        AXES: positions of a token, 0 where it has one.
        HADAMARD: whether rows are rotated.
        WINDOW_BLOCK_SIZE: tokens of a block of the window.
        WINDOW_BEGIN: number at which a token there has such a row: a value stands behind its key.
    """
    loaded = slot >= 0
    if window_ptr is not None:
        window_slot = tl.load(window_slots_ptr + token, mask=present, other=-1).to(tl.int64)
        loaded |= window_slot >= 0
    valid = loaded[:, None] & in_row[None, :]
    number = (head * HEAD_SIZE)[:, None] + dim[None, :]
    x = tl.load(rows_ptr + token.to(tl.int64)[:, None] * token_stride + number, mask=valid, other=0.0)
    if window_ptr is not None:
        _keep_rows(
            x, in_row, dim, window_ptr + WINDOW_BEGIN, window_slot, head, window_block_stride, window_head_stride,
            window_place_stride, WINDOW_BLOCK_SIZE,
        )  # fmt: skip
    x = x.to(tl.float32)
    if offset_ptr is not None:
        keep = slot >= 0
        if AXES > 0:
            axis = axis_of(axes_ptr, dim, ROTARY_DIM, IS_NEOX)
            position = load_positions(positions_ptr + token, axis_stride, keep, axis, AXES)
            # All KV heads and layers write the same numbers; one head is enough.
            for index in tl.static_range(AXES):
                one = tl.load(positions_ptr + index * axis_stride + token, mask=keep, other=0).to(tl.int32)
                tl.store(table_ptr + slot * AXES + index, one, mask=keep & (head == 0))
        else:
            position = tl.load(positions_ptr + token, mask=keep, other=0)[:, None]
        x -= rotated_offset(
            offset_ptr, partner_ptr, cos_sin_ptr, head, position, dim, valid, HEAD_SIZE, ROTARY_DIM, IS_NEOX
        )
    if equalization_ptr is not None:
        x = tl.math.div_rn(x, tl.load(equalization_ptr + number, mask=valid, other=1.0))
    if HADAMARD:
        x = hadamard_rows(x, dim, HEAD_SIZE)
    return x


@triton.jit
def _keep_rows(
    x, in_row, dim, row_ptr, slot, head, block_stride, head_stride, place_stride, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Write rows x [rows, columns], whose columns are the dimensions ``dim``, as they are to their window's slots."""
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    row_ptr += block * block_stride + head.to(tl.int64) * head_stride + place * place_stride
    tl.store(row_ptr[:, None] + dim[None, :], x, mask=(slot >= 0)[:, None] & in_row[None, :])
