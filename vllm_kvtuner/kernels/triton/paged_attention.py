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

from vllm_kvtuner.kernels.checks import check_attention, check_sinks
from vllm_kvtuner.kernels.contract import AttentionShape, Launch, Pages, Queries, Span
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.kernels.triton.codes import (
    code_slice,
    load_key_words,
    load_meta,
    load_value_words,
    num_slices,
    pair_columns,
    slice_dim,
    slice_shift,
    slice_width,
    slice_words,
)
from vllm_kvtuner.kernels.triton.common import hadamard_rows, load_padded, load_positions, program_rows, row_warps
from vllm_kvtuner.kernels.triton.fold_query import ROW_CONSTANTS, fold_query, folded_size
from vllm_kvtuner.kernels.triton.merge import divisor, finite_reference, segment_weight
from vllm_kvtuner.kernels.triton.paged_attention_config import DecodeConfig, decode_config, num_multiprocessors

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


def decode_workspace(
    max_num_tokens: int, num_heads: int, head_size: int, device: torch.device | str
) -> DecodeWorkspace:
    """Scratch for batches of up to ``max_num_tokens`` query tokens in layers of this shape."""
    rows = max_num_tokens * num_heads
    partial_rows = max(2 * rows, MIN_PARTIAL_ROWS)
    return DecodeWorkspace(
        query=torch.empty(rows, folded_size(head_size), dtype=torch.float16, device=device),
        constants=torch.empty(rows, ROW_CONSTANTS, dtype=torch.float32, device=device),
        coefficients=torch.empty(rows * head_size, dtype=torch.float32, device=device),
        output=torch.empty(partial_rows, head_size, dtype=torch.float32, device=device),
        lse=torch.empty(partial_rows, dtype=torch.float32, device=device),
    )


@triton.jit
def _load_block(table_ptr, start, index, seq_len, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The block of every token of the tile at ``start``, or of the whole tile if it lies within one block.

    Entries beyond the request may be stale: those tokens read block 0, and count for nothing.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table_ptr + start // BLOCK_SIZE, mask=start < seq_len, other=0)
    else:
        token = start + index
        return tl.load(table_ptr + token // BLOCK_SIZE, mask=token < seq_len, other=0)


@triton.jit(do_not_specialize=["table_stride"])
def _attend_kernel(
    folded_ptr, constants_ptr, coefficients_ptr, cos_sin_ptr, axes_ptr, positions_ptr, kv_cache_ptr, block_table_ptr,
    seq_lens_ptr, query_start_loc_ptr, partial_ptr, lse_ptr, block_stride, head_stride, table_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, V_CODES: tl.constexpr,
    K_META: tl.constexpr, V_META: tl.constexpr,
    FOLDED_SIZE: tl.constexpr, HAS_OFFSET: tl.constexpr, ROTARY_DIM: tl.constexpr, AXES: tl.constexpr,
    SPLIT_ANGLES: tl.constexpr, ONE_QUERY: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr, SKIP_NEWEST: tl.constexpr, SKIP_FIRST: tl.constexpr, SOFT_CAP: tl.constexpr,
    ROW_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One split of one request for up to BLOCK_M of the query rows that share a KV head.

    Tokens are the rows of every tile and query rows its columns, so that a group of 4 or 8 heads fills the narrow
    side of the matrix instruction. SLIDING_WINDOW 0 and SOFT_CAP 0 mean none; a query leaves out its SKIP_NEWEST newest
    tokens, and its request's SKIP_FIRST first.
    """
    K_SLICES: tl.constexpr = num_slices(K_BITS)
    V_SLICES: tl.constexpr = num_slices(V_BITS)
    K_WIDTH: tl.constexpr = slice_width(HEAD_SIZE, K_BITS)
    V_WIDTH: tl.constexpr = slice_width(HEAD_SIZE, V_BITS)
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

    # Whole tiles are shared out, from the first that any query sees to the last.
    first_token = 0
    if SLIDING_WINDOW > 0:
        first_token = tl.maximum(seq_len - num_queries + 1 - SLIDING_WINDOW, 0) // BLOCK_N * BLOCK_N
    seen_len = seq_len - SKIP_NEWEST
    tiles = tl.cdiv(tl.cdiv(tl.maximum(seen_len - first_token, 0), BLOCK_N), num_splits)
    begin = first_token + split * tiles * BLOCK_N
    end = tl.minimum(begin + tiles * BLOCK_N, seen_len)
    if begin >= end or num_queries <= tl.program_id(1) % ROW_TILES * BLOCK_M // GROUP:
        tl.store(lse_ptr + out_row, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=is_row)
        return

    constants = constants_ptr + row * 4
    factor = tl.load(constants, mask=is_row, other=1.0)
    query_sum = tl.load(constants + 1, mask=is_row, other=0.0)
    folded = folded_ptr + row.to(tl.int64)[None, :] * FOLDED_SIZE + tl.arange(0, K_WIDTH)[:, None]
    queries = ()
    for index in tl.static_range(K_SLICES):
        queries += (tl.load(folded + index * K_WIDTH, mask=is_row[None, :], other=0.0),)  # type: ignore[assignment]
    if HAS_OFFSET:
        constant = tl.load(constants + 3, mask=is_row, other=0.0)
    if ROTARY_DIM > 0:
        offset_factor = tl.load(constants + 2, mask=is_row, other=0.0)
        ENTRIES: tl.constexpr = triton.next_power_of_2(ROTARY_DIM) if ROTARY_DIM > 16 else 16
        entry = tl.arange(0, ENTRIES)
        pointers = coefficients_ptr + row.to(tl.int64)[None, :] * (2 * ROTARY_DIM) + entry[:, None]
        within = is_row[None, :] & (entry < ROTARY_DIM)[:, None]
        coefficients = (
            tl.load(pointers, mask=within, other=0.0),
            tl.load(pointers + ROTARY_DIM, mask=within, other=0.0),
        )
        if AXES > 0:
            axis = tl.load(axes_ptr + entry % (ROTARY_DIM // 2))

    outputs = ()
    for _ in tl.static_range(V_SLICES):
        outputs += (tl.zeros([V_WIDTH, BLOCK_M], tl.float32),)  # type: ignore[assignment]
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
    v_word = tl.arange(0, V_WIDTH)
    block = _load_block(table, begin, index, seen_len, BLOCK_SIZE, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        token = start + index
        seen = token < seen_len
        if SLIDING_WINDOW > 0:
            # Blocks that have left the window may hold anything.
            seen &= token > seq_len - num_queries - SLIDING_WINDOW
        if SKIP_FIRST > 0:
            seen &= token >= SKIP_FIRST
        of_token = block.to(tl.int64) + tl.zeros([BLOCK_N], tl.int64)
        chunk = of_token * block_stride
        # Loaded a tile ahead, so that the copies of a tile wait for nothing.
        block = _load_block(table, start + BLOCK_N, index, seen_len, BLOCK_SIZE, BLOCK_N)
        place = index % BLOCK_SIZE if BLOCK_N % BLOCK_SIZE == 0 else token % BLOCK_SIZE
        k_place = chunk + place * (K_ROW // 4)
        k_codes = load_key_words(words + k_place, k_word, HEAD_SIZE, K_BITS)
        v_place = chunk * 2 + (V_CODES // 2 + place * (V_ROW // 2))
        v_codes = load_value_words(halves + v_place, v_word, HEAD_SIZE, V_BITS)
        k_scale, k_minimum = load_meta(words + chunk + (K_META // 4 + place), seen)
        v_scale, v_minimum = load_meta(words + chunk + (V_META // 4 + place), seen)

        logits = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in tl.static_range(K_SLICES):
            logits = tl.dot(code_slice(k_codes, i, K_BITS), queries[i], logits)
        # Tokens beyond those seen have scale and minimum 0, so that the bias alone decides.
        bias = tl.where(seen, 0.0, float("-inf"))
        if ONE_QUERY and SLIDING_WINDOW > 0:
            bias = tl.where(token > seq_len - 1 - SLIDING_WINDOW, bias, float("-inf"))
        bias = bias[:, None]
        if HAS_OFFSET:
            bias += constant[None, :]
        logits = logits * k_scale[:, None] + (k_minimum[:, None] * query_sum[None, :] + bias)
        if ROTARY_DIM > 0:
            if AXES > 0:
                row_ptr = positions_ptr + (of_token * BLOCK_SIZE + token % BLOCK_SIZE) * AXES
                position = load_positions(row_ptr, 1, seen, axis, AXES).to(tl.int64)
            else:
                position = tl.minimum(token, seen_len - 1).to(tl.int64)[:, None]
            angles = cos_sin_ptr + position * ROTARY_DIM + entry[None, :]
            angles = load_padded(angles, entry[None, :], ROTARY_DIM, ENTRIES != ROTARY_DIM)
            offset = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            if SPLIT_ANGLES:
                angles = angles.to(tl.float32)
                high = angles.to(coefficients[0].dtype)
                offset = tl.dot((angles - high.to(tl.float32)).to(high.dtype), coefficients[0], offset)
                angles = high
            offset = tl.dot(angles, coefficients[1], offset)
            offset = tl.dot(angles, coefficients[0], offset)
            logits += offset * offset_factor[None, :]
        if not ONE_QUERY:
            visible = token[:, None] <= (row_position - SKIP_NEWEST)[None, :]
            if SLIDING_WINDOW > 0:
                visible &= token[:, None] > (row_position - SLIDING_WINDOW)[None, :]
            logits = tl.where(visible, logits, float("-inf"))
        if SOFT_CAP > 0:
            # To base 2, c tanh(x / c) with c = SOFT_CAP log2(e): tanh(y) = 1 - 2 / (e^2y + 1), e^2y = 2^(2 x / cap).
            power = tl.exp2(logits * (factor * (2.0 / SOFT_CAP))[None, :])
            capped = (SOFT_CAP * 1.4426950408889634) * (1.0 - 2.0 / (power + 1.0))
            logits = tl.where(logits == float("-inf"), logits, capped)
            new_top = tl.maximum(top, tl.max(logits, 0))
        else:
            new_top = tl.maximum(top, tl.max(logits, 0) * factor)
        # A lone query sees some token of every tile, unless first tokens are left out.
        reference = new_top if ONE_QUERY and SKIP_FIRST == 0 else finite_reference(new_top)
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
        v_words = pair_columns(v_codes)
        new_outputs = ()
        for i in tl.static_range(V_SLICES):
            new_outputs += (tl.dot(code_slice(v_words, i, V_BITS), weights, outputs[i] * decay[None, :]),)  # type: ignore[assignment]
        outputs = new_outputs

    is_dim = (v_word < slice_words(HEAD_SIZE, V_BITS))[:, None] & is_row[None, :]
    for i in tl.static_range(V_SLICES):
        # Undo the lift (2^14) and the codes' power of two (2^(shift - 24)).
        undo = lift * 2.0**10 / (1 << slice_shift(i, V_BITS)).to(tl.float32)
        out = (outputs[i] * undo + minima[None, :]) / total[None, :]
        dim = slice_dim(i, v_word, HEAD_SIZE, V_BITS)
        tl.store(partial_ptr + out_row[None, :] * HEAD_SIZE + dim[:, None], out, mask=is_dim)
    tl.store(lse_ptr + out_row, top + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_reqs", "num_splits"])
def _combine_kernel(
    partial_ptr, lse_ptr, sinks_ptr, query_start_loc_ptr, output_ptr, output_lse_ptr,
    num_rows, num_reqs, num_splits, token_stride,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HADAMARD: tl.constexpr, HAS_LSE: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Merge the splits of ROWS (token, head) rows, STEP splits at a time, and their sinks, and rotate the values back.

    Rows that see no token, such as those of padding, beyond the last query or of an empty request, become 0; their
    log-sum-exp is their sink's logit, or -inf beyond the last query and without sinks.
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
    total = tl.zeros([ROWS], tl.float32)
    if sinks_ptr is not None:
        # To base 2; a segment that is a logit alone.
        sink = tl.load(sinks_ptr + row % NUM_HEADS, mask=used, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        top = finite_reference(tl.maximum(top, sink))
        total += segment_weight(sink, top)
    else:
        top = finite_reference(top)
    output = tl.zeros([ROWS, dim.shape[0]], tl.float32)
    for begin in range(0, num_splits, STEP):
        present = used[:, None] & (begin + step < num_splits)[None, :]
        split = first[:, None] + (begin + step)[None, :]
        lse = tl.load(lse_ptr + split, mask=present, other=float("-inf"))
        weight = segment_weight(lse, top[:, None])
        total += tl.sum(weight, 1)
        # A split that saw nothing wrote no output.
        wanted = (lse > float("-inf"))[:, :, None] & (dim < HEAD_SIZE)[None, None, :]
        part = tl.load(partial_ptr + split[:, :, None] * HEAD_SIZE + dim[None, None, :], mask=wanted, other=0.0)
        output += tl.sum(part * weight[:, :, None], 1)
    output = output / divisor(total)[:, None]
    if HAS_LSE:
        # From base 2.
        sums = (top + tl.log2(total)) * 0.6931471805599453
        tl.store(output_lse_ptr + row % NUM_HEADS * (num_rows // NUM_HEADS) + row // NUM_HEADS, sums, mask=keep)
    if HADAMARD:
        output = hadamard_rows(output, dim, HEAD_SIZE)
    target = output_ptr + (row // NUM_HEADS).to(tl.int64) * token_stride + row % NUM_HEADS * HEAD_SIZE
    in_row = keep[:, None] & (dim < HEAD_SIZE)[None, :]
    tl.store(target[:, None] + dim[None, :], output.to(output_ptr.dtype.element_ty), mask=in_row)


def paged_attention(
    query: torch.Tensor,
    queries: Queries,
    pages: Pages,
    shape: AttentionShape,
    span: Span,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    launch: Launch,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.PagedAttention`.

    An fp16 or bf16 query gives errors of at most about 1e-3 of the largest value.

    Args:
        launch: workspace from :func:`decode_workspace`, for at least this many tokens and this shape of layer; config a
            :class:`DecodeConfig` or None for :func:`decode_config`'s. These kernels always wait for the one before,
            dependent or not.
    """
    kv_cache, layout, transforms, sinks = pages
    workspace: DecodeWorkspace = launch.workspace
    num_tokens, num_heads, head_size = query.shape
    num_reqs, num_kv_heads, max_query_len = queries.num_reqs, pages.num_kv_heads, queries.max_query_len
    block_stride, head_stride, _, _ = kv_cache.stride()
    group = shape.group
    pages.check()
    check_attention(query, queries, shape, output, lse)
    check_sinks(pages, shape)
    assert head_size == layout.head_size and num_heads == group * num_kv_heads, (shape, layout, num_kv_heads)
    assert 1 <= max_query_len <= MAX_DECODE_QUERY_LEN, max_query_len
    assert 0 <= span.skip_newest < (span.sliding_window or math.inf), span
    num_rows = num_tokens * num_heads
    assert num_rows <= workspace.constants.shape[0] and workspace.output.shape[1] == head_size, "workspace too small"
    if num_rows == 0:
        return
    offset = transforms.key_offset
    config: DecodeConfig | None = launch.config
    if config is None:
        num_sms = num_multiprocessors(query.device)
        rows = group * (launch.pass_query_len or max_query_len)
        config = decode_config(num_reqs, num_kv_heads, rows, layout, offset is not None, num_sms)
    num_splits = min(config.num_splits, workspace.lse.shape[0] // num_rows)
    rotary = transforms.rotary if offset is not None else None
    rotary_dim, several = rotary.rotary_dim if rotary else 0, transforms.positions
    # A bf16 table is multiplied as it is; any other is split into fp16 terms, and so is bf16 under Triton's
    # interpreter, which would multiply bf16's bit patterns.
    native = rotary is not None and rotary.cos_sin.dtype == torch.bfloat16 and query.is_cuda
    coefficients = workspace.coefficients.view(torch.bfloat16 if native else torch.float16)
    assert rotary is None or rotary.cos_sin.is_contiguous()
    fold_query(query, shape, layout, transforms, workspace.query, workspace.constants, coefficients)
    row_tiles = triton.cdiv(group * max_query_len, config.block_m)
    _attend_kernel[(num_reqs, num_kv_heads * row_tiles, num_splits)](
        workspace.query, workspace.constants, coefficients, rotary and rotary.cos_sin, several and several.axes,
        pages.positions, kv_cache, queries.block_table,
        queries.seq_lens, queries.query_start_loc, workspace.output, workspace.lse,
        block_stride // 4, head_stride // 4, queries.block_table.stride()[0],
        NUM_HEADS=num_heads, GROUP=group, HEAD_SIZE=head_size, BLOCK_SIZE=layout.block_size,
        K_BITS=layout.k_bits, V_BITS=layout.v_bits, K_ROW=layout.k_row_bytes, V_ROW=layout.v_row_bytes,
        V_CODES=layout.v_codes_offset, K_META=layout.k_meta_offset, V_META=layout.v_meta_offset,
        FOLDED_SIZE=workspace.query.shape[1], HAS_OFFSET=offset is not None, ROTARY_DIM=rotary_dim,
        AXES=several.num_axes if several else 0,
        SPLIT_ANGLES=rotary is not None and rotary.cos_sin.dtype != coefficients.dtype,
        ONE_QUERY=max_query_len == 1, SLIDING_WINDOW=span.sliding_window or 0, SKIP_NEWEST=span.skip_newest,
        SKIP_FIRST=span.skip_first, SOFT_CAP=shape.logits_soft_cap,
        ROW_TILES=row_tiles, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    rows_per_program = program_rows(head_size, 16 if num_rows >= 2048 else 1)
    _combine_kernel[(triton.cdiv(num_rows, rows_per_program),)](
        workspace.output, workspace.lse, sinks, queries.query_start_loc, output, lse,
        num_rows, num_reqs, num_splits, output.stride()[0],
        NUM_HEADS=num_heads, HEAD_SIZE=head_size, HADAMARD=transforms.value_hadamard, HAS_LSE=lse is not None,
        ROWS=rows_per_program, STEP=32 // rows_per_program, num_warps=row_warps(head_size),
    )  # fmt: skip
