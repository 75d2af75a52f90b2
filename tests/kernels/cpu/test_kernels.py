"""The compiled operations against the reference, on the same packed bytes or the same rows; both in fp32."""

import itertools
from dataclasses import fields, replace

import pytest
import torch

from tests.helpers.paged_cache import (
    empty_cache,
    make_layout,
    random_cache,
    random_table,
    random_transforms,
    rotary_table,
    slots_of,
)
from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, Pages, Span, WindowRows
from vllm_kvtuner.kernels.cpu import kernels as cpu
from vllm_kvtuner.kernels.cpu.kernels import CompiledKernels
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.pages.feedback import RoundFeedback, triangular_factors
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import LayerTransforms, rotate_values, transform_keys
from vllm_kvtuner.pages.views import page_sides

CPU = torch.device("cpu")
SEQ_LENS = [37, 1, 0, 16, 130, 600]
QUERY_LENS = [3, 1, 1, 16, 2, 1]
PAIRS = [pair.name for pair in QUANTIZED_PAIRS]
ATTENTION_TOLERANCE = 1e-5
"""Of outputs over the largest one: sums of up to 600 terms in fp32, in another order."""
SAME_ROWS = 0.98
"""Share of rows whose bytes are the reference's: elsewhere a number lies so near to the middle between two codes, or
two ranges are so nearly as good, that the order of a sum decides."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def transforms_of(name: str, heads: int, size: int) -> LayerTransforms:
    if name == "none":
        return LayerTransforms()
    if name == "hadamard":
        return LayerTransforms(key_hadamard=True, value_hadamard=True, range_search=True)
    if name == "unrotated offset":
        return random_transforms(heads, size, CPU, offset=2.0)
    # The second half of the head is not rotated where pairs are neighbours.
    neox = name == "all"
    rotary = rotary_table(size if neox else size // 2, neox, 700, CPU)
    switches = dict(key_hadamard=True, value_hadamard=True, range_search=True)
    return random_transforms(heads, size, CPU, rotary, offset=3.0, equalization=True, **switches)


TRANSFORMS = ["none", "hadamard", "unrotated offset", "all", "all, neighbours"]


def attended(cache, transforms, shape, span, dtype, kernels):
    """Output and log-sum-exp; queries stand apart in memory, and three rows of output are nobody's."""
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(sum(QUERY_LENS) + 3, 2 * shape.num_heads, shape.head_size, generator=generator).to(dtype)
    query = fused[:, : shape.num_heads]
    output, lse = torch.full_like(query, torch.nan), torch.full((shape.num_heads, len(query)), torch.nan)
    kernels(shape, span).attend(query, cache.queries(QUERY_LENS), cache.pages(transforms), output, lse)
    return output, lse


def check_attention(cache, transforms, shape, span, dtype):
    output, lse = attended(cache, transforms, shape, span, dtype, CompiledKernels)
    want, want_lse = attended(cache, transforms, shape, span, dtype, ReferenceKernels)
    tokens = sum(QUERY_LENS)
    assert not output[tokens:].any() and (lse[:, tokens:] == -torch.inf).all()
    output, lse, want, want_lse = output[:tokens], lse[:, :tokens], want[:tokens], want_lse[:, :tokens]
    rounding = want.abs() * (torch.finfo(dtype).eps if dtype != torch.float32 else 0)
    assert ((output - want).abs() - rounding).max() <= ATTENTION_TOLERANCE * want.abs().max()
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.quick(1)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_of_every_pair(pair, dtype):
    cache = random_cache(make_layout(pair, 64), SEQ_LENS, 2, CPU)
    check_attention(cache, transforms_of("hadamard", 2, 64), cache.shape(6), Span(), dtype)


@pytest.mark.quick(1)
@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256, 512])
def test_attention_of_every_head_size_and_transform(head_size, transforms):
    cache = random_cache(make_layout("K4V2", head_size, block_size=32), SEQ_LENS, 2, CPU)
    check_attention(cache, transforms_of(transforms, 2, head_size), cache.shape(4, 5.0), Span(), torch.float32)


@pytest.mark.quick(1)
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
@pytest.mark.parametrize(
    "span",
    [Span(1), Span(20), Span(None, 5), Span(20, 17), Span(None, 24, 4), Span(100, 24, 4), Span(None, 700)],
    ids=str,
)
def test_attention_of_every_span(span, soft_cap):
    cache = random_cache(make_layout("K8V4", 64), SEQ_LENS, 2, CPU)
    check_attention(cache, transforms_of("all", 2, 64), cache.shape(4, soft_cap), span, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("span", [Span(), Span(20, 17)], ids=str)
def test_attention_sinks_count_in_every_softmax(span, dtype):
    """Also of queries that see no token, whose log-sum-exp is their sink's logit then."""
    cache = random_cache(make_layout("K4V4", 64), SEQ_LENS, 2, CPU)
    sinks = torch.randn(4).to(dtype) * 3
    shape = cache.shape(4)._replace(sinks=dtype)
    pages = cache.pages(transforms_of("hadamard", 2, 64))._replace(sinks=sinks)
    query = torch.randn(sum(QUERY_LENS), 4, 64)
    results = []
    for kernels in (CompiledKernels, ReferenceKernels):
        output, lse = torch.full_like(query, torch.nan), torch.full((4, len(query)), torch.nan)
        kernels(shape, span).attend(query, cache.queries(QUERY_LENS), pages, output, lse)
        results.append((output, lse))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
    without = torch.empty_like(query)
    bare = shape._replace(sinks=None)
    CompiledKernels(bare, span).attend(query, cache.queries(QUERY_LENS), pages._replace(sinks=None), without)
    assert not torch.allclose(results[0][0], without)


def test_what_no_query_sees_may_hold_anything():
    """Blocks that have left a sliding window, tokens that are not packed yet, and a block table's stale entries."""
    cache = random_cache(make_layout("K4V4", 64), [100], 2, CPU)
    query, span = torch.randn(1, 4, 64), Span(50, skip_newest=20)
    outputs = []
    for poisoned in (False, True):
        if poisoned:
            cache.poison_newest(20)
            cache.kv_cache[cache.block_table[0, :3].long()] = 0xFF
        outputs.append(torch.empty_like(query))
        CompiledKernels(cache.shape(4), span).attend(query, cache.queries([1]), cache.pages(), outputs[-1])
    assert not outputs[0].isnan().any()
    assert torch.equal(*outputs)


def test_nan_in_what_a_query_sees_is_not_lost():
    cache = random_cache(make_layout("K4V4", 64), [100], 1, CPU)
    _, values = cache.sides
    values.meta[cache.block_table[0, 3].long(), 0, 5] = torch.nan
    output = torch.empty(1, 2, 64)
    CompiledKernels(cache.shape(2), Span()).attend(torch.randn(1, 2, 64), cache.queries([1]), cache.pages(), output)
    assert output.isnan().all()


@pytest.mark.quick(2)
@pytest.mark.parametrize("packed", [False, True], ids=["16 bits", "8 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sliding_window", [None, 100])
def test_windows_merge_as_the_references(packed, dtype, sliding_window):
    shape, span = AttentionShape(4, 2, 64, 0.125, 5.0), Span(sliding_window, 24, 4)
    layout = make_layout("K8V8", 64)
    cache = random_cache(layout, SEQ_LENS, 2, CPU)
    rows = cache.pages(transforms_of("hadamard", 2, 64))
    if not packed:
        rows = torch.randn(*cache.kv_cache.shape[:3], 128).to(dtype)
    query = torch.randn(sum(QUERY_LENS), 4, 64).to(dtype)
    older, lse = torch.randn(*query.shape), torch.randn(4, len(query))
    lse[:, ::3] = -torch.inf
    older[::3] = torch.nan  # what nobody sees
    older[::3] = 0
    results = []
    for kernels in (CompiledKernels, ReferenceKernels):
        merged = older.clone()
        kernels(shape, span).merge_window(query, cache.queries(QUERY_LENS), rows, merged, lse)
        results.append(merged)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert not torch.equal(results[0], older)


def random_feedback(heads, size, ranges):
    root = torch.eye(size, dtype=torch.float64) + 0.2 * torch.randn(heads, size, size, dtype=torch.float64) / size**0.5
    return RoundFeedback(triangular_factors(root @ root.mT), dict.fromkeys((2, 4), ranges))


@pytest.mark.quick(1)
@pytest.mark.parametrize("feedback", [False, True], ids=["nearest", "feedback"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_store(pair, dtype, feedback):
    layout, heads = make_layout(pair, 64), 3
    transforms = transforms_of("all", heads, 64)
    if feedback:
        sides = random_feedback(heads, 64, (0.8, 1.1, 1.0)), random_feedback(heads, 64, (0.9,))
        transforms = replace(transforms, key_feedback=sides[0], value_feedback=sides[1])
    check_store(layout, heads, dtype, transforms)


@pytest.mark.quick(2)
@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("head_size", [32, 80, 96, 128, 256, 512])
def test_store_of_every_head_size_and_transform(head_size, transforms):
    check_store(make_layout("K2V4", head_size), 2, torch.float32, transforms_of(transforms, 2, head_size))


def check_store(layout, heads, dtype, transforms):
    """The reference's bytes in nearly all rows, errors as small as its in all together, and no byte elsewhere."""
    table, num_blocks = random_table(layout, SEQ_LENS, CPU)
    fused = torch.randn(sum(SEQ_LENS), 3, heads, layout.head_size).to(dtype)  # as a slice of a projection
    key, value = fused[:, 0], fused[:, 1]
    positions = torch.cat([torch.arange(length) for length in SEQ_LENS])
    slots = slots_of(table, SEQ_LENS, 16)
    slots[::7] = -1
    shape = AttentionShape(heads, heads, layout.head_size, 1.0)
    caches = []
    for kernels in (CompiledKernels, ReferenceKernels):
        kv_cache = empty_cache(layout, num_blocks, heads, CPU)
        kernels(shape, Span()).store(key, value, slots, positions, Pages(kv_cache, layout, transforms))
        caches.append(kv_cache)
    kept = slots >= 0
    block, offset = slots[kept] // 16, slots[kept] % 16
    exact = transform_keys(key[kept], positions[kept], transforms), rotate_values(value[kept], transforms)
    known = transforms.key_feedback, transforms.value_feedback
    for ours, theirs, rows, feedback in zip(
        *(page_sides(cache, layout) for cache in caches), exact, known, strict=True
    ):
        codes, meta = ((side.codes[block, :, offset], side.meta[block, :, offset]) for side in (ours, theirs))
        same = (codes[0] == meta[0]).all(-1) & (codes[1] == meta[1]).all(-1)
        assert same.float().mean() >= SAME_ROWS
        errors = [rows - side.format.dequantize(*each) for side, each in ((ours, codes), (theirs, meta))]
        if feedback is not None and ours.format.bits < 8:
            costs = [feedback.weighted_error(error).sum() for error in errors]
        else:
            costs = [error.square().sum() for error in errors]
        assert costs[0] <= 1.001 * costs[1]
        # Of both, the rows that were written; what is left is what nobody stored.
        for side in (ours, theirs):
            side.codes[block, :, offset] = 0
            side.meta[block, :, offset] = 0
    assert torch.equal(*(cache._base for cache in caches))


def test_rows_of_one_number_and_of_nan_are_stored_as_the_references():
    layout = make_layout("K4V2", 64)
    key = torch.full((3, 1, 64), 2.5)
    key[1] = 0
    value = torch.randn(3, 1, 64)
    value[2, 0, 7] = torch.nan
    read = []
    for kernels in (CompiledKernels, ReferenceKernels):
        served = kernels(AttentionShape(1, 1, 64, 1.0), Span())
        pages = Pages(empty_cache(layout, 1, 1, CPU), layout, LayerTransforms())
        served.store(key, value, torch.arange(3), None, pages)
        starts = torch.zeros(1, dtype=torch.int32)
        out = torch.empty(2, 3, 1, 64)
        bounds = torch.tensor([0, 3], dtype=torch.int32)
        served.gather(pages, CachedTokens(torch.zeros(1, 1, dtype=torch.int32), bounds, starts, 3), out[0], out[1])
        read.append(out)
    torch.testing.assert_close(*read, rtol=0, atol=1e-6, equal_nan=True)
    assert torch.equal(read[0][0], key) and read[0][1, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_store_keeps_rows_in_a_window(dtype):
    layout, tokens = make_layout("K4V4", 64), 40
    key, value = torch.randn(2, tokens, 2, 64).to(dtype)
    slots, window_slots = torch.arange(tokens), torch.randperm(64)[:tokens]
    window_slots[::3] = -1
    windows = []
    for kernels in (CompiledKernels, ReferenceKernels):
        rows = torch.full((4, 3, 16, 128), torch.nan, dtype=dtype)[:, :2]
        pages = Pages(empty_cache(layout, 3, 2, CPU), layout, LayerTransforms())
        served = kernels(AttentionShape(2, 2, 64, 1.0), Span())
        served.store(key, value, slots, None, pages, WindowRows(rows, window_slots))
        windows.append(rows._base)
    assert torch.equal(*(rows.nan_to_num(7.0) for rows in windows))


@pytest.mark.quick(2)
@pytest.mark.parametrize("transforms", TRANSFORMS)
@pytest.mark.parametrize("pair", ["K8V2", "K4V8", "K2V4"])
def test_gather(pair, transforms):
    """Slices that begin behind a request's first token, into rows of which some belong to nobody."""
    cache = random_cache(make_layout(pair, 96), SEQ_LENS, 2, CPU)
    lengths = [length - 3 if length > 3 else length for length in SEQ_LENS]
    starts = torch.tensor([full - length for full, length in zip(SEQ_LENS, lengths, strict=True)], dtype=torch.int32)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    tokens = CachedTokens(cache.block_table, bounds, starts, sum(lengths))
    pages = cache.pages(transforms_of(transforms, 2, 96))
    results = []
    for kernels in (CompiledKernels, ReferenceKernels):
        out = torch.full((2, sum(lengths) + 2, 2, 96), torch.nan)
        kernels(cache.shape(2), Span()).gather(pages, tokens, out[0], out[1])
        results.append(out)
    torch.testing.assert_close(*results, rtol=0, atol=2e-5, equal_nan=True)


def test_several_threads_give_what_one_gives(monkeypatch):
    cache = random_cache(make_layout("K4V4", 64), SEQ_LENS, 2, CPU)
    transforms, results = transforms_of("all", 2, 64), []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(attended(cache, transforms, cache.shape(4), Span(), torch.float32, CompiledKernels))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_reference_serves_formats_that_the_sources_do_not_know(monkeypatch):
    monkeypatch.setattr(cpu, "serves", lambda pages: False)
    monkeypatch.setattr(CompiledKernels, "_of", None)
    cache = random_cache(make_layout("K4V4", 64), SEQ_LENS, 2, CPU)
    shape, tokens = cache.shape(4), sum(QUERY_LENS)
    ours, want = (
        attended(cache, LayerTransforms(), shape, Span(), torch.float32, kernels)
        for kernels in (CompiledKernels, ReferenceKernels)
    )
    assert torch.equal(ours[0][:tokens], want[0][:tokens])


def test_what_is_added_to_pages_later_is_left_to_the_reference(monkeypatch):
    """A transform or a format that the sources do not know would else be left out without a word."""
    pages = random_cache(make_layout("K4V4", 64), [20], 2, CPU).pages(transforms_of("all", 2, 64))
    assert cpu.serves(pages)
    monkeypatch.setattr(cpu, "KNOWN_TRANSFORMS", cpu.KNOWN_TRANSFORMS - {"value_hadamard"})
    assert not cpu.serves(pages)
    assert {field.name for field in fields(LayerTransforms)} >= cpu.KNOWN_TRANSFORMS
