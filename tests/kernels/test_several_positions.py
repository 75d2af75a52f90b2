"""A key offset where a token has several positions (M-RoPE): reference and Triton, against keys in model space."""

import itertools

import pytest
import torch

from tests.helpers.decode_cases import attend, attention_float64
from tests.helpers.paged_cache import (
    PackedCache,
    empty_cache,
    make_layout,
    random_table,
    random_transforms,
    rotary_table,
    several_positions,
    slots_of,
)
from vllm_kvtuner.kernels.contract import CachedTokens
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref, reshape_and_cache_ref
from vllm_kvtuner.kernels.triton.gather_cache import gather_cache
from vllm_kvtuner.kernels.triton.paged_attention import decode_workspace, paged_attention
from vllm_kvtuner.kernels.triton.reshape_and_cache import reshape_and_cache
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import FEEDBACK_BITS
from vllm_kvtuner.pages.transforms import rotated_offset

SEQ_LENS = [40, 1, 17, 70]
KV_HEADS = 2
KERNELS = {
    "reference": (reshape_and_cache_ref, gather_cache_ref, paged_attention_ref),
    "triton": (reshape_and_cache, gather_cache, paged_attention),
}
SHAPES = {
    "sections": ("K8V8", 64, 64, True, False),
    "partial, interleaved": ("K4V4", 96, 48, True, True),
    "pairs side by side": ("K4V8", 64, 64, False, False),
}
"""Pair, head size, rotary dimensions, whether pairs are half a head apart, and whether axes take turns."""
ERRORS = {8: 0.01, 4: 0.15}
"""Root mean square of the error by bits, at most: a step over the root of 12, of rows that span 5 to 7. Keys with their
offset of 8 span 40, and would have six times that."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stored(store, shape, device, feedback=False):
    """A cache of random keys about a large offset, with what was stored, and the transforms."""
    pair, head_size, rotary_dim, is_neox, interleaved = SHAPES[shape]
    tokens = sum(SEQ_LENS)
    rotary = several_positions(rotary_table(rotary_dim, is_neox, 300, device), tokens, interleaved=interleaved)
    rotary.positions.step[:, 0] = torch.tensor([299, 0, 150], device=device)
    switches = {"key_hadamard": True, "value_hadamard": True}
    if feedback:
        coefficients = torch.eye(head_size, device=device).expand(KV_HEADS, -1, -1).half().contiguous()
        switches["key_feedback"] = RoundFeedback(coefficients, dict.fromkeys(FEEDBACK_BITS, (1.0,)))
    transforms = random_transforms(KV_HEADS, head_size, device, rotary, offset=8.0, **switches)
    layout = make_layout(pair, head_size)
    block_table, num_blocks = random_table(layout, SEQ_LENS, device)
    kv_cache = empty_cache(layout, num_blocks, KV_HEADS, device)
    seq_lens = torch.tensor(SEQ_LENS, dtype=torch.int32, device=device)
    cache = PackedCache(layout, kv_cache, block_table, seq_lens)
    shape = tokens + 1, KV_HEADS, head_size  # a token more than slots: padding of a graph
    value = torch.randn(shape, device=device)
    key = torch.randn(shape, device=device) + rotated_offset(transforms, rotary.positions.step)
    slots = slots_of(block_table, SEQ_LENS, layout.block_size)
    # In two parts; what the second of them has no slot for stays as the first has stored it.
    store(key, value, slots[:30], rotary.positions.step, cache.pages(transforms))
    slots[:30] = -1
    store(key, value, slots, rotary.positions.step, cache.pages(transforms))
    return cache, transforms, key[:tokens], value[:tokens]


@pytest.mark.quick(1)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_keys_come_back_as_they_were(shape, kernels, device):
    store, gather, _ = KERNELS[kernels]
    cache, transforms, key, value = stored(store, shape, device)
    starts = torch.tensor([3, 0, 16, 20], dtype=torch.int32, device=device)
    counts = [length - start for length, start in zip(SEQ_LENS, starts.tolist(), strict=True)]
    bounds = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
    keys, values = (torch.empty(sum(counts), *key.shape[1:], device=device) for _ in range(2))
    gather(cache.pages(transforms), CachedTokens(cache.block_table, bounds, starts, sum(counts)), keys, values)
    firsts = [0, *itertools.accumulate(SEQ_LENS)]
    wanted = torch.cat([torch.arange(first + start, first + length) for first, start, length
                        in zip(firsts, starts.tolist(), SEQ_LENS, strict=False)]).to(device)  # fmt: skip
    assert (keys - key[wanted]).square().mean().sqrt() < ERRORS[cache.layout.k_bits]
    assert (values - value[wanted]).square().mean().sqrt() < ERRORS[cache.layout.v_bits]


@pytest.mark.quick(1)
@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_gives_the_offset_back(shape, kernels, query_len, device):
    """As attention on the keys that a gather gives, which are those of the model."""
    store, _, attention = KERNELS[kernels]
    cache, transforms, _, _ = stored(store, shape, device)
    lens = [min(query_len, length) for length in SEQ_LENS]
    query = torch.randn(sum(lens), 3 * KV_HEADS, cache.layout.head_size, device=device)
    options = {}
    if attention is paged_attention:
        options["workspace"] = decode_workspace(len(query), *query.shape[1:], device)
    got = attend(attention, cache, query, lens, transforms, **options)
    first = 0
    for request, (length, queries) in enumerate(zip(SEQ_LENS, lens, strict=True)):
        bounds = torch.tensor([0, length], dtype=torch.int32, device=device)
        begin = torch.zeros(1, dtype=torch.int32, device=device)
        keys, values = (torch.empty(length, KV_HEADS, query.shape[2], device=device) for _ in range(2))
        held = CachedTokens(cache.block_table[request : request + 1], bounds, begin, length)
        gather_cache_ref(cache.pages(transforms), held, keys, values)
        for index in range(queries):
            seen = length - queries + index + 1
            want = attention_float64(query[first + index], keys[:seen], values[:seen])
            torch.testing.assert_close(got[first + index].double(), want, rtol=0, atol=5e-3)
        first += queries


@pytest.mark.slow
def test_triton_stores_with_feedback_what_the_reference_stores(device):
    """Round feedback has a store kernel of its own; identities round to the nearest."""
    got, transforms, *_ = stored(reshape_and_cache, "partial, interleaved", device, feedback=True)
    torch.manual_seed(0)
    want, others, *_ = stored(reshape_and_cache_ref, "partial, interleaved", device, feedback=True)
    assert torch.equal(got.pages(transforms).positions, want.pages(others).positions)
    for ours, theirs in zip(got.sides, want.sides, strict=True):
        apart = ours.format.unpack(ours.codes).int() - theirs.format.unpack(theirs.codes).int()
        assert (apart != 0).float().mean() < 0.01


def test_equal_positions_are_the_places(device):
    """Text alone: the same as a table of one position."""
    plain = rotary_table(64, True, 300, device)
    several = several_positions(plain, 1)
    places = torch.arange(300, device=device)
    pairs = zip(several.angles_at(places.expand(3, -1)), plain.angles_at(places), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
