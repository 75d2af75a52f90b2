"""A smaller pair in larger pages: the bytes of its own cache, at the start of each chunk, and no other byte touched."""

import pytest
import torch

from tests.helpers.paged_cache import POISON_BYTE, make_layout, random_table, random_transforms, slots_of
from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, Launch, Pages, Queries, Span
from vllm_kvtuner.kernels.reference.rows import reshape_and_cache_ref
from vllm_kvtuner.kernels.triton.gather_cache import gather_cache
from vllm_kvtuner.kernels.triton.paged_attention import decode_workspace, paged_attention
from vllm_kvtuner.kernels.triton.reshape_and_cache import reshape_and_cache
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.pages.views import chunks_of

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 64
SEQ_LENS = [5, 16, 37]
ROOM = make_layout("K8V8", HEAD_SIZE)


@pytest.fixture
def batch(device):
    """Keys, values, block table, slots and a room of two chunks more per block than the KV heads take."""
    torch.manual_seed(0)
    table, num_blocks = random_table(ROOM, SEQ_LENS, device)
    slots = slots_of(table, SEQ_LENS, ROOM.block_size)
    key, value = (torch.randn(len(slots), KV_HEADS, HEAD_SIZE, device=device).bfloat16() for _ in range(2))
    return key, value, table, slots, num_blocks


def poisoned(layout, num_blocks, device):
    shape = (num_blocks, KV_HEADS + 2, layout.block_size, layout.content_bytes)
    return torch.full(shape, POISON_BYTE, dtype=torch.uint8, device=device)


@pytest.mark.quick(1)
@pytest.mark.parametrize("pair", [pair.name for pair in QUANTIZED_PAIRS])
@pytest.mark.parametrize("store", [reshape_and_cache_ref, reshape_and_cache], ids=["reference", "kernel"])
def test_store_writes_its_own_chunks_only(device, batch, store, pair):
    key, value, _, slots, num_blocks = batch
    layout, transforms = make_layout(pair, HEAD_SIZE), random_transforms(KV_HEADS, HEAD_SIZE, device)
    room, alone = poisoned(ROOM, num_blocks, device), poisoned(layout, num_blocks, device)

    store(key, value, slots, None, Pages(chunks_of(room[:, :KV_HEADS], layout), layout, transforms))
    store(key, value, slots, None, Pages(alone[:, :KV_HEADS], layout, transforms))

    chunks = room.flatten(2)
    assert torch.equal(chunks[:, :, : layout.chunk_bytes], alone.flatten(2))
    assert (chunks[:, :, layout.chunk_bytes :] == POISON_BYTE).all()
    assert not (alone[:, :KV_HEADS] == POISON_BYTE).all(), "the store must have written"


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["K8V8", "K4V2", "K2V8"])
def test_kernels_read_the_chunks_of_a_smaller_pair(device, batch, pair):
    key, value, table, slots, num_blocks = batch
    layout = make_layout(pair, HEAD_SIZE)
    transforms = random_transforms(KV_HEADS, HEAD_SIZE, device, key_hadamard=True)
    lens = torch.tensor(SEQ_LENS, dtype=torch.int32, device=device)
    starts = torch.arange(len(SEQ_LENS) + 1, dtype=torch.int32, device=device)
    cu_lens = torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int()
    shape = AttentionShape(HEADS, KV_HEADS, HEAD_SIZE, HEAD_SIZE**-0.5)
    launch = Launch(decode_workspace(len(SEQ_LENS), HEADS, HEAD_SIZE, device))
    query = torch.randn(len(SEQ_LENS), HEADS, HEAD_SIZE, device=device).bfloat16()
    results = []
    for cache in (
        chunks_of(poisoned(ROOM, num_blocks, device)[:, :KV_HEADS], layout),
        poisoned(layout, num_blocks, device)[:, :KV_HEADS],
    ):
        pages = Pages(cache, layout, transforms)
        reshape_and_cache(key, value, slots, None, pages)
        output = torch.empty_like(query)
        paged_attention(query, Queries(table, lens, starts, 1), pages, shape, Span(), output, launch=launch)
        keys, values = torch.empty_like(key), torch.empty_like(value)
        gather_cache(pages, CachedTokens(table, cu_lens, torch.zeros_like(lens), len(slots)), keys, values)
        results.append((output, keys, values))

    for in_room, alone in zip(*results, strict=True):
        assert torch.equal(in_room, alone)
        assert in_room.isfinite().all()
