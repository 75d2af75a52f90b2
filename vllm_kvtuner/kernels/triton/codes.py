"""Code formats inside kernels, the twin of pages/codes.py: what packs, unpacks, quantizes and dequantizes codes.

Store and gather see a packed row byte by byte. Decode sees its 16-bit words, of which each holds 16 / bits codes, and
takes them by the slice: slice i of a row is code i of every word (bits i * bits and up). Word w of slice i is dimension
2 w + i // n + (i % n) head_size / n, with n = 8 / bits codes per byte.
"""

import triton
import triton.language as tl

from vllm_kvtuner.kernels.triton.common import FP16_MAX, load_padded


@triton.jit
def byte_columns(HEAD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """Columns of a tile that splits into the slices a packed byte holds, each padded to a power of two.

    Returns:
        dim: int32 [columns], the dimension a column holds; column field * width + j is dimension
            field * head_size / n + j, byte j's code number ``field``.
        valid: bool [columns], False for padding.
    """
    SLICE: tl.constexpr = HEAD_SIZE * BITS // 8
    WIDTH: tl.constexpr = triton.next_power_of_2(SLICE)
    column = tl.arange(0, 8 // BITS * WIDTH)
    return column // WIDTH * SLICE + column % WIDTH, column % WIDTH < SLICE


@triton.jit
def store_rows(
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
    low = tl.min(tl.where(valid, x, float("inf")), 1)
    high = tl.max(tl.where(valid, x, float("-inf")), 1)
    scale, minimum = _range(low, high, 0, BITS)
    if RANGE_SEARCH and BITS < 8:
        best = tl.full([ROWS], float("inf"), tl.float32)
        for step in range(11):
            trial_scale, trial_minimum = _range(low, high, step, BITS)
            back = _quantize(x, trial_scale, trial_minimum, BITS) * trial_scale.to(tl.float32)[:, None]
            error = tl.where(valid, x - (back + trial_minimum.to(tl.float32)[:, None]), 0.0)
            error = tl.sum(error * error, 1)
            scale = tl.where(error < best, trial_scale, scale)
            minimum = tl.where(error < best, trial_minimum, minimum)
            best = tl.minimum(error, best)
    codes = _quantize(x, scale, minimum, BITS)
    write_rows(codes, scale, minimum, chunk_ptr, offset, keep, ROW_BYTES, CODES, META, BITS)


@triton.jit
def write_rows(
    codes, scale, minimum, chunk_ptr, offset, keep,
    ROW_BYTES: tl.constexpr, CODES: tl.constexpr, META: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Pack and write codes, fp32 [rows, columns], and their fp16 scale and minimum; arguments as store_rows."""
    ROWS: tl.constexpr = codes.shape[0]
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = codes.shape[1] // FIELDS
    packed = codes.to(tl.int32)
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
def _range(low, high, step, BITS: tl.constexpr):
    """Scale and minimum, fp16, of rows between low and high when their range shrinks by factor number ``step``.

    The factors are codes.RANGE_FACTORS; they become fp32 where the reference rounds them.
    """
    stretch = 1.0 / ((1 << BITS) - 1)
    shift = 0.0
    for index in tl.static_range(1, 11):
        stretch = tl.where(step == index, (1.0 - 0.05 * index) / ((1 << BITS) - 1), stretch)
        shift = tl.where(step == index, 0.5 * (1.0 - (1.0 - 0.05 * index)), shift)
    return shrunk_range(low, high, stretch, shift)


@triton.jit
def shrunk_range(low, high, stretch, shift):
    """Scale and minimum, fp16, by the factors on high - low that the step and what the minimum moves by have."""
    scale = tl.minimum((high - low) * stretch, FP16_MAX)
    minimum = low + (high - low) * shift
    return scale.to(tl.float16), tl.minimum(tl.maximum(minimum, -FP16_MAX), FP16_MAX).to(tl.float16)


@triton.jit
def _quantize(x, scale, minimum, BITS: tl.constexpr):
    """Codes, as fp32, of rows x [rows, columns] under fp16 scale and minimum [rows]."""
    inverse = inverse_step(scale)
    codes = tl.floor((x - minimum.to(tl.float32)[:, None]) * inverse[:, None] + 0.5)
    return tl.minimum(tl.maximum(codes, 0.0), (1 << BITS) - 1.0)


@triton.jit
def inverse_step(scale):
    """1 / scale as fp32, or 0 for a scale of 0."""
    step = scale.to(tl.float32)
    return tl.where(step > 0, tl.math.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)


@triton.jit
def load_rows(
    chunk_ptr, offset, keep,
    HEAD_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, CODES: tl.constexpr, META: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Dequantized rows fp32 [rows, columns], columns as byte_columns has them, padding and rows not kept 0.

    Args:
        chunk_ptr: uint8 pointers [rows], the chunk that holds each row.
        offset: int32 [rows], the row's place within its block.
        keep: bool [rows].
    """
    ROWS: tl.constexpr = offset.shape[0]
    FIELDS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = triton.next_power_of_2(ROW_BYTES)
    byte = tl.arange(0, WIDTH)
    valid = keep[:, None] & (byte < ROW_BYTES)[None, :]
    codes = tl.load(chunk_ptr[:, None] + (CODES + offset * ROW_BYTES)[:, None] + byte[None, :], mask=valid, other=0)
    if FIELDS > 1:
        shift = (tl.arange(0, FIELDS) * BITS).to(tl.uint8)
        codes = (codes[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
        codes = tl.reshape(codes, [ROWS, FIELDS * WIDTH])
    scale, minimum = load_meta((chunk_ptr + (META + offset * 4)).to(tl.pointer_type(tl.uint32)), keep)
    _, in_row = byte_columns(HEAD_SIZE, BITS)
    return tl.where(in_row[None, :], codes.to(tl.float32) * scale[:, None] + minimum[:, None], 0.0)


@triton.jit
def load_meta(pointers, mask):
    """Scale and minimum, both fp32, of rows whose meta stands at ``pointers`` (uint32); 0 where masked out."""
    word = tl.load(pointers, mask=mask, other=0)
    scale = word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    minimum = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, minimum


@triton.constexpr_function
def num_slices(bits):
    """Slices of a row: codes of a 16-bit word."""
    return 16 // bits


@triton.constexpr_function
def slice_words(head_size, bits):
    """Words of a slice."""
    return head_size // num_slices(bits)


@triton.constexpr_function
def slice_width(head_size, bits):
    """Words of a slice, padding included: as many as a product of matrices takes at least."""
    return max(triton.next_power_of_2(slice_words(head_size, bits)), 16)


@triton.jit
def load_key_words(row_ptr, word, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """The words of rows for :func:`code_slice`: two in each uint32 [rows, words / 2], padding 0.

    Args:
        row_ptr: uint32 pointers [rows], where the codes of each row begin.
        word: int32 [words / 2], 0, 1, ... up to half of slice_width.
    """
    WORDS: tl.constexpr = slice_words(HEAD_SIZE, BITS)
    WIDTH: tl.constexpr = slice_width(HEAD_SIZE, BITS)
    return load_padded(row_ptr[:, None] + word[None, :], word[None, :], WORDS // 2, WIDTH != WORDS)


@triton.jit
def load_value_words(row_ptr, word, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """The words of rows, each row a column, for :func:`pair_columns`: uint16 [words, rows], padding 0.

    Args:
        row_ptr: uint16 pointers [rows], where the codes of each row begin.
        word: int32 [words], 0, 1, ... up to slice_width.
    """
    WORDS: tl.constexpr = slice_words(HEAD_SIZE, BITS)
    WIDTH: tl.constexpr = slice_width(HEAD_SIZE, BITS)
    return load_padded(row_ptr[None, :] + word[:, None], word[:, None], WORDS, WIDTH != WORDS)


@triton.jit
def slice_dim(index, word, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """The dimension that slice ``index`` holds at ``word``."""
    FIELDS: tl.constexpr = 8 // BITS
    return 2 * word + index // FIELDS + index % FIELDS * (HEAD_SIZE // FIELDS)


@triton.jit
def slice_shift(index, BITS: tl.constexpr):
    """The bit at which :func:`code_slice` leaves the codes of slice ``index``: their value is
    code * 2^(shift - 24)."""
    low = index * BITS
    return tl.where(low + BITS <= 10, low, low - 8)


@triton.jit
def code_slice(words, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Slice INDEX as fp16 subnormals [rows, 2 columns] of uint32 ``words`` [rows, columns], two 16-bit words in each.

    Both 16-bit words are masked by one 32-bit operation. A code must end up within fp16's ten mantissa bits.
    """
    LOW: tl.constexpr = INDEX * BITS
    ONES: tl.constexpr = 0x10001 * ((1 << BITS) - 1)
    if LOW + BITS <= 10:
        codes = words & (ONES << LOW)
    else:
        codes = (words >> 8) & (ONES << (LOW - 8))
    even = codes.to(tl.uint16).to(tl.float16, bitcast=True)
    odd = (codes >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(even, odd).reshape(words.shape[0], 2 * words.shape[1])


@triton.jit
def pair_columns(words):
    """uint32 [rows, columns / 2] of uint16 ``words`` [rows, columns], the even column in the low half."""
    even, odd = tl.split(words.reshape(words.shape[0], words.shape[1] // 2, 2))
    return even.to(tl.uint32) | (odd.to(tl.uint32) << 16)
