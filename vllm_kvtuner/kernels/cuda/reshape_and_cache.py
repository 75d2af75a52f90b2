"""Launch reshape_and_cache.cu: store of new tokens, keys and values in one kernel."""

import math
from typing import NamedTuple

import torch

from vllm_kvtuner.kernels.contract import Pages, WindowRows, check_store
from vllm_kvtuner.kernels.cuda import arguments
from vllm_kvtuner.kernels.cuda.arguments import Arguments, Field
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, Source, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.rows import (
    NUM_WARPS,
    RowVariant,
    byte_stride,
    check_alignment,
    transform_addresses,
    unsupported,
    wide_lanes,
)
from vllm_kvtuner.pages.transforms import LayerTransforms

__all__ = ["MANY_ROWS", "reshape_and_cache", "unsupported"]

MANY_ROWS = 1 << 11
"""(token, KV head) rows from which fewer lanes per row still fill any card."""
ARGUMENTS = Arguments(
    Field("const u8*", "key", "[tokens][KV heads][HEAD_SIZE] of NUMBERS"),
    Field("const u8*", "value", "likewise"),
    Field("u8*", "kv_cache", "chunks"),
    Field("const long long*", "slot_mapping", "[slots]"),
    Field("const long long*", "positions", "[slots]"),
    Field("const float*", "offset", "[KV heads][HEAD_SIZE]"),
    Field("const float*", "partner", "[KV heads][HEAD_SIZE], what the sines multiply"),
    Field("const u8*", "cos_sin", "[positions][ROTARY_DIM] of ROTARY_NUMBERS"),
    Field("const float*", "equalization", "[KV heads][HEAD_SIZE]"),
    Field("u32", "key_stride", "bytes from token to token"),
    Field("u32", "value_stride", "bytes from token to token"),
    Field("u32", "block_stride", "bytes"),
    Field("u32", "head_stride", "bytes"),
    Field("int", "num_slots", "tokens that have a slot or -1"),
    Field("u8*", "window", "[blocks][KV heads][WINDOW_BLOCK_SIZE][2][HEAD_SIZE] of NUMBERS, a key beside its value"),
    Field("const long long*", "window_slots", "[slots]"),
    Field("u32", "window_block_stride", "bytes"),
    Field("u32", "window_head_stride", "bytes"),
    Field("u32", "window_place_stride", "bytes"),
)


class StoreVariant(NamedTuple):
    """What a compiled store depends on besides the layer's transforms.

    Args:
        rows: as gather has it.
        window_block_size: tokens per block of the recent window that keeps tokens too, 0 for none.
    """

    rows: RowVariant
    window_block_size: int = 0

    def macros(self, transforms: LayerTransforms) -> dict[str, int]:
        search, window = int(transforms.range_search), self.window_block_size
        return {**self.rows.macros(transforms), "RANGE_SEARCH": search, "WINDOW_BLOCK_SIZE": window}


def source(transforms: LayerTransforms, variant: StoreVariant) -> Source:
    """What is compiled for a variant of a layer with the transforms."""
    headers = {**variant.rows.headers(), arguments.HEADER: ARGUMENTS.declaration}
    return Source("reshape_and_cache", tuple(variant.macros(transforms).items()), tuple(headers.items()))


@kept_with_transforms
def _build(transforms: LayerTransforms, variant: StoreVariant, device: torch.device) -> BuiltKernel:
    return build(source(transforms, variant), 32 * NUM_WARPS, 0, device)


def most_lanes(head_size: int, num_rows: int) -> int:
    """Lanes that share a row at most, where ``num_rows`` are stored."""
    return wide_lanes(head_size) if num_rows >= MANY_ROWS else 32


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    pages: Pages,
    window: WindowRows | None = None,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.ReshapeAndCache`.

    Without Hadamard and range search the bytes are the reference's. Otherwise a number within rounding of the middle
    between two codes may take the other code, and a row may take another of two ranges that are equally good but for
    rounding. The first call of a variant compiles it.
    """
    check_store(key, value, slot_mapping, positions, pages, window)
    assert value.dtype == key.dtype, (key.dtype, value.dtype)
    for rows in (key, value):
        check_alignment(rows)
    num_slots = slot_mapping.shape[0]
    if num_slots == 0:
        return
    layout, transforms, kv_cache, num_kv_heads = pages.layout, pages.transforms, pages.kv_cache, pages.num_kv_heads
    row_variant = RowVariant(layout, num_kv_heads, key.dtype, most_lanes(layout.head_size, num_slots * num_kv_heads))
    variant = StoreVariant(row_variant, 0 if window is None else window.kv_cache.shape[2])
    kernel = _build(transforms, variant, key.device)
    tiles = sum(math.ceil(num_slots * lanes / 32) for lanes in row_variant.lanes) * num_kv_heads
    extra = transform_addresses(transforms)
    if window is not None:
        extra.update(
            window=window.kv_cache.data_ptr(),
            window_slots=window.slot_mapping.data_ptr(),
            window_block_stride=byte_stride(window.kv_cache, 0),
            window_head_stride=byte_stride(window.kv_cache, 1),
            window_place_stride=byte_stride(window.kv_cache, 2),
        )
    kernel.launch(
        min(math.ceil(tiles / NUM_WARPS), kernel.max_ctas),
        ARGUMENTS.structure(
            key=key.data_ptr(),
            value=value.data_ptr(),
            kv_cache=kv_cache.data_ptr(),
            slot_mapping=slot_mapping.data_ptr(),
            positions=0 if transforms.key_offset is None or positions is None else positions.data_ptr(),
            key_stride=byte_stride(key),
            value_stride=byte_stride(value),
            block_stride=byte_stride(kv_cache, 0),
            head_stride=byte_stride(kv_cache, 1),
            num_slots=num_slots,
            **extra,
        ),
    )
