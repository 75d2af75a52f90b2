"""Launch reshape_and_cache.cu: store of new tokens, keys and values in one kernel.

The contract is that of :func:`vllm_kvtuner.kernels.triton.reshape_and_cache.reshape_and_cache`, the portable path.
"""

import ctypes
import math

import torch

from vllm_kvtuner.kernels.contract import RecentRows, check_cache
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.rows import (
    NUM_WARPS,
    byte_stride,
    check_rows,
    row_defines,
    row_lanes,
    transform_addresses,
    unsupported,
    wide_lanes,
)
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

__all__ = ["MANY_ROWS", "reshape_and_cache", "unsupported"]

MANY_ROWS = 1 << 11
"""(token, KV head) rows from which fewer lanes per row still fill any card."""


def _defines(
    layout: PageLayout,
    num_kv_heads: int,
    dtype: torch.dtype,
    transforms: LayerTransforms,
    many_rows: bool,
    recent_block_size: int = 0,
) -> dict[str, int]:
    most_lanes = wide_lanes(layout.head_size) if many_rows else 32
    defines = row_defines(layout, num_kv_heads, dtype, transforms, most_lanes)
    return {**defines, "RANGE_SEARCH": int(transforms.range_search), "RECENT_BLOCK_SIZE": recent_block_size}


@kept_with_transforms
def _build(
    transforms: LayerTransforms,
    layout: PageLayout,
    num_kv_heads: int,
    dtype: torch.dtype,
    many_rows: bool,
    recent_block_size: int,
    device: torch.device,
) -> BuiltKernel:
    defines = _defines(layout, num_kv_heads, dtype, transforms, many_rows, recent_block_size)
    return build("reshape_and_cache", tuple(defines.items()), 32 * NUM_WARPS, 0, device)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    layout: PageLayout,
    transforms: LayerTransforms,
    recent: RecentRows | None = None,
) -> None:
    """Transform, quantize, pack and scatter new tokens to their slots, in place.

    As :func:`reshape_and_cache_ref`, which has the arguments' shapes. Without Hadamard and
    range search the bytes are the reference's. Otherwise a number within rounding of the middle between two codes may
    take the other code, and a row may take another of two ranges that are equally good but for rounding. The first
    call of a variant compiles it.

    Args:
        recent: where a recent window keeps the tokens, as :func:`store_rows_ref` does.
    """
    num_tokens, num_kv_heads, head_size = key.shape
    assert head_size == layout.head_size and value.shape == key.shape, (key.shape, value.shape, layout)
    assert value.dtype == key.dtype
    for rows in (key, value):
        check_rows(rows, head_size)
    check_cache(kv_cache, layout)
    num_slots = slot_mapping.shape[0]
    assert kv_cache.shape[1] == num_kv_heads and num_slots <= num_tokens
    assert slot_mapping.is_contiguous() and slot_mapping.dtype == torch.int64
    if transforms.key_offset is not None:
        assert positions is not None and positions.is_contiguous() and positions.dtype == torch.int64
    if recent is not None:
        recent.check(key, num_slots)
    if num_slots == 0:
        return
    many_rows = num_slots * num_kv_heads >= MANY_ROWS
    kernel = _build(
        transforms, layout, num_kv_heads, key.dtype, many_rows, recent.kv_cache.shape[2] if recent else 0, key.device
    )
    most_lanes = wide_lanes(head_size) if many_rows else 32
    tiles = 0
    for bits in (layout.k_bits, layout.v_bits):
        tiles += math.ceil(num_slots * row_lanes(head_size, bits, most_lanes) / 32) * num_kv_heads
    kernel.launch(
        min(math.ceil(tiles / NUM_WARPS), kernel.max_ctas),
        key.data_ptr(),
        value.data_ptr(),
        kv_cache.data_ptr(),
        slot_mapping.data_ptr(),
        0 if transforms.key_offset is None or positions is None else positions.data_ptr(),
        *transform_addresses(transforms),
        *(ctypes.c_uint32(byte_stride(rows)) for rows in (key, value, kv_cache)),
        ctypes.c_uint32(byte_stride(kv_cache, 1)),
        ctypes.c_int32(num_slots),
        recent.kv_cache.data_ptr() if recent else 0,
        recent.slot_mapping.data_ptr() if recent else 0,
        *(ctypes.c_uint32(byte_stride(recent.kv_cache, dim) if recent else 0) for dim in range(3)),
    )
