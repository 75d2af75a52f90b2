"""What the self-test of a kind of layer compiles, known without running it, so that all of it compiles side by side."""

from collections.abc import Iterator

import torch

from vllm_kvtuner.kernels.cuda import gather_cache, keep_rows, pack_rows, reshape_and_cache
from vllm_kvtuner.kernels.cuda.build import Source
from vllm_kvtuner.kernels.cuda.paged_attention import multiprocessor
from vllm_kvtuner.kernels.cuda.paged_attention_config import FEW_SEGMENTS, pass_rows
from vllm_kvtuner.kernels.cuda.rows import RowVariant, wide_lanes
from vllm_kvtuner.kernels.cuda.variant import Variant, needs_of
from vllm_kvtuner.kernels.self_test_cases import Case
from vllm_kvtuner.pages.transforms import LayerTransforms


def case_sources(case: Case, transforms: LayerTransforms, device: torch.device, decode: bool) -> list[Source]:
    """Sources that :func:`vllm_kvtuner.kernels.self_test.measure` has compiled, each once.

    Args:
        case: what a layer is like.
        transforms: that the case names, with any statics.
        device: a GPU.
        decode: whether decoding is tested.
    """
    found = [*_row_sources(case, transforms), *(_decode_sources(case, transforms, device) if decode else ())]
    return list(dict.fromkeys(found))


def _row_sources(case: Case, transforms: LayerTransforms) -> Iterator[Source]:
    """Of store, gather, and the store in two parts."""
    layout, heads, dtype, window = case.layout, case.shape.num_kv_heads, case.dtype, case.window_block_size
    portions = [end - begin + extra for begin, end, extra in case.portions]
    for num_slots in portions:
        variant = reshape_and_cache.store_variant(layout, heads, dtype, num_slots, window)
        yield reshape_and_cache.source_of(transforms, variant)
    yield gather_cache.source(transforms, RowVariant(layout, heads, dtype, wide_lanes(layout.head_size)))
    if window and transforms.rounds_with_feedback(layout.pair):
        yield keep_rows.source(layout.head_size, heads, dtype, window)
        few = pack_rows.pack_variant(transforms, layout, heads, dtype, window)
        for num_slots in portions:
            yield pack_rows.source(transforms, pack_rows.for_tokens(few, num_slots, 1))


def _decode_sources(case: Case, transforms: LayerTransforms, device: torch.device) -> Iterator[Source]:
    layout, shape, card = case.layout, case.shape, multiprocessor(device)
    for count, query_len in case.limits.batches:
        pass_query_len = min(query_len, case.limits.max_decode_query_len)
        rows = pass_rows(shape.group * pass_query_len, needs_of(layout, transforms), card)
        few = count * shape.num_kv_heads <= FEW_SEGMENTS[rows]
        soft_cap = shape.logits_soft_cap > 0
        lse, sinks = case.write_lse, shape.sinks
        variant = Variant(layout, shape.group, rows, case.dtype, case.span, soft_cap, lse, few, sinks=sinks)
        yield variant.settle(transforms, card).source()
