"""Launch pack_rows.cu: tokens that the recent windows of several layers keep into the layers' pages, by few launches.

Layers share a launch where they share the compiled kernel, the strides of their caches and the number of tokens. What
is a layer's own goes with the launch, among its arguments. So nothing has to be kept in step with caches and statics,
and a CUDA graph may hold the launch whenever it is captured.
"""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vllm_kvtuner.kernels import arguments
from vllm_kvtuner.kernels.arguments import Arguments, Field
from vllm_kvtuner.kernels.checks import check_pack
from vllm_kvtuner.kernels.contract import StepRows
from vllm_kvtuner.kernels.cuda import feedback_store
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, Source, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.feedback_store import FeedbackVariant, rounded_ranges, share_ctas, table_addresses
from vllm_kvtuner.kernels.cuda.reshape_and_cache import most_lanes
from vllm_kvtuner.kernels.cuda.rows import (
    NUM_WARPS,
    RowVariant,
    StoreVariant,
    byte_stride,
    transform_addresses,
    window_addresses,
)
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

MAX_LAYERS = 32
"""Of a launch, whose arguments are then below the 4 KB that every driver takes."""
SMALLEST_GROUP = 16
"""Tokens that a CTA rounds at a time where they are few; as many take it however many layers there are."""
_ROWS = ("key", "value", "key_stride", "value_stride")
_STRIDES = ("block_stride", "head_stride", "window_block_stride", "window_head_stride", "window_place_stride")
_STEP = (*_STRIDES, "num_slots", "feedback_ctas")
LAYER = Arguments(*(field for field in feedback_store.ARGUMENTS.fields if field.name not in (*_ROWS, *_STEP)))
STEP = Arguments(
    *(field for field in feedback_store.ARGUMENTS.fields if field.name in _STEP),
    Field("u32", "layer_ctas", "CTAs of a layer, those that round with feedback first"),
)


class _Layers(ctypes.Structure):
    _fields_ = (("of", LAYER.structure * MAX_LAYERS),)


ARGUMENTS = Arguments(
    Field("Layers", "layers", "what each layer has of its own", _Layers),
    Field("Step", "step", "what they share", STEP.structure),
)
DECLARATION = "\n".join(
    [
        LAYER.members("Layer"),
        STEP.members("Step"),
        f"struct Layers {{ Layer of[{MAX_LAYERS}]; }};",
        ARGUMENTS.declaration,
    ]
)


class _Launch(NamedTuple):
    """What layers of a launch have in common.

    Args:
        source: of the kernel for few tokens.
        variant: that it was made from.
        strides: as ``_STRIDES``.
        num_slots: tokens that have a slot or -1.
    """

    source: Source
    variant: FeedbackVariant
    strides: tuple[int, ...]
    num_slots: int


@kept_with_transforms
def source(transforms: LayerTransforms, variant: FeedbackVariant) -> Source:
    """What is compiled for a variant of a layer with the transforms."""
    headers = {**variant.store.rows.headers(), arguments.HEADER: DECLARATION}
    return Source("pack_rows", tuple(variant.macros(transforms).items()), tuple(headers.items()))


@kept_with_transforms
def _build(transforms: LayerTransforms, variant: FeedbackVariant, device: torch.device) -> BuiltKernel:
    return build(source(transforms, variant), 32 * NUM_WARPS, variant.shared_bytes, device)


@kept_with_transforms
def _statics(transforms: LayerTransforms, bits: tuple[int, int]) -> dict[str, int]:
    """Arguments that are a layer's statics, with codes of ``bits``."""
    return {**transform_addresses(transforms), **table_addresses(transforms, bits)}


def pack_rows(layers: Sequence[StepRows]) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.PackRows`, of layers with round feedback on a side at least.

    Bytes are those of a store at once by the CUDA kernel, whose code this is. A token that has a slot in the pages and
    none in the window is not packed. The first call of a variant compiles it.
    """
    launches: dict[_Launch, list[StepRows]] = {}
    for layer in layers:
        check_pack(layer)
        if layer.slot_mapping.shape[0]:
            launches.setdefault(_launch_of(layer), []).append(layer)
    for common, members in launches.items():
        count = math.ceil(len(members) / math.ceil(len(members) / MAX_LAYERS))
        for first in range(0, len(members), count):
            _pack(common, members[first : first + count])


def pack_variant(
    transforms: LayerTransforms, layout: PageLayout, num_kv_heads: int, dtype: torch.dtype, window_block_size: int
) -> FeedbackVariant:
    """What packs few tokens of a layer; arguments as :class:`RowVariant` and :class:`StoreVariant`."""
    ranges = rounded_ranges(transforms, (layout.k_bits, layout.v_bits))
    assert any(ranges), "layers without round feedback are stored at once"
    return FeedbackVariant(StoreVariant(RowVariant(layout, num_kv_heads, dtype, 32), window_block_size), ranges)


def for_tokens(variant: FeedbackVariant, num_slots: int, num_layers: int) -> FeedbackVariant:
    """What packs ``num_slots`` tokens of each of so many layers, by what packs few."""
    if num_slots <= SMALLEST_GROUP:
        return variant
    rows = variant.store.rows
    lanes = most_lanes(rows.layout.head_size, num_slots * rows.num_kv_heads * num_layers)
    return variant._replace(store=variant.store._replace(rows=rows._replace(most_lanes=lanes)))


def _launch_of(layer: StepRows) -> _Launch:
    pages, window = layer.pages, layer.window
    dtype, window_block_size = window.kv_cache.dtype, window.kv_cache.shape[2]
    variant = pack_variant(pages.transforms, pages.layout, pages.num_kv_heads, dtype, window_block_size)
    strides = {
        "block_stride": byte_stride(pages.kv_cache, 0),
        "head_stride": byte_stride(pages.kv_cache, 1),
        **window_addresses(window),
    }
    return _Launch(
        source(pages.transforms, variant),
        variant,
        tuple(strides[name] for name in _STRIDES),
        layer.slot_mapping.shape[0],
    )


def _pack(common: _Launch, members: Sequence[StepRows]) -> None:
    pages, num_slots = members[0].pages, common.num_slots
    variant = for_tokens(common.variant, num_slots, len(members))
    kernel = _build(pages.transforms, variant, pages.kv_cache.device)
    feedback_ctas, nearest = share_ctas(variant, num_slots, max(kernel.max_ctas // len(members), 1))
    step = STEP.structure(
        num_slots=num_slots,
        feedback_ctas=feedback_ctas,
        layer_ctas=feedback_ctas + nearest,
        **dict(zip(_STRIDES, common.strides, strict=True)),
    )
    given = ARGUMENTS.structure(step=step)
    for index, layer in enumerate(members):
        given.layers.of[index] = _own(layer)
    kernel.launch((feedback_ctas + nearest) * len(members), given)


def _own(layer: StepRows) -> Any:
    """What of the arguments is a layer's, as :data:`LAYER` has it."""
    pages, window, slot_mapping, positions = layer
    return LAYER.structure(
        kv_cache=pages.kv_cache.data_ptr(),
        window=window.kv_cache.data_ptr(),
        slot_mapping=slot_mapping.data_ptr(),
        window_slots=window.slot_mapping.data_ptr(),
        positions=0 if pages.transforms.key_offset is None or positions is None else positions.data_ptr(),
        **_statics(pages.transforms, (pages.layout.k_bits, pages.layout.v_bits)),
    )
