"""Store and gather in torch: what is stored comes back."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.helpers.paged_cache import empty_cache, make_layout, random_table, random_transforms, rotary_table, slots_of
from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, Pages, Span, StepRows, WindowRows
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.kernels.reference.rows import (
    gather_cache_ref,
    gather_rows_ref,
    read_back_ref,
    reshape_and_cache_ref,
    store_rows_ref,
)
from vllm_kvtuner.pages.feedback import RoundFeedback, triangular_factors
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, PrecisionPair
from vllm_kvtuner.pages.transforms import KEY, VALUE, LayerTransforms, rotate_values, transform_keys
from vllm_kvtuner.pages.views import page_sides

CPU = torch.device("cpu")
SEQ_LENS = [37, 1, 0, 16, 130]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_rows_come_back_as_they_were_stored():
    table, num_blocks = random_table(make_layout("K8V8", 64), SEQ_LENS, CPU)
    kv_cache = torch.full((num_blocks, 3, 16, 128), torch.nan, dtype=torch.bfloat16)
    key, value = torch.randn(2, sum(SEQ_LENS), 3, 64).bfloat16()
    slots = slots_of(table, SEQ_LENS, 16)
    store_rows_ref(key, value, WindowRows(kv_cache, slots))
    bounds = torch.tensor([0, *itertools.accumulate(SEQ_LENS)], dtype=torch.int32)
    keys, values = torch.empty(2, *key.shape)
    starts = torch.zeros(len(SEQ_LENS), dtype=torch.int32)
    gather_rows_ref(kv_cache, CachedTokens(table, bounds, starts, sum(SEQ_LENS)), keys, values)
    assert torch.equal(keys, key.float())
    assert torch.equal(values, value.float())
    before = kv_cache.clone()
    store_rows_ref(key, value, WindowRows(kv_cache, torch.full_like(slots, -1)))
    assert torch.equal(before.nan_to_num(), kv_cache.nan_to_num())


@pytest.mark.quick(1)
@pytest.mark.parametrize("pair", [pair.name for pair in QUANTIZED_PAIRS])
def test_what_is_stored_comes_back(pair):
    """Store, then gather, through every transform: within half a step of each row, rotated back."""
    layout = make_layout(pair, 64)
    rotary = rotary_table(64, False, 200, CPU)
    transforms = random_transforms(
        3, 64, CPU, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    table, num_blocks = random_table(layout, SEQ_LENS, CPU)
    kv_cache = empty_cache(layout, num_blocks, 3, CPU)
    key, value = torch.randn(2, sum(SEQ_LENS), 3, 64)
    positions = torch.cat([torch.arange(length) for length in SEQ_LENS])
    slots = slots_of(table, SEQ_LENS, 16)
    pages = Pages(kv_cache, layout, transforms)
    reshape_and_cache_ref(key, value, slots, positions, pages)
    keys, values = torch.empty_like(key), torch.empty_like(value)
    bounds = torch.tensor([0, *itertools.accumulate(SEQ_LENS)], dtype=torch.int32)
    starts = torch.zeros(len(SEQ_LENS), dtype=torch.int32)
    gather_cache_ref(pages, CachedTokens(table, bounds, starts, sum(SEQ_LENS)), keys, values)
    at_once = read_back_ref(key, value, positions, layout.pair, transforms)
    for got, read_back in zip((keys, values), at_once, strict=True):
        torch.testing.assert_close(read_back, got, rtol=0, atol=1e-5)
    k_scale, v_scale = (side.meta[..., 0].float() for side in page_sides(kv_cache, layout))
    stretch = transforms.key_equalization.max()
    for got, want, scale, factor in ((keys, key, k_scale, stretch), (values, value, v_scale, 1.0)):
        # Half a step in each stored number is sqrt(64) / 2 steps at most in one number rotated back.
        step = scale[slots // 16, :, slots % 16].max()
        assert (got - want).abs().max() <= 4.2 * factor * step
        assert (got - want).square().mean().sqrt() <= 0.35 * factor * step


@pytest.mark.quick(1)
@pytest.mark.parametrize("pair", [pair.name for pair in QUANTIZED_PAIRS])
def test_each_side_is_stored_with_its_own_feedback(pair):
    """Of the transformed rows, in the page's bits, whatever the search; reading and :func:`read_back_ref` agree."""
    layout = make_layout(pair, 64)
    rotary = rotary_table(64, True, 200, CPU)
    keys_know, values_know = random_feedback(3, 64, (0.8, 1.1)), random_feedback(3, 64, (0.7,))
    transforms = random_transforms(
        3, 64, CPU, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True, range_search=True
    )
    transforms = replace(transforms, key_feedback=keys_know, value_feedback=values_know)
    table, num_blocks = random_table(layout, SEQ_LENS, CPU)
    key, value = torch.randn(2, sum(SEQ_LENS), 3, 64)
    positions = torch.cat([torch.arange(length) for length in SEQ_LENS])
    slots = slots_of(table, SEQ_LENS, 16)
    pages = Pages(empty_cache(layout, num_blocks, 3, CPU), layout, transforms)
    reshape_and_cache_ref(key, value, slots, positions, pages)
    rows = transform_keys(key, positions, transforms), rotate_values(value, transforms)
    knows = transforms.feedback(KEY, layout.k_bits), transforms.feedback(VALUE, layout.v_bits)
    for side, row, know in zip(page_sides(pages.kv_cache, layout), rows, knows, strict=True):
        codes, scale, minimum = side.format.quantize(row, range_search=True, feedback=know)
        block, offset = slots // 16, slots % 16
        assert torch.equal(side.format.unpack(side.codes[block, :, offset]), codes)
        assert torch.equal(side.meta[block, :, offset], torch.stack([scale, minimum], dim=-1))
        nearest = side.format.quantize(row, range_search=True)[0]
        assert torch.equal(codes, nearest) == (side.format.bits == 8)
    read = gathered(pages, table, key)
    for got, at_once in zip(read, read_back_ref(key, value, positions, layout.pair, transforms), strict=True):
        torch.testing.assert_close(at_once, got, rtol=0, atol=1e-5)


def gathered(pages, table, key):
    keys, values = torch.empty(2, *key.shape)
    bounds = torch.tensor([0, *itertools.accumulate(SEQ_LENS)], dtype=torch.int32)
    starts = torch.zeros(len(SEQ_LENS), dtype=torch.int32)
    gather_cache_ref(pages, CachedTokens(table, bounds, starts, sum(SEQ_LENS)), keys, values)
    return keys, values


def random_feedback(heads, size, ranges):
    root = torch.eye(size, dtype=torch.float64) + 0.2 * torch.randn(heads, size, size, dtype=torch.float64)
    return RoundFeedback(triangular_factors(root @ root.mT), dict.fromkeys((2, 4), ranges))


def test_empty_slots_store_nothing():
    layout = make_layout("K4V4", 64)
    kv_cache = empty_cache(layout, 2, 1, CPU)
    before = kv_cache.clone()
    rows = torch.randn(3, 1, 64)
    pages = Pages(kv_cache, layout, LayerTransforms())
    reshape_and_cache_ref(rows, rows, torch.tensor([-1, -1]), None, pages)
    assert torch.equal(kv_cache, before)
    reshape_and_cache_ref(rows, rows, torch.tensor([-1, 20]), None, pages)
    changed = (kv_cache != before).any(-1).nonzero()
    assert set(changed[:, 0].tolist()) == {1}, "slot 20 lies in block 1"


def test_two_parts_of_a_store_are_the_store():
    """The window's rows first, and later the pages of several layers from there: bytes are the same, of each layer."""
    rotary = rotary_table(64, True, 200, CPU)
    positions, slots = torch.tensor([5, 190, 77, 0, 12]), torch.tensor([3, 40, -1, 17, -1])
    window_slots = torch.tensor([30, 31, -1, 2, 9])
    waiting, expected, got = [], [], []
    for index, pair in enumerate(["K4V2", "K2V2", "K4V4"]):
        transforms = random_transforms(
            2, 64, CPU, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
        )
        know = random_feedback(2, 64, (0.8, 1.1))
        transforms = replace(transforms, key_feedback=know, value_feedback=know if index else None)
        assert transforms.rounds_with_feedback(PrecisionPair.parse(pair))
        key, value = torch.randn(2, 5, 2, 64).bfloat16()
        layout = make_layout(pair, 64)
        for pages_of in (expected, got):
            pages = Pages(empty_cache(layout, 4, 2, CPU), layout, transforms)
            pages_of.append((pages.kv_cache, WindowRows(torch.zeros(4, 2, 16, 128).bfloat16(), window_slots)))
        reshape_and_cache_ref(key, value, slots, positions, pages._replace(kv_cache=expected[-1][0]), expected[-1][1])
        parts = ReferenceKernels(AttentionShape(2, 2, 64, 0.125), Span()).late_packing(layout.pair, transforms)
        empty = pages.kv_cache.clone()
        parts.keep_rows(key, value, got[-1][1])
        assert torch.equal(pages.kv_cache, empty)
        waiting.append(StepRows(pages, got[-1][1], slots, positions))
    parts.pack_rows(waiting)
    for (kv_cache, window), (mine, my_window) in zip(expected, got, strict=True):
        assert torch.equal(kv_cache, mine)
        assert torch.equal(window.kv_cache, my_window.kv_cache)
