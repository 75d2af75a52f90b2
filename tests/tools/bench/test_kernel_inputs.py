"""Batches of the kernel benchmark: blocks, tokens, copies, and attention over them in float64."""

from dataclasses import replace

import pytest
import torch

from kvtuner_tools.bench.kernel_inputs import (
    attention_float64,
    copies_for,
    make_batch,
    new_tokens,
    newest_tokens,
    random_pages,
    token_places,
)
from kvtuner_tools.bench.points import QueryTokens
from tests.helpers.kernel_bench import HEADS
from vllm_kvtuner.kernels.contract import CachedTokens, Queries, Span
from vllm_kvtuner.kernels.reference.attention import attention_ref, paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_copies_share_no_block_and_leave_out_block_0(device):
    batch = make_batch(HEADS, 16, [1, 16, 17, 100], QueryTokens((1,)), 3, device)

    used = [table[table > 0] for table in batch.block_tables]
    assert [len(blocks) for blocks in used] == [1 + 1 + 2 + 7] * 3
    assert sorted(torch.cat(used).tolist()) == list(range(1, batch.num_blocks))
    assert (batch.block_tables[0] > 0).sum(1).tolist() == [1, 1, 2, 7]
    block, offset = token_places(batch)
    assert len(block) == sum(batch.lengths)
    assert len(set(zip(block.tolist(), offset.tolist(), strict=True))) == len(block)
    assert block[-1] == batch.block_tables[0][3, 6] and offset[-1] == 99 % 16


def test_copies_together_exceed_the_l2_cache():
    assert copies_for(stored_bytes=10**9, l2_bytes=50 << 20) == 2
    assert copies_for(stored_bytes=38 * 10**6, l2_bytes=50 << 20) * 38e6 >= 6 * (50 << 20)
    assert copies_for(stored_bytes=100, l2_bytes=50 << 20) == 256


def test_float64_attention_is_the_reference(device):
    batch = make_batch(HEADS, 16, [40, 3], QueryTokens((3,)), 1, device)
    keys, values = torch.randn(2, 43, 2, 64, device=device)
    query = batch.query.float()

    got = attention_float64(batch, query, keys, values)

    want = torch.empty_like(query)
    attention_ref(query[:3], keys[:40], values[:40], batch.attention_shape, Span(), want[:3])
    attention_ref(query[3:], keys[40:], values[40:], batch.attention_shape, Span(), want[3:])
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)


def test_float64_attention_counts_sinks(device):
    batch = make_batch(replace(HEADS, sinks=True), 16, [40, 3], QueryTokens((3,)), 1, device)
    pages = random_pages(batch, PageLayout(PrecisionPair(8, 8), 64, 16), LayerTransforms())
    query, output = batch.query.float(), torch.empty(6, 4, 64, device=device)
    queries = Queries(batch.block_tables[0], batch.seq_lens, batch.query_start_loc, 3)
    paged_attention_ref(query, queries, pages, batch.attention_shape, Span(), output)
    bounds = torch.tensor([0, 40, 43], dtype=torch.int32, device=device)
    keys, values = batch.empty_rows(torch.float32)
    starts = torch.zeros(2, dtype=torch.int32, device=device)
    gather_cache_ref(pages, CachedTokens(batch.block_tables[0], bounds, starts, 43), keys, values)
    torch.testing.assert_close(attention_float64(batch, query, keys, values).float(), output, rtol=1e-4, atol=1e-4)
    without = attention_float64(replace(batch, sinks=None), query, keys, values).float()
    assert (without - output).norm() > 0.2 * output.norm()


def test_stores_move_their_input_and_what_they_store(device):
    tokens = new_tokens(HEADS, 16, 20, False, device)

    assert tokens.moved_bytes(72) == 20 * 2 * (2 * 64 * 2 + 72)
    assert all(slots.unique().numel() == 20 for slots in tokens.slot_mappings)
    first = tokens.slot_mappings[0]
    assert torch.equal(first[:16] // 16, first[:1].expand(16) // 16) and first[16] // 16 != first[0] // 16
    decode = new_tokens(HEADS, 16, 20, True, device)
    assert (decode.slot_mappings[0] // 16).unique().numel() == 20, "every request has a block of its own"
    assert max(int(slots.max()) for slots in decode.slot_mappings) < 16 * decode.num_blocks


def test_newest_tokens_have_slots_in_every_copy(device):
    batch = make_batch(HEADS, 16, [5, 16, 33], QueryTokens((2,)), 3, device)

    newest = newest_tokens(batch)

    assert newest.positions.tolist() == [3, 4, 14, 15, 31, 32]
    for blocks_of, slots in zip(batch.block_tables, newest.slot_mappings, strict=True):
        blocks = [blocks_of[0, 0]] * 2 + [blocks_of[1, 0]] * 2 + [blocks_of[2, 1], blocks_of[2, 2]]
        assert slots.tolist() == [16 * int(block) + at for block, at in zip(blocks, (3, 4, 14, 15, 15, 0), strict=True)]


def test_requests_of_unequal_query_tokens(device):
    """Their tokens are where the block table of each has them, and see what stands before them."""
    batch = make_batch(HEADS, 16, [5, 16, 33], QueryTokens((1, 3)), 2, device)

    assert batch.query_lens == (3, 1, 3)
    assert batch.query_start_loc.tolist() == [0, 3, 4, 7]
    assert batch.query.shape == (7, HEADS.num_heads, HEADS.head_size)
    newest = newest_tokens(batch)
    assert newest.positions.tolist() == [2, 3, 4, 15, 30, 31, 32]
    assert newest.slot_mappings[1].tolist()[3] == 16 * int(batch.block_tables[1][1, 0]) + 15

    keys, values = torch.randn(2, 54, 2, 64, device=device)
    got = attention_float64(batch, batch.query.float(), keys, values)
    want = torch.empty_like(batch.query.float())
    for rows, tokens in ((slice(0, 3), slice(0, 5)), (slice(3, 4), slice(5, 21)), (slice(4, 7), slice(21, 54))):
        query = batch.query[rows].float()
        attention_ref(query, keys[tokens], values[tokens], batch.attention_shape, Span(), want[rows])
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)
