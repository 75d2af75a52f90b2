"""Launch gather_cache.cu: dequantize cached tokens back to model space, keys and values in one kernel.

The contract is that of :func:`vllm_kvtuner.kernels.triton.gather_cache.gather_cache`, the portable path.
"""

import ctypes
import math

import torch

from vllm_kvtuner.kernels.contract import check_cache
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.rows import (
    NUM_WARPS,
    byte_stride,
    check_rows,
    row_defines,
    transform_addresses,
    unsupported,
    wide_lanes,
)
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

__all__ = ["gather_cache", "unsupported"]

TILE_TOKENS = 16
"""Tokens that a warp takes, as gather_cache.cu has it."""


def _defines(layout: PageLayout, num_kv_heads: int, dtype: torch.dtype, transforms: LayerTransforms) -> dict[str, int]:
    return row_defines(layout, num_kv_heads, dtype, transforms, wide_lanes(layout.head_size))


@kept_with_transforms
def _build(
    transforms: LayerTransforms, layout: PageLayout, num_kv_heads: int, dtype: torch.dtype, device: torch.device
) -> BuiltKernel:
    defines = _defines(layout, num_kv_heads, dtype, transforms)
    return build("gather_cache", tuple(defines.items()), 32 * NUM_WARPS, 0, device)


def gather_cache(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    seq_starts: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    layout: PageLayout,
    transforms: LayerTransforms,
    *,
    num_tokens: int,
) -> None:
    """Dequantize a slice of each request's cached tokens back to model space, in place.

    As :func:`gather_cache_ref`, which has the arguments' shapes. The first call of a variant
    compiles it.
    """
    num_reqs = block_table.shape[0]
    num_kv_heads = kv_cache.shape[1]
    check_cache(kv_cache, layout)
    for rows in (key_out, value_out):
        assert rows.shape[0] >= num_tokens and rows.shape[1:] == (num_kv_heads, layout.head_size), rows.shape
        assert rows.dtype == key_out.dtype
        check_rows(rows, layout.head_size)
    assert block_table.dtype == torch.int32 and block_table.stride(1) == 1
    assert cu_seq_lens.shape == (num_reqs + 1,) and cu_seq_lens.dtype == torch.int32 and cu_seq_lens.is_contiguous()
    assert seq_starts.shape == (num_reqs,) and seq_starts.dtype == torch.int32 and seq_starts.is_contiguous()
    if num_tokens == 0:
        return
    kernel = _build(transforms, layout, num_kv_heads, key_out.dtype, kv_cache.device)
    tiles = math.ceil(num_tokens / TILE_TOKENS) * num_kv_heads
    kernel.launch(
        2 * math.ceil(tiles / NUM_WARPS),
        kv_cache.data_ptr(),
        block_table.data_ptr(),
        cu_seq_lens.data_ptr(),
        seq_starts.data_ptr(),
        key_out.data_ptr(),
        value_out.data_ptr(),
        *transform_addresses(transforms),
        *(ctypes.c_uint32(byte_stride(kv_cache, dim)) for dim in (0, 1)),
        ctypes.c_uint32(block_table.stride(0)),
        *(ctypes.c_uint32(byte_stride(rows)) for rows in (key_out, value_out)),
        ctypes.c_int32(num_tokens),
        ctypes.c_int32(num_reqs),
    )
