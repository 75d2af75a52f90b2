"""Launch paged_attention.cu: decode attention straight on packed pages, in one kernel."""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_kvtuner.kernels.checks import check_attention, check_sinks
from vllm_kvtuner.kernels.contract import AttentionShape, Launch, Pages, Queries, Span
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.paged_attention_config import (
    FEW_SEGMENTS,
    MAX_CTAS_PER_MULTIPROCESSOR,
    MAX_WARPS_PER_MULTIPROCESSOR,
    PASS_ROWS,
    Multiprocessor,
    most_pass_rows,
    pass_rows,
)
from vllm_kvtuner.kernels.cuda.rows import SEVERAL_POSITIONS, byte_stride
from vllm_kvtuner.kernels.cuda.variant import ARGUMENTS, Variant, needs_of
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.pages.layout import MAX_HEAD_SIZE, PageLayout
from vllm_kvtuner.pages.transforms import ANGLE_STEP, LayerTransforms, OffsetPairs, RotaryTable

SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities with 100 KB of shared memory in a multiprocessor."""
WARP_GROUP_CAPABILITIES = ((9, 0),)
"""Compute capabilities with matrix instructions of warp groups as attention/halves/team.cuh has them."""
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DecodeWorkspace:
    """Scratch of :func:`paged_attention`; launches that run one after the other may share it.

    Args:
        partial: [2 * CTAs, rows of a pass, head_size] fp32, unnormalized outputs of segments that CTAs share.
        state: [2 * CTAs, rows of a pass, 2] fp32, their reference to base 2 and total.
        arrivals: [segments] int32, 0 between launches.
        aside: [warps, :func:`aside_numbers`] fp32, sums that a warp sets aside in a long segment.
    """

    partial: torch.Tensor
    state: torch.Tensor
    arrivals: torch.Tensor
    aside: torch.Tensor


def aside_numbers(rows: int, head_size: int) -> int:
    """Sums that a warp has at most: of up to 32 rows alone, with those of weights; of more a fourth, in a team."""
    return min(rows, 32) * (head_size + 16)


def _workspace_parts(
    max_num_reqs: int, max_query_len: int, num_heads: int, num_kv_heads: int, head_size: int, num_sms: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    slots = 2 * MAX_CTAS_PER_MULTIPROCESSOR * num_sms
    rows = most_pass_rows(num_heads // num_kv_heads * max_query_len)
    segments = max_num_reqs * num_kv_heads * math.ceil(num_heads // num_kv_heads * MAX_DECODE_QUERY_LEN / PASS_ROWS[0])
    return {
        "partial": ((slots, rows, head_size), torch.float32),
        "state": ((slots, rows, 2), torch.float32),
        "arrivals": ((segments,), torch.int32),
        "aside": ((MAX_WARPS_PER_MULTIPROCESSOR * num_sms, aside_numbers(rows, head_size)), torch.float32),
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


def unsupported(
    layout: PageLayout,
    transforms: LayerTransforms,
    logits_soft_cap: float = 0.0,
    capability: tuple[int, int] = (9, 0),
    write_lse: bool = False,
    has_sinks: bool = False,
) -> str | None:
    """Why this kernel does not serve a layer on cards of a compute capability, or None if it does."""
    if layout.head_size > MAX_HEAD_SIZE:
        return f"head_size {layout.head_size} is above {MAX_HEAD_SIZE}"
    if layout.head_size > 128 and capability in SMALL_SHARED_MEMORY:
        return f"head_size {layout.head_size} does not fit the shared memory of compute capability {capability}"
    if layout.head_size % 32 or layout.head_size * layout.v_bits % 128:
        return f"head_size {layout.head_size} with {layout.v_bits}-bit values does not fill its matrix instructions"
    if transforms.key_offset is None:
        return None
    rotary = transforms.rotary
    if transforms.positions is not None:
        return SEVERAL_POSITIONS
    if rotary is not None and rotary.frequencies is None:
        return "the key offset's rotation is not proportional to the position"
    # Without these a softmax is the same, whatever all logits have in common.
    reasons = {"a capped logit": logits_soft_cap, "attention beside a recent window": write_lse, "a sink": has_sinks}
    what = next((name for name, given in reasons.items() if given), None)
    if what and (rotary is None or transforms.key_offset[:, rotary.rotary_dim :].any()):
        return f"{what} needs all of the key offset, but some of it is not rotated"
    return None


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


class _Statics(NamedTuple):
    """What a layer's transforms give to every launch.

    Args:
        arguments: addresses by the kernel's names, 0 for what the layer has not, and rotary_pairs.
        kept: tensors behind them that only this record keeps.
    """

    arguments: dict[str, int]
    kept: tuple[torch.Tensor, ...] = ()


def _statics(transforms: LayerTransforms) -> _Statics:
    equalization = transforms.key_equalization
    arguments = {} if equalization is None else {"equalization": equalization.data_ptr()}
    offset, rotary = transforms.offset_pairs, transforms.rotary
    if offset is None:
        return _Statics(arguments)
    assert rotary is not None and rotary.frequencies is not None, "unsupported() says so"
    fine = _fine_operands(offset, rotary)
    arguments |= {
        "offset": offset.numbers.data_ptr(),
        "offset_dims": offset.dims.data_ptr(),
        "offset_index": offset.index.data_ptr(),
        "coarse_angles": rotary.coarse_angles.data_ptr(),
        "fine_angles": fine.data_ptr(),
        "rotary_pairs": rotary.rotary_dim // 2,
    }
    return _Statics(arguments, (offset.numbers, offset.dims, offset.index, rotary.coarse_angles, fine))


@functools.cache
def multiprocessor(device: torch.device) -> Multiprocessor:
    """What knobs depend on of a device."""
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Multiprocessor(properties.shared_memory_per_multiprocessor, capability in WARP_GROUP_CAPABILITIES)


@kept_with_transforms
def _rows(transforms: LayerTransforms, layout: PageLayout, rows: int, device: torch.device) -> int:
    """Of a pass that serves ``rows`` query rows per KV head."""
    return pass_rows(rows, needs_of(layout, transforms), multiprocessor(device))


@kept_with_transforms
def _build(transforms: LayerTransforms, variant: Variant, device: torch.device) -> tuple[BuiltKernel, _Statics]:
    compiled = variant.settle(transforms, multiprocessor(device))
    kernel = build(compiled.source(), compiled.threads, compiled.shared_bytes, device)
    return kernel, _statics(transforms)


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
    """As :class:`vllm_kvtuner.kernels.contract.PagedAttention`, query and output fp16 or bf16.

    ``launch.workspace`` comes from :func:`decode_workspace`, for at least this many requests and this shape of layer;
    ``launch.config`` is a DecodeConfig. The first call of a variant compiles it.
    """
    num_tokens, num_reqs, num_kv_heads = query.shape[0], queries.num_reqs, shape.num_kv_heads
    layout, kv_cache, group, max_query_len = pages.layout, pages.kv_cache, shape.group, queries.max_query_len
    check_attention(query, queries, shape, output, lse)
    check_sinks(pages, shape)
    pages.check()
    assert pages.num_kv_heads == num_kv_heads and layout.head_size == shape.head_size, (kv_cache.shape, shape)
    assert query.dtype == output.dtype and query.dtype in (torch.float16, torch.bfloat16), (query.dtype, output.dtype)
    assert 1 <= max_query_len <= MAX_DECODE_QUERY_LEN, max_query_len
    assert 0 <= span.skip_newest < (span.sliding_window or math.inf), span
    if num_tokens == 0:
        return
    pass_query_len = launch.pass_query_len or max_query_len
    rows = _rows(pages.transforms, layout, group * pass_query_len, query.device)
    fewest = rows if pass_query_len == 1 else _rows(pages.transforms, layout, group, query.device)
    variant = Variant(
        layout, group, rows, query.dtype, span, soft_cap=shape.logits_soft_cap > 0, write_lse=lse is not None,
        sinks=shape.sinks, config=launch.config,
    )  # fmt: skip
    call = _Call(query, queries, pages, shape, output, lse, launch)
    # Where some requests bring fewer tokens, they do not pay for passes as wide as the others'. Known from shapes
    # alone, so that a captured batch, whose requests all bring as many, is one launch. Knobs that are given are one
    # launch's.
    if launch.config is None and rows > fewest and num_tokens < num_reqs * pass_query_len:
        most = max(fewest // group, 1)
        call.run(variant._replace(pass_rows=fewest), (1, most))
        call.run(variant, (most + 1, MAX_DECODE_QUERY_LEN))
    else:
        call.run(variant, (1, MAX_DECODE_QUERY_LEN))


class _Call(NamedTuple):
    """Arguments of :func:`paged_attention` for its launches."""

    query: torch.Tensor
    queries: Queries
    pages: Pages
    shape: AttentionShape
    output: torch.Tensor
    lse: torch.Tensor | None
    launch: Launch

    def run(self, variant: Variant, query_lens: tuple[int, int]) -> None:
        """One launch, for the requests whose query tokens are so many, the last number included."""
        query, queries, pages, shape, output, lse, launch = self
        kv_cache, rows, num_reqs, num_kv_heads = pages.kv_cache, variant.pass_rows, queries.num_reqs, shape.num_kv_heads
        variant = variant._replace(few=num_reqs * num_kv_heads <= FEW_SEGMENTS[rows])
        kernel, statics = _build(pages.transforms, variant, query.device)
        workspace: DecodeWorkspace = launch.workspace
        max_segments = num_kv_heads * math.ceil(shape.group * min(queries.max_query_len, query_lens[1]) / rows)
        assert num_reqs * max_segments <= workspace.arrivals.shape[0], "workspace too small"
        slots, partial_rows, partial_size = workspace.partial.shape
        assert partial_rows >= rows and partial_size == shape.head_size, "workspace too small"
        kernel.launch(
            min(kernel.max_ctas, slots // 2, workspace.aside.shape[0] * 32 // kernel.block),
            ARGUMENTS.structure(
                query=query.data_ptr(),
                output=output.data_ptr(),
                kv_cache=kv_cache.data_ptr(),
                block_table=queries.block_table.data_ptr(),
                seq_lens=queries.seq_lens.data_ptr(),
                query_start_loc=queries.query_start_loc.data_ptr(),
                partial=workspace.partial.data_ptr(),
                partial_state=workspace.state.data_ptr(),
                arrivals=workspace.arrivals.data_ptr(),
                aside=workspace.aside.data_ptr(),
                query_stride=query.stride(0),
                output_stride=output.stride(0),
                block_stride=byte_stride(kv_cache, 0),
                head_stride=byte_stride(kv_cache, 1),
                table_stride=queries.block_table.stride(0),
                num_reqs=num_reqs,
                num_tokens=query.shape[0],
                num_kv_heads=num_kv_heads,
                max_segments=max_segments,
                min_query_len=query_lens[0],
                max_query_len=query_lens[1],
                scale_log2=shape.scale * LOG2_E,
                soft_cap_log2=shape.logits_soft_cap * LOG2_E,
                output_lse=0 if lse is None else lse.data_ptr(),
                sinks=0 if pages.sinks is None else pages.sinks.data_ptr(),
                **statics.arguments,
            ),
            dependent=launch.dependent,
        )
