"""Launch paged_attention.cu: decode attention straight on packed pages, in one kernel.

The contract is that of :func:`vllm_kvtuner.kernels.triton.paged_attention.paged_attention`, the portable path.
"""

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from vllm_kvtuner.kernels.contract import check_cache
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.rows import byte_stride
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import ANGLE_STEP, LayerTransforms, OffsetPairs, RotaryTable

MAX_QUERY_LEN = 16
"""Query tokens per request that one launch serves."""
MAX_CTAS_PER_MULTIPROCESSOR = 4
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities with 100 KB of shared memory in a multiprocessor."""
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the system takes of each CTA."""
PASS_ROWS = (4, 8)
"""Query rows (heads of the group times query tokens) of one pass over the tokens."""
FEW_SEGMENTS = {4: 8, 8: 16}
"""By rows of a pass, requests times KV heads of the largest batches that larger CTAs serve."""


@dataclass(frozen=True)
class DecodeConfig:
    """Knobs of one variant.

    Args:
        stage_tokens: cached tokens that a warp's copy brings.
        num_stages: copies that a warp has in flight.
        min_ctas: CTAs per multiprocessor that registers and shared memory must allow.
        num_warps: of a CTA.
    """

    stage_tokens: int
    num_stages: int
    min_ctas: int
    num_warps: int = 4


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of :func:`paged_attention`; launches that run one after the other may share it.

    Args:
        partial: [2 * CTAs, rows of a pass, head_size] fp32, unnormalized outputs of segments that CTAs share.
        state: [2 * CTAs, rows of a pass, 2] fp32, their reference to base 2 and total.
        arrivals: [segments] int32, 0 between launches.
    """

    partial: torch.Tensor
    state: torch.Tensor
    arrivals: torch.Tensor


def _workspace_parts(
    max_num_reqs: int, max_query_len: int, num_heads: int, num_kv_heads: int, head_size: int, num_sms: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    slots = 2 * MAX_CTAS_PER_MULTIPROCESSOR * num_sms
    rows = pass_rows(num_heads // num_kv_heads * max_query_len)
    segments = max_num_reqs * num_kv_heads * math.ceil(num_heads // num_kv_heads * MAX_QUERY_LEN / PASS_ROWS[0])
    return {
        "partial": ((slots, rows, head_size), torch.float32),
        "state": ((slots, rows, 2), torch.float32),
        "arrivals": ((segments,), torch.int32),
    }


def decode_workspace(
    max_num_reqs: int,
    max_query_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    device: torch.device | str,
) -> DecodeWorkspace:
    """Scratch for batches of up to ``max_num_reqs`` requests, in whose passes up to ``max_query_len`` query tokens of a
    request have room."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    parts = _workspace_parts(max_num_reqs, max_query_len, num_heads, num_kv_heads, head_size, num_sms)
    tensors = {k: torch.zeros(shape, dtype=dtype, device=device) for k, (shape, dtype) in parts.items()}
    return DecodeWorkspace(**tensors)


def pass_rows(rows: int) -> int:
    """Rows of a pass that serves ``rows`` query rows per KV head."""
    return PASS_ROWS[0] if rows <= PASS_ROWS[0] else PASS_ROWS[1]


def decode_config(
    layout: PageLayout, rows: int, offset_pairs: int, shared_bytes_per_sm: int, few: bool = False
) -> DecodeConfig:
    """Knobs for a layout, rows of a pass and a multiprocessor's shared memory, from sweeps on an H200.

    As many CTAs as registers and shared memory allow, two stages (more only lengthen the way to memory), and stages as
    long as fit. See docs/notes/stages-and-rings.md.

    Args:
        few: whether there are so few segments (``FEW_SEGMENTS``) that most CTAs have a part of one. Then larger CTAs
            leave fewer parts.
    """
    bits = layout.pair.nominal_bits
    # Wide rows want long stages; narrow ones want warps, whose arithmetic limits them.
    min_ctas = 2 if bits >= 3 else 3
    long_rows = layout.head_size > 128
    if rows > PASS_ROWS[0] or long_rows:
        min_ctas = 2
    num_stages, stage_tokens, num_warps = 2, 64, 4
    if rows > PASS_ROWS[0] and long_rows:
        stage_tokens = 32  # by registers
    if few or (rows > PASS_ROWS[0] and long_rows and bits >= 4):
        min_ctas, num_warps = 1, 8

    def fits() -> bool:
        config = DecodeConfig(stage_tokens, num_stages, min_ctas, num_warps)
        cta = shared_bytes(layout, rows, config, offset_pairs)
        return min_ctas * (cta + RESERVED_SHARED_BYTES) <= shared_bytes_per_sm

    while not fits() and min_ctas > 2:
        min_ctas -= 1
    while not fits() and stage_tokens > 16:
        stage_tokens //= 2
    while not fits() and min_ctas > 1:
        min_ctas -= 1
    while not fits() and num_warps > 2:  # many offset pairs of a large head, which turn in steps of ANGLE_STEP
        num_warps //= 2
    while layout.block_size % stage_tokens and stage_tokens % layout.block_size:
        stage_tokens //= 2
    return DecodeConfig(stage_tokens, num_stages, min_ctas, num_warps)


def shared_bytes(layout: PageLayout, rows: int, config: DecodeConfig, offset_pairs: int) -> int:
    """Dynamic shared memory of a CTA: at least the size of the kernel's struct."""
    ring = config.num_warps * config.num_stages * config.stage_tokens * layout.content_bytes
    outputs = config.num_warps * rows * layout.head_size * 4
    queries = 2 * rows * layout.head_size * 2 + rows // 4 * 8 * (layout.head_size + 16)
    offset = offset_pairs * (16 + 48 * config.num_warps + 8 * rows)
    if offset_pairs > 8 or rows > PASS_ROWS[0] or config.stage_tokens == 16:  # else registers hold it
        offset += offset_pairs * config.num_warps * rows // 4 * 64
    elif offset_pairs:
        offset += 256
    return ring + outputs + queries + offset + 320 * max(config.num_warps, 2)


def unsupported(
    layout: PageLayout,
    transforms: LayerTransforms,
    logits_soft_cap: float = 0.0,
    capability: tuple[int, int] = (9, 0),
    write_lse: bool = False,
) -> str | None:
    """Why this kernel does not serve a layer on cards of a compute capability, or None if it does."""
    if layout.head_size > 128 and capability in SMALL_SHARED_MEMORY:
        return f"head_size {layout.head_size} does not fit the shared memory of compute capability {capability}"
    if layout.head_size % 32 or layout.head_size * layout.v_bits % 128:
        return f"head_size {layout.head_size} with {layout.v_bits}-bit values does not fill its matrix instructions"
    if transforms.key_offset is None:
        return None
    rotary = transforms.rotary
    if rotary is not None and rotary.frequencies is None:
        return "the key offset's rotation is not proportional to the position"
    if (logits_soft_cap or write_lse) and (rotary is None or transforms.key_offset[:, rotary.rotary_dim :].any()):
        what = "a capped logit" if logits_soft_cap else "attention beside a recent window"
        return f"{what} needs all of the key offset, but some of it is not rotated"
    return None


def _defines(
    layout: PageLayout,
    group: int,
    rows: int,
    config: DecodeConfig,
    dtype: torch.dtype,
    transforms: LayerTransforms,
    offset_pairs: int,
    sliding_window: int | None,
    soft_cap: bool,
    skip_newest: int = 0,
    write_lse: bool = False,
    skip_first: int = 0,
) -> dict[str, int]:
    return {
        "SHARED_BYTES": shared_bytes(layout, rows, config, offset_pairs),
        "HEAD_SIZE": layout.head_size,
        "K_BITS": layout.k_bits,
        "V_BITS": layout.v_bits,
        "BLOCK_SIZE": layout.block_size,
        "GROUP": group,
        "PASS_ROWS": rows,
        "NUM_WARPS": config.num_warps,
        "STAGE_TOKENS": config.stage_tokens,
        "NUM_STAGES": config.num_stages,
        "MIN_CTAS": config.min_ctas,
        "QUERY_BF16": int(dtype == torch.bfloat16),
        "KEY_HADAMARD": int(transforms.key_hadamard),
        "VALUE_HADAMARD": int(transforms.value_hadamard),
        "KEY_EQUALIZATION": int(transforms.key_equalization is not None),
        "OFFSET_PAIRS": offset_pairs,
        "ANGLE_STEP": ANGLE_STEP,
        "WINDOW": sliding_window - skip_newest if sliding_window else 0,
        "SKIP_NEWEST": skip_newest,
        "SKIP_FIRST": skip_first,
        "WRITE_LSE": int(write_lse),
        "SOFT_CAP": int(soft_cap),
    }


@kept_with_transforms
def _build(
    transforms: LayerTransforms,
    layout: PageLayout,
    group: int,
    rows: int,
    dtype: torch.dtype,
    sliding_window: int | None,
    soft_cap: bool,
    skip_newest: int,
    write_lse: bool,
    skip_first: int,
    few: bool,
    device: torch.device,
    config: DecodeConfig | None,
) -> BuiltKernel:
    offset = transforms.offset_pairs
    pairs = 0 if offset is None else len(offset.index)
    if config is None:
        shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
        config = decode_config(layout, rows, pairs, shared, few)
    defines = _defines(
        layout, group, rows, config, dtype, transforms, pairs, sliding_window, soft_cap, skip_newest, write_lse,
        skip_first,
    )  # fmt: skip
    threads = 32 * config.num_warps
    return build("paged_attention", tuple(defines.items()), threads, defines["SHARED_BYTES"], device)


@functools.cache
def _fine_operands(offset: OffsetPairs, rotary: RotaryTable) -> torch.Tensor:
    """[pairs / 8, ANGLE_STEP / 16, 2, 32, 4] int32: turning on by 0 to ANGLE_STEP - 1 positions, as fp16 in two terms.

    Each 16 positions are one A operand of the matrix instruction: register i of lane 4 g + t holds cosine and sine of
    pair t + 4 (i // 2) at the token of row g + 8 (i % 2), in the kernel's order of tokens.
    """
    lane, register = torch.arange(32)[:, None], torch.arange(4)[None, :]
    row = lane // 4
    token = (row ^ (row >> 1 & 1)) + 8 * (register % 2)
    pair = lane % 4 + 4 * (register // 2)
    angles = rotary.fine_angles.cpu()[:, offset.index.cpu().long()]
    angles = angles.view(ANGLE_STEP // 16, 16, -1, 8, 2)[:, token, :, pair]
    # [lane, register, 16 positions, pairs / 8, 2]: what is indexed with slices between comes first.
    angles = angles.permute(3, 2, 0, 1, 4)
    high = angles.half()
    low = (angles - high.float()).half()
    words = torch.stack([high, low], dim=2).contiguous().view(torch.int32)
    return words.squeeze(-1).contiguous().to(offset.index.device)


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
    skip_newest: int = 0,
    lse: torch.Tensor | None = None,
    skip_first: int = 0,
    *,
    workspace: DecodeWorkspace,
    config: DecodeConfig | None = None,
    dependent: bool = False,
    pass_query_len: int | None = None,
) -> None:
    """Attention of each request's 1 to 16 newest tokens over its cached tokens, themselves included.

    As :func:`paged_attention_ref`, which has the arguments' shapes; ``skip_newest`` is less than
    a sliding window, and lse contiguous. Nothing is read back to the host and nothing allocated: the launch depends on
    shapes alone, so a CUDA graph may hold it. Rows of output beyond the last query become 0, their log-sum-exp -inf.
    The first call of a variant compiles it.

    Args:
        workspace: from :func:`decode_workspace`, for at least this many requests and this shape of layer.
        config: knobs, or None for :func:`decode_config`'s.
        dependent: begin before the kernel before on the stream has ended, if that one allows it. It must not be one
            that writes block_table, seq_lens or query_start_loc.
        pass_query_len: query tokens of a request that a pass over its tokens has room for, max_query_len if None; less
            where few requests have as many as that.
    """
    num_tokens, num_heads, head_size = query.shape
    num_reqs, num_kv_heads = block_table.shape[0], kv_cache.shape[1]
    group = num_heads // num_kv_heads
    check_cache(kv_cache, layout)
    assert head_size == layout.head_size and num_heads == group * num_kv_heads, (query.shape, layout, num_kv_heads)
    for tokens in (query, output):
        assert tokens.shape == query.shape and tokens.stride(2) == 1 and tokens.stride(1) == head_size, tokens.stride()
        assert tokens.dtype == query.dtype and tokens.dtype in (torch.float16, torch.bfloat16), tokens.dtype
    assert 1 <= max_query_len <= MAX_QUERY_LEN, max_query_len
    assert seq_lens.shape == (num_reqs,) and query_start_loc.shape == (num_reqs + 1,)
    for lengths in (block_table, seq_lens, query_start_loc):
        assert lengths.dtype == torch.int32 and lengths.stride(-1) == 1
    assert 0 <= skip_newest < (sliding_window or math.inf), (skip_newest, sliding_window)
    if lse is not None:
        assert lse.shape == (num_heads, num_tokens) and lse.is_contiguous() and lse.dtype == torch.float32
    if num_tokens == 0:
        return
    rows = pass_rows(group * (pass_query_len or max_query_len))
    kernel = _build(
        transforms, layout, group, rows, query.dtype, sliding_window, logits_soft_cap > 0, skip_newest,
        lse is not None, skip_first, num_reqs * num_kv_heads <= FEW_SEGMENTS[rows], query.device, config,
    )  # fmt: skip
    max_segments = num_kv_heads * math.ceil(group * max_query_len / rows)
    assert num_reqs * max_segments <= workspace.arrivals.shape[0], "workspace too small"
    grid = min(kernel.max_ctas, workspace.partial.shape[0] // 2)
    assert workspace.partial.shape[1] >= rows and workspace.partial.shape[2] == head_size, "workspace too small"
    log2e = math.log2(math.e)
    rotary_pairs, offset_addresses = 0, (0,) * 5
    if (offset := transforms.offset_pairs) is not None:
        rotary = transforms.rotary
        assert rotary is not None and rotary.frequencies is not None, "unsupported() says so"
        rotary_pairs = rotary.rotary_dim // 2
        parts = (offset.numbers, offset.dims, offset.index, rotary.coarse_angles, _fine_operands(offset, rotary))
        offset_addresses = tuple(part.data_ptr() for part in parts)
    integers = (num_reqs, num_tokens, num_kv_heads, max_segments, rotary_pairs)
    kernel.launch(
        grid,
        query.data_ptr(),
        output.data_ptr(),
        kv_cache.data_ptr(),
        block_table.data_ptr(),
        seq_lens.data_ptr(),
        query_start_loc.data_ptr(),
        workspace.partial.data_ptr(),
        workspace.state.data_ptr(),
        workspace.arrivals.data_ptr(),
        0 if transforms.key_equalization is None else transforms.key_equalization.data_ptr(),
        *offset_addresses,
        *(
            ctypes.c_uint64(n)
            for n in (query.stride(0), output.stride(0), *(byte_stride(kv_cache, dim) for dim in (0, 1)))
        ),
        ctypes.c_uint64(block_table.stride(0)),
        *(ctypes.c_int32(n) for n in integers),
        ctypes.c_float(scale * log2e),
        ctypes.c_float(logits_soft_cap * log2e),
        0 if lse is None else lse.data_ptr(),
        dependent=dependent,
    )
