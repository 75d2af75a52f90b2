"""Launch reshape_and_cache.cu: store of new tokens, keys and values in one kernel."""

import math

import torch

from vllm_kvtuner.kernels import arguments
from vllm_kvtuner.kernels.arguments import Arguments
from vllm_kvtuner.kernels.checks import check_store
from vllm_kvtuner.kernels.contract import Pages, WindowRows
from vllm_kvtuner.kernels.cuda import feedback_store
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, Source, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.rows import (
    NUM_WARPS,
    STORE_FIELDS,
    RowVariant,
    StoreVariant,
    byte_stride,
    check_alignment,
    transform_addresses,
    unsupported,
    wide_lanes,
    window_addresses,
)
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

__all__ = ["MANY_ROWS", "reshape_and_cache", "unsupported"]

MANY_ROWS = 1 << 11
"""(token, KV head) rows from which fewer lanes per row still fill any card."""
ARGUMENTS = Arguments(*STORE_FIELDS)


def source(transforms: LayerTransforms, variant: StoreVariant) -> Source:
    """What is compiled for a variant of a layer with the transforms."""
    headers = {**variant.rows.headers(), arguments.HEADER: ARGUMENTS.declaration}
    return Source("reshape_and_cache", tuple(variant.macros(transforms).items()), tuple(headers.items()))


@kept_with_transforms
def _build(transforms: LayerTransforms, variant: StoreVariant, device: torch.device) -> BuiltKernel:
    return build(source(transforms, variant), 32 * NUM_WARPS, 0, device)


def source_of(transforms: LayerTransforms, variant: StoreVariant) -> Source:
    """What is compiled for a variant of a layer, with round feedback on a side or without."""
    layout = variant.rows.layout
    ranges = feedback_store.rounded_ranges(transforms, (layout.k_bits, layout.v_bits))
    if any(ranges):
        return feedback_store.source(transforms, feedback_store.FeedbackVariant(variant, ranges))
    return source(transforms, variant)


def store_variant(
    layout: PageLayout, num_kv_heads: int, dtype: torch.dtype, num_slots: int, window_block_size: int
) -> StoreVariant:
    """What stores ``num_slots`` tokens of a layer; other arguments as :class:`RowVariant` and :class:`StoreVariant`."""
    lanes = most_lanes(layout.head_size, num_slots * num_kv_heads)
    return StoreVariant(RowVariant(layout, num_kv_heads, dtype, lanes), window_block_size)


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
    rounding. With round feedback, what such a code leaves moves the codes of channels before it too. The first call of
    a variant compiles it.
    """
    check_store(key, value, slot_mapping, positions, pages, window)
    assert value.dtype == key.dtype, (key.dtype, value.dtype)
    for rows in (key, value):
        check_alignment(rows)
    num_slots = slot_mapping.shape[0]
    if num_slots == 0:
        return
    layout, transforms, kv_cache, num_kv_heads = pages.layout, pages.transforms, pages.kv_cache, pages.num_kv_heads
    window_block_size = 0 if window is None else window.kv_cache.shape[2]
    variant = store_variant(layout, num_kv_heads, key.dtype, num_slots, window_block_size)
    given = transform_addresses(transforms)
    if window is not None:
        given.update(window_addresses(window), window_slots=window.slot_mapping.data_ptr())
    given.update(
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
    )
    if any(feedback_store.rounded_ranges(transforms, (layout.k_bits, layout.v_bits))):
        feedback_store.launch(transforms, variant, key.device, num_slots, given)
        return
    kernel = _build(transforms, variant, key.device)
    tiles = sum(math.ceil(num_slots * lanes / 32) for lanes in variant.rows.lanes) * num_kv_heads
    kernel.launch(min(math.ceil(tiles / NUM_WARPS), kernel.max_ctas), ARGUMENTS.structure(**given))
