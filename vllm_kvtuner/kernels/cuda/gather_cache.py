"""Launch gather_cache.cu: dequantize cached tokens back to model space, keys and values in one kernel."""

import math

import torch

from vllm_kvtuner.kernels import arguments
from vllm_kvtuner.kernels.arguments import Arguments, Field
from vllm_kvtuner.kernels.checks import check_gather
from vllm_kvtuner.kernels.contract import CachedTokens, Pages
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, Source, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.rows import (
    NUM_WARPS,
    STATIC_FIELDS,
    RowVariant,
    byte_stride,
    check_alignment,
    transform_addresses,
    unsupported,
    wide_lanes,
)
from vllm_kvtuner.pages.transforms import LayerTransforms

__all__ = ["gather_cache", "unsupported"]

TILE_TOKENS = 16
"""Tokens that a warp takes, as gather_cache.cu has it."""
ARGUMENTS = Arguments(
    Field("const u8*", "kv_cache", "chunks"),
    Field("const int*", "block_table", "[requests][blocks]"),
    Field("const int*", "cu_seq_lens", "[requests + 1]"),
    Field("const int*", "seq_starts", "[requests]"),
    Field("u8*", "key", "[tokens][KV heads][HEAD_SIZE] of NUMBERS"),
    Field("u8*", "value", "likewise"),
    *STATIC_FIELDS,
    Field("u32", "block_stride", "bytes"),
    Field("u32", "head_stride", "bytes"),
    Field("u32", "table_stride", "numbers"),
    Field("u32", "key_stride", "bytes from token to token"),
    Field("u32", "value_stride", "bytes from token to token"),
    Field("int", "num_tokens", "of all slices"),
    Field("int", "num_reqs", "that have a slice"),
)


def source(transforms: LayerTransforms, variant: RowVariant) -> Source:
    """What is compiled for a variant of a layer with the transforms."""
    headers = {**variant.headers(), arguments.HEADER: ARGUMENTS.declaration}
    return Source("gather_cache", tuple(variant.macros(transforms).items()), tuple(headers.items()))


@kept_with_transforms
def _build(transforms: LayerTransforms, variant: RowVariant, device: torch.device) -> BuiltKernel:
    return build(source(transforms, variant), 32 * NUM_WARPS, 0, device)


def gather_cache(pages: Pages, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.GatherCache`. The first call of a variant compiles it."""
    check_gather(pages, tokens, key_out, value_out)
    for rows in (key_out, value_out):
        check_alignment(rows)
    if tokens.num_tokens == 0:
        return
    layout, kv_cache = pages.layout, pages.kv_cache
    variant = RowVariant(layout, pages.num_kv_heads, key_out.dtype, wide_lanes(layout.head_size))
    kernel = _build(pages.transforms, variant, kv_cache.device)
    tiles = math.ceil(tokens.num_tokens / TILE_TOKENS) * pages.num_kv_heads
    kernel.launch(
        2 * math.ceil(tiles / NUM_WARPS),
        ARGUMENTS.structure(
            kv_cache=kv_cache.data_ptr(),
            block_table=tokens.block_table.data_ptr(),
            cu_seq_lens=tokens.cu_seq_lens.data_ptr(),
            seq_starts=tokens.seq_starts.data_ptr(),
            key=key_out.data_ptr(),
            value=value_out.data_ptr(),
            block_stride=byte_stride(kv_cache, 0),
            head_stride=byte_stride(kv_cache, 1),
            table_stride=tokens.block_table.stride(0),
            key_stride=byte_stride(key_out),
            value_stride=byte_stride(value_out),
            num_tokens=tokens.num_tokens,
            num_reqs=tokens.block_table.shape[0],
            **transform_addresses(pages.transforms),
        ),
    )
