"""Pictures' tokens attend to each other in both directions: both ways of prefill against a dense mask."""

import pytest
import torch

from tests.helpers.flash_attention import flash_attention
from tests.helpers.paged_cache import empty_cache, make_layout, random_table, slots_of, starts_of
from vllm_kvtuner.attention.both_ways import both_ways, window_of_run
from vllm_kvtuner.attention.metadata import KVTunerMetadata
from vllm_kvtuner.attention.prefill import GpuPrefill, Prefills, ReferencePrefill, WorkspaceShape
from vllm_kvtuner.attention.prefill_plan import PlanRules, plan
from vllm_kvtuner.kernels.contract import AttentionShape, Pages, Span
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.pages.transforms import LayerTransforms

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 64
SCALE = SIZE**-0.5
LENS = (50, 90, 33)
CONTEXTS = (1, 40, 0)
RANGES = {0: [], 1: [(4, 11), (30, 45), (50, 70)], 2: [(0, 8), (9, 20)]}
"""A decode; a picture that is cached, one of which the prefix cache holds the half, and one in this step; two that
follow each other."""


def test_what_attends_in_both_directions():
    starts, lens = starts_of([1, 50, 33], CPU), torch.tensor(LENS)
    found = both_ways(RANGES, starts, lens, 3, CPU)
    assert [tuple(run) for run in found.runs] == [(1, 1, 6), (1, 11, 31), (2, 51, 59), (2, 60, 71)]
    assert found.query_rows[:5].tolist() == [5, 4, 3, 2, 1] and found.key_rows[:5].tolist() == [6, 5, 4, 3, 2]
    assert found.cu_lens.tolist() == [0, 5, 25, 33, 44] and found.longest == 20


@pytest.mark.parametrize("ranges", [None, {}, {0: [], 1: []}, {0: [(49, 49)], 1: [(3, 3)]}, {0: [(40, 60)]}], ids=str)
def test_nothing_does(ranges):
    """Text, pictures of one token, and one of which a single token is new."""
    assert both_ways(ranges, starts_of([1, 50, 33], CPU), torch.tensor(LENS), 3, CPU) is None


def test_windows_within_pictures():
    assert window_of_run(None, True, 500) is None
    assert window_of_run(64, True, 500) == 63
    assert window_of_run(64, False, 63) is None
    with pytest.raises(ValueError, match=r"a picture of 65 tokens .* must fit the layer's sliding window of 64"):
        window_of_run(64, False, 64)


@pytest.mark.quick(1)
@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize(
    ("window", "clamped"), [(None, False), (24, False), (12, True)], ids=["full", "window", "clamped"]
)
@pytest.mark.parametrize("contexts", [CONTEXTS, (0, 0, 0)], ids=["cached", "fresh"])
def test_prompts_with_pictures(contexts, window, clamped, has_sinks, gpu):
    torch.manual_seed(0)
    queries = [length - context for length, context in zip(LENS, contexts, strict=True)]
    layout = make_layout("K8V8", SIZE)
    block_table, num_blocks = random_table(layout, list(LENS), CPU)
    sinks = torch.randn(HEADS) if has_sinks else None
    pages = Pages(empty_cache(layout, num_blocks, KV_HEADS, CPU), layout, LayerTransforms(), sinks)
    shape, span = AttentionShape(HEADS, KV_HEADS, SIZE, SCALE, 0.0, torch.float32 if has_sinks else None), Span(window)
    kernels = ReferenceKernels(shape, span)
    query = torch.randn(sum(LENS), HEADS, SIZE)
    key, value = (torch.randn(sum(LENS), KV_HEADS, SIZE) for _ in range(2))
    kernels.store(key, value, slots_of(block_table, list(LENS), layout.block_size), None, pages)

    firsts = starts_of(LENS, CPU).tolist()
    fresh = torch.cat([torch.arange(first + context, first + length)
                       for first, context, length in zip(firsts, contexts, LENS, strict=False)])  # fmt: skip
    starts, lens = starts_of(queries, CPU), torch.tensor(LENS, dtype=torch.int32)
    planned = plan(PlanRules(128, layout.block_size, False, window), starts, lens, 0, len(LENS), CPU)
    pictures = both_ways(RANGES, starts, lens, len(LENS), CPU)
    metadata = KVTunerMetadata(
        len(fresh), 0, 0, 1, starts, lens, block_table, None, planned, pictures
    )  # fmt: skip
    prefill = ReferencePrefill(kernels, False)
    if gpu:
        prefill = GpuPrefill(kernels, flash_attention(SCALE), WorkspaceShape(128, torch.float32, CPU))
    output = torch.full((len(fresh), HEADS, SIZE), torch.nan)
    prefill(Prefills(query[fresh], key[fresh], value[fresh], pages, metadata, clamped), output)

    bounds = starts.tolist()
    for request, (first, length, context) in enumerate(zip(firsts, LENS, contexts, strict=False)):
        token = torch.arange(length)
        distance = token[:, None] - token
        near = distance.abs() < window if window else torch.ones_like(distance, dtype=torch.bool)
        seen = (distance >= 0) & near
        for begin, end in RANGES[request]:
            inside = (token >= begin) & (token <= end)
            both = inside[:, None] & inside
            seen |= both & near if clamped else both
        rows = slice(first, first + length)
        keys, values = (x[rows].repeat_interleave(2, 1).double() for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[rows].double(), keys) * SCALE
        scores = scores.masked_fill(~seen, -torch.inf)
        if has_sinks:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, length, 1)], -1)
        want = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :length], values)[context:]
        # What is cached is of 8 bits.
        got = output[bounds[request] : bounds[request + 1]].double()
        torch.testing.assert_close(got, want, rtol=0, atol=0.03 if context else 1e-5)
