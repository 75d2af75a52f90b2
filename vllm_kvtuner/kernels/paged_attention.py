"""Decode: attention of 1 to 16 newest tokens per request straight on packed pages, split over each request's tokens.

Three launches: queries are folded into the frame of the stored keys, every split of a request attends on its own,
and the splits are merged by log-sum-exp. Two rules keep the arithmetic per cached number small (s a row's scale, m
its minimum):

    q . K_t = s_t (q . codes_t) + m_t sum(q)        O = sum_t (P_t s_t) codes_t + sum_t P_t m_t

and codes are never converted: masked out of its word, a code is an fp16 *subnormal*, the code times a power of two,
which the matrix instructions multiply exactly. The powers of two are undone in fp32.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_kvtuner.kernels.common import check_cache, fp16_unit, hadamard_rows, load_meta
from vllm_kvtuner.kernels.decode_config import MAX_QUERY_LEN, DecodeConfig, decode_config, num_multiprocessors
from vllm_kvtuner.layout import PageLayout
from vllm_kvtuner.transforms import LayerTransforms

ROW_CONSTANTS = 4
"""fp32 numbers per folded query row: factor of its logits, sum, factor and constant of the key offset."""
MIN_FOLDED_SIZE = 128
MIN_PARTIAL_ROWS = 1 << 15
"""(token, head, split) rows a workspace holds at least, so that small batches split finely."""


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of :func:`paged_attention`; launches that run one after the other may share it.

    Args:
        query: [max_num_tokens * num_heads, folded size] fp16, folded queries in the order of the packed codes.
        constants: [max_num_tokens * num_heads, ROW_CONSTANTS] fp32.
        coefficients: [max_num_tokens * num_heads * head_size] fp32, room for each row's key offset coefficients.
        output: [rows, head_size] fp32, the splits' outputs; a row is one (token, head, split).
        lse: [rows] fp32, their log-sum-exp to base 2.
    """

    query: torch.Tensor
    constants: torch.Tensor
    coefficients: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor


def _workspace_parts(max_num_tokens: int, num_heads: int, head_size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    rows = max_num_tokens * num_heads
    partial_rows = max(2 * rows, MIN_PARTIAL_ROWS)
    return {
        "query": ((rows, _folded_size(head_size)), torch.float16),
        "constants": ((rows, ROW_CONSTANTS), torch.float32),
        "coefficients": ((rows * head_size,), torch.float32),
        "output": ((partial_rows, head_size), torch.float32),
        "lse": ((partial_rows,), torch.float32),
    }


def decode_workspace(
    max_num_tokens: int, num_heads: int, head_size: int, device: torch.device | str
) -> DecodeWorkspace:
    """Scratch for batches of up to ``max_num_tokens`` query tokens in layers of this shape."""
    parts = _workspace_parts(max_num_tokens, num_heads, head_size)
    return DecodeWorkspace(**{k: torch.empty(shape, dtype=dtype, device=device) for k, (shape, dtype) in parts.items()})


def decode_workspace_bytes(max_num_tokens: int, num_heads: int, head_size: int) -> int:
    """Bytes that :func:`decode_workspace` allocates."""
    parts = _workspace_parts(max_num_tokens, num_heads, head_size)
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())


def _folded_size(head_size: int) -> int:
    """Numbers of a folded query row, padding of the slices included: at most 8 slices of at least 16."""
    return max(MIN_FOLDED_SIZE, triton.next_power_of_2(head_size))


# A 16-bit word of a packed row holds 16 / bits codes. Slice i of a row is code i of every word (bits i * bits and up):
# word w of slice i is dimension 2 w + i // n + (i % n) head_size / n, with n = 8 / bits codes per byte.


@triton.jit
def _slice_dim(index, word, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """The dimension that slice ``index`` holds at ``word``."""
    FIELDS: tl.constexpr = 8 // BITS
    return 2 * word + index // FIELDS + index % FIELDS * (HEAD_SIZE // FIELDS)


@triton.jit
def _slice_shift(index, BITS: tl.constexpr):
    """The bit at which :func:`_slice` leaves the codes of slice ``index``: their value is code * 2^(shift - 24)."""
    low = index * BITS
    return tl.where(low + BITS <= 10, low, low - 8)


@triton.jit
def _slice(words, INDEX: tl.constexpr, BITS: tl.constexpr):
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
def _pair_columns(words):
    """uint32 [rows, columns / 2] of uint16 ``words`` [rows, columns], the even column in the low half."""
    even, odd = tl.split(words.reshape(words.shape[0], words.shape[1] // 2, 2))
    return even.to(tl.uint32) | (odd.to(tl.uint32) << 16)


@triton.jit
def _store_terms(pointers, x, mask, STRIDE: tl.constexpr, TERMS: tl.constexpr):
    """Store x as TERMS numbers of the pointers' type that add up to it, STRIDE apart."""
    for term in tl.static_range(TERMS):
        part = x.to(pointers.dtype.element_ty)
        tl.store(pointers + term * STRIDE, part, mask=mask)
        x -= part.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _fold_query_kernel(
    query_ptr, equalization_ptr, offset_ptr, folded_ptr, constants_ptr, coefficients_ptr,
    num_rows, scale, token_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr,
    FOLDED_SIZE: tl.constexpr, HADAMARD: tl.constexpr, ROTARY_DIM: tl.constexpr, IS_NEOX: tl.constexpr,
    TERMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Folded query rows, each scaled by a power of two into fp16's range, and what undoes that in the logits.

    Logits come out to base 2 as constants[0] * (s_t dot + m_t constants[1] + offset dot * constants[2] + constants[3]),
    dot being the product of the folded row with the codes as subnormals.
    """
    WORDS: tl.constexpr = HEAD_SIZE * BITS // 16
    WIDTH: tl.constexpr = triton.next_power_of_2(WORDS) if WORDS > 16 else 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = row < num_rows
    head = row % NUM_HEADS
    source = query_ptr + (row // NUM_HEADS).to(tl.int64) * token_stride + head * HEAD_SIZE
    statics = head // GROUP * HEAD_SIZE
    column = tl.arange(0, 16 // BITS * WIDTH)
    dim = _slice_dim(column // WIDTH, column % WIDTH, HEAD_SIZE, BITS)
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
    weight = (1 << _slice_shift(column // WIDTH, BITS)).to(tl.float32)[None, :]
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
            target = coefficients_ptr + row.to(tl.int64)[:, None] * (ROTARY_DIM * TERMS) + pair[None, :]
            _store_terms(target, tl.div_rn(cos, offset_unit[:, None]), within, ROTARY_DIM, TERMS)
            _store_terms(target + HALF, tl.div_rn(sin, offset_unit[:, None]), within, ROTARY_DIM, TERMS)


@triton.jit
def _attend_kernel(
    folded_ptr, constants_ptr, coefficients_ptr, cos_sin_ptr, kv_cache_ptr, block_table_ptr, seq_lens_ptr,
    query_start_loc_ptr, partial_ptr, lse_ptr, block_stride, head_stride, table_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, V_CODES: tl.constexpr,
    K_META: tl.constexpr, V_META: tl.constexpr, FOLDED_SIZE: tl.constexpr, HAS_OFFSET: tl.constexpr,
    ROTARY_DIM: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, ONE_QUERY: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of one request for up to BLOCK_M of the query rows that share a KV head.

    Tokens are the rows of every tile and query rows its columns, so that a group of 4 or 8 heads fills the narrow
    side of the matrix instruction. WINDOW 0 and SOFT_CAP 0 mean none.
    """
    K_SLICES: tl.constexpr = 16 // K_BITS
    V_SLICES: tl.constexpr = 16 // V_BITS
    K_WIDTH: tl.constexpr = triton.next_power_of_2(K_ROW // 2) if K_ROW > 32 else 16
    V_WIDTH: tl.constexpr = triton.next_power_of_2(V_ROW // 2) if V_ROW > 32 else 16
    request = tl.program_id(0)
    kv_head = tl.program_id(1) // ROW_TILES
    split, num_splits = tl.program_id(2), tl.num_programs(2)

    seq_len = tl.load(seq_lens_ptr + request)
    first_query = tl.load(query_start_loc_ptr + request)
    num_queries = tl.load(query_start_loc_ptr + request + 1) - first_query
    member = tl.program_id(1) % ROW_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    query_index = member // GROUP
    is_row = query_index < num_queries
    row = (first_query + query_index) * NUM_HEADS + kv_head * GROUP + member % GROUP
    out_row = row.to(tl.int64) * num_splits + split
    row_position = seq_len - num_queries + query_index

    # Whole tiles are shared out, from the first that any query sees.
    first_token = 0
    if WINDOW > 0:
        first_token = tl.maximum(seq_len - num_queries + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
    tiles = tl.cdiv(tl.cdiv(seq_len - first_token, BLOCK_N), num_splits)
    begin = first_token + split * tiles * BLOCK_N
    end = tl.minimum(begin + tiles * BLOCK_N, seq_len)
    if begin >= end or num_queries <= tl.program_id(1) % ROW_TILES * BLOCK_M // GROUP:
        tl.store(lse_ptr + out_row, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_row)
        return

    constants = constants_ptr + row * 4
    factor = tl.load(constants, mask=is_row, other=1.0)
    query_sum = tl.load(constants + 1, mask=is_row, other=0.0)
    folded = folded_ptr + row.to(tl.int64)[None, :] * FOLDED_SIZE + tl.arange(0, K_WIDTH)[:, None]
    queries = ()
    for index in tl.static_range(K_SLICES):
        queries += (tl.load(folded + index * K_WIDTH, mask=is_row[None, :], other=0.0),)
    if HAS_OFFSET:
        constant = tl.load(constants + 3, mask=is_row, other=0.0)
    if ROTARY_DIM > 0:
        offset_factor = tl.load(constants + 2, mask=is_row, other=0.0)
        entry = tl.arange(0, triton.next_power_of_2(ROTARY_DIM) if ROTARY_DIM > 16 else 16)
        pointers = coefficients_ptr + row.to(tl.int64)[None, :] * (ROTARY_DIM * TERMS) + entry[:, None]
        within = is_row[None, :] & (entry < ROTARY_DIM)[:, None]
        coefficients = ()
        for term in tl.static_range(TERMS):
            coefficients += (tl.load(pointers + term * ROTARY_DIM, mask=within, other=0.0),)

    outputs = ()
    for _ in tl.static_range(V_SLICES):
        outputs += (tl.zeros([V_WIDTH, BLOCK_M], tl.float32),)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    minima = tl.zeros([BLOCK_M], tl.float32)
    # The smallest fp16 number: what value scales are measured against is never 0.
    lift = 2.0**-24

    table = block_table_ptr + request.to(tl.int64) * table_stride
    words = kv_cache_ptr.to(tl.pointer_type(tl.uint32)) + kv_head.to(tl.int64) * head_stride
    halves = words.to(tl.pointer_type(tl.uint16))
    index = tl.arange(0, BLOCK_N)
    k_word = tl.arange(0, K_WIDTH // 2)
    v_half = tl.arange(0, V_WIDTH)
    # Entries beyond the request may be stale: those tokens read block 0, and count for nothing.
    block = tl.load(table + (begin + index) // BLOCK_SIZE, mask=begin + index < seq_len, other=0)
    for start in tl.range(begin, end, BLOCK_N):
        token = start + index
        seen = token < seq_len
        chunk = block.to(tl.int64) * block_stride
        # Loaded a tile ahead, so that the copies of a tile wait for nothing.
        following = token + BLOCK_N
        block = tl.load(table + following // BLOCK_SIZE, mask=following < seq_len, other=0)
        place = index % BLOCK_SIZE if BLOCK_N % BLOCK_SIZE == 0 else token % BLOCK_SIZE
        k_codes = tl.load(
            words + (chunk + place * (K_ROW // 4))[:, None] + k_word[None, :],
            mask=(k_word < K_ROW // 4)[None, :], other=0,
        )  # fmt: skip
        v_codes = tl.load(
            halves + (chunk * 2 + (V_CODES // 2 + place * (V_ROW // 2)))[None, :] + v_half[:, None],
            mask=(v_half < V_ROW // 2)[:, None], other=0,
        )  # fmt: skip
        k_scale, k_minimum = load_meta(words + chunk + (K_META // 4 + place), seen)
        v_scale, v_minimum = load_meta(words + chunk + (V_META // 4 + place), seen)

        logits = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in tl.static_range(K_SLICES):
            logits = tl.dot(_slice(k_codes, i, K_BITS), queries[i], logits)
        # Tokens beyond the request have scale and minimum 0, so that the bias alone decides.
        bias = tl.where(seen, 0.0, float("-inf"))
        if ONE_QUERY and WINDOW > 0:
            bias = tl.where(token > seq_len - 1 - WINDOW, bias, float("-inf"))
        bias = bias[:, None]
        if HAS_OFFSET:
            bias += constant[None, :]
        logits = logits * k_scale[:, None] + (k_minimum[:, None] * query_sum[None, :] + bias)
        if ROTARY_DIM > 0:
            angles = tl.load(
                cos_sin_ptr + token.to(tl.int64)[:, None] * ROTARY_DIM + entry[None, :],
                mask=seen[:, None] & (entry < ROTARY_DIM)[None, :], other=0.0,
            )  # fmt: skip
            offset = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for term in tl.static_range(TERMS):
                offset = tl.dot(angles.to(coefficients_ptr.dtype.element_ty), coefficients[TERMS - 1 - term], offset, input_precision=PRECISION)
            logits += offset * offset_factor[None, :]
        if not ONE_QUERY:
            visible = token[:, None] <= row_position[None, :]
            if WINDOW > 0:
                visible &= token[:, None] > (row_position - WINDOW)[None, :]
            logits = tl.where(visible, logits, float("-inf"))
        if SOFT_CAP > 0:
            # To base 2, c tanh(x / c) with c = SOFT_CAP log2(e): tanh(y) = 1 - 2 / (e^2y + 1), e^2y = 2^(2 x / cap).
            power = tl.exp2(logits * (factor * (2.0 / SOFT_CAP))[None, :])
            capped = (SOFT_CAP * 1.4426950408889634) * (1.0 - 2.0 / (power + 1.0))
            logits = tl.where(logits == float("-inf"), logits, capped)
            new_top = tl.maximum(top, tl.max(logits, 0))
        else:
            new_top = tl.maximum(top, tl.max(logits, 0) * factor)
        # A row that has seen nothing yet keeps a finite reference, so that nothing becomes inf - inf.
        reference = new_top if ONE_QUERY else tl.where(new_top == float("-inf"), 0.0, new_top)
        exponent = logits if SOFT_CAP > 0 else logits * factor[None, :]
        p = tl.exp2(exponent - reference[None, :])
        decay = tl.exp2(top - reference)
        top = new_top
        total = total * decay + tl.sum(p, 0)

        # P times the V scale in fp16, the tile's largest scale so far lifted to 2^14: neither scales of 1e-7 nor of
        # 60000 leave fp16's range. The lift is a power of two, so lifting rounds nothing.
        largest = tl.max(v_scale, 0).to(tl.int32, bitcast=True) & 0x7F800000
        new_lift = tl.maximum(lift, largest.to(tl.float32, bitcast=True))
        lifted = v_scale * (2.0**14 / new_lift)
        weights = (p * lifted[:, None]).to(tl.float16)
        # The minimum's term takes the same rounded P as the codes, since the two nearly cancel; not where rows are so
        # flat that there is nothing to cancel and the quotient might overflow.
        cancels = tl.abs(v_minimum) <= 65536.0 * v_scale
        zero = tl.where(cancels, v_minimum / tl.maximum(lifted, 2.0**-60), 0.0)
        flat = tl.where(cancels, 0.0, v_minimum)
        minima = minima * decay + tl.sum(weights.to(tl.float32) * zero[:, None] + p * flat[:, None], 0)
        decay *= lift / new_lift
        lift = new_lift
        v_words = _pair_columns(v_codes)
        new_outputs = ()
        for i in tl.static_range(V_SLICES):
            new_outputs += (tl.dot(_slice(v_words, i, V_BITS), weights, outputs[i] * decay[None, :]),)
        outputs = new_outputs

    is_dim = (v_half < V_ROW // 2)[:, None] & is_row[None, :]
    for i in tl.static_range(V_SLICES):
        # Undo the lift (2^14) and the codes' power of two (2^(shift - 24)).
        undo = lift * 2.0**10 / (1 << _slice_shift(i, V_BITS)).to(tl.float32)
        out = (outputs[i] * undo + minima[None, :]) / total[None, :]
        dim = _slice_dim(i, v_half, HEAD_SIZE, V_BITS)
        tl.store(partial_ptr + out_row[None, :] * HEAD_SIZE + dim[:, None], out, mask=is_dim)
    tl.store(lse_ptr + out_row, top + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_reqs", "num_splits"])
def _combine_kernel(
    partial_ptr, lse_ptr, query_start_loc_ptr, output_ptr, num_rows, num_reqs, num_splits, token_stride,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HADAMARD: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merge the splits of ROWS (token, head) rows, STEP splits at a time, and rotate the values back.

    Rows of padding, beyond the last query or of an empty request, become 0.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = row < num_rows
    used = row < tl.load(query_start_loc_ptr + num_reqs) * NUM_HEADS
    dim = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    first = row.to(tl.int64) * num_splits
    step = tl.arange(0, STEP)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for begin in range(0, num_splits, STEP):
        present = used[:, None] & (begin + step < num_splits)[None, :]
        lse = tl.load(lse_ptr + first[:, None] + (begin + step)[None, :], mask=present, other=float("-inf"))
        top = tl.maximum(top, tl.max(lse, 1))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, dim.shape[0]], tl.float32)
    for begin in range(0, num_splits, STEP):
        present = used[:, None] & (begin + step < num_splits)[None, :]
        split = first[:, None] + (begin + step)[None, :]
        lse = tl.load(lse_ptr + split, mask=present, other=float("-inf"))
        weight = tl.exp2(lse - top[:, None])
        total += tl.sum(weight, 1)
        # A split that saw nothing wrote no output.
        wanted = (lse > float("-inf"))[:, :, None] & (dim < HEAD_SIZE)[None, None, :]
        part = tl.load(partial_ptr + split[:, :, None] * HEAD_SIZE + dim[None, None, :], mask=wanted, other=0.0)
        output += tl.sum(part * weight[:, :, None], 1)
    output = output / tl.where(total > 0, total, 1.0)[:, None]
    if HADAMARD:
        output = hadamard_rows(output, dim, HEAD_SIZE)
    target = output_ptr + (row // NUM_HEADS).to(tl.int64) * token_stride + row % NUM_HEADS * HEAD_SIZE
    in_row = keep[:, None] & (dim < HEAD_SIZE)[None, :]
    tl.store(target[:, None] + dim[None, :], output.to(output_ptr.dtype.element_ty), mask=in_row)


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
    layout: PageLayout,
    transforms: LayerTransforms,
    output: torch.Tensor,
    sliding_window: int | None = None,
    logits_soft_cap: float = 0.0,
    *,
    workspace: DecodeWorkspace,
    config: DecodeConfig | None = None,
) -> None:
    """Attention of each request's 1 to 16 newest tokens over its cached tokens, themselves included.

    As :func:`vllm_kvtuner.reference.paged_attention_ref`, which has the arguments' shapes. Nothing is read back to
    the host and nothing allocated: launches depend on shapes alone, so a CUDA graph may hold them. Rows of output
    beyond the last query become 0. An fp16 or bf16 query gives errors of at most about 1e-3 of the largest value.

    Args:
        workspace: from :func:`decode_workspace`, for at least this many tokens and this shape of layer.
        config: launch knobs, or None for :func:`decode_config`'s.
    """
    num_tokens, num_heads, head_size = query.shape
    num_reqs, num_kv_heads = block_table.shape[0], kv_cache.shape[1]
    group = num_heads // num_kv_heads
    check_cache(kv_cache, layout)
    assert head_size == layout.head_size and num_heads == group * num_kv_heads, (query.shape, layout, num_kv_heads)
    for rows in (query, output):
        assert rows.shape == query.shape and rows.stride(2) == 1 and rows.stride(1) == head_size, rows.stride()
    assert 1 <= max_query_len <= MAX_QUERY_LEN, max_query_len
    assert seq_lens.shape == (num_reqs,) and query_start_loc.shape == (num_reqs + 1,)
    for lengths in (block_table, seq_lens, query_start_loc):
        assert lengths.dtype == torch.int32 and lengths.stride(-1) == 1
    num_rows = num_tokens * num_heads
    assert num_rows <= workspace.constants.shape[0] and workspace.output.shape[1] == head_size, "workspace too small"
    if num_rows == 0:
        return
    if config is None:
        config = decode_config(
            num_reqs, num_kv_heads, group * max_query_len, layout, num_multiprocessors(query.device)
        )
    num_splits = min(config.num_splits, workspace.lse.shape[0] // num_rows)
    offset = transforms.key_offset
    rotary = transforms.rotary if offset is not None else None
    rotary_dim = rotary.rotary_dim if rotary else 0
    coefficients = workspace.coefficients
    if rotary is not None:
        assert rotary.cos_sin.is_contiguous()
        coefficients = coefficients.view(_coefficient_dtype(rotary.cos_sin))
    # A table in 16 bits meets coefficients in two 16-bit terms; one in fp32 is multiplied in fp32.
    terms = 1 if coefficients.dtype == torch.float32 else 2
    folded_size = workspace.query.shape[1]

    _fold_query_kernel[(triton.cdiv(num_rows, 16),)](
        query, transforms.key_equalization, offset, workspace.query, workspace.constants, coefficients,
        num_rows, scale * math.log2(math.e), query.stride(0),
        NUM_HEADS=num_heads, GROUP=group, HEAD_SIZE=head_size, BITS=layout.k_bits, FOLDED_SIZE=folded_size,
        HADAMARD=transforms.key_hadamard, ROTARY_DIM=rotary_dim, IS_NEOX=rotary.is_neox if rotary else True,
        TERMS=terms, ROWS=16, num_warps=4,
    )  # fmt: skip
    row_tiles = triton.cdiv(group * max_query_len, config.block_m)
    _attend_kernel[(num_reqs, num_kv_heads * row_tiles, num_splits)](
        workspace.query, workspace.constants, coefficients, rotary and rotary.cos_sin, kv_cache, block_table, seq_lens,
        query_start_loc, workspace.output, workspace.lse,
        kv_cache.stride(0) // 4, kv_cache.stride(1) // 4, block_table.stride(0),
        NUM_HEADS=num_heads, GROUP=group, HEAD_SIZE=head_size, BLOCK_SIZE=layout.block_size,
        K_BITS=layout.k_bits, V_BITS=layout.v_bits, K_ROW=layout.k_row_bytes, V_ROW=layout.v_row_bytes,
        V_CODES=layout.v_codes_offset, K_META=layout.k_meta_offset, V_META=layout.v_meta_offset,
        FOLDED_SIZE=folded_size, HAS_OFFSET=offset is not None, ROTARY_DIM=rotary_dim, TERMS=terms,
        PRECISION="ieee", ONE_QUERY=max_query_len == 1, WINDOW=sliding_window or 0, SOFT_CAP=logits_soft_cap,
        ROW_TILES=row_tiles, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    rows_per_program = 16 if num_rows >= 2048 else 1
    _combine_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        workspace.output, workspace.lse, query_start_loc, output, num_rows, num_reqs, num_splits, output.stride(0),
        NUM_HEADS=num_heads, HEAD_SIZE=head_size, HADAMARD=transforms.value_hadamard,
        ROWS=rows_per_program, STEP=32 // rows_per_program, num_warps=4,
    )  # fmt: skip


def _coefficient_dtype(cos_sin: torch.Tensor) -> torch.dtype:
    """The table's own, or fp32 for bf16 on a CPU: Triton's interpreter multiplies the bit patterns of bf16."""
    return torch.float32 if cos_sin.dtype == torch.bfloat16 and cos_sin.device.type == "cpu" else cos_sin.dtype
