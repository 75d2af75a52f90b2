"""The CUDA paged_attention against the reference on the same packed bytes, in batches of every kind."""

import itertools

import pytest
import torch

from tests.helpers.cuda_decode import ROUNDING, SWITCHES, TOLERANCE, check, check_counters, launch_twice, workspace_of
from tests.helpers.decode_cases import (
    HEAD_SIZES,
    SEQ_LENS,
    GraphBatch,
    attend,
    beyond_32_bits,
    far_window,
    largest_value,
    linear_table,
    padded_batch,
    plain_attention,
    random_sinks,
    with_offset_pairs,
)
from tests.helpers.paged_cache import PackedCache, make_layout, random_cache, random_transforms
from vllm_kvtuner.kernels.contract import AttentionShape, Launch, Pages, Queries, Span
from vllm_kvtuner.kernels.cuda import paged_attention as cuda
from vllm_kvtuner.kernels.cuda.paged_attention_config import DecodeConfig
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.kernels.triton import paged_attention as portable
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import LayerTransforms

pytestmark = pytest.mark.gpu

LADDER = [
    pytest.param(pair.name, head_size, id=f"{pair.name}-{head_size}")
    for pair, head_size in itertools.product(QUANTIZED_PAIRS, HEAD_SIZES)
    if head_size * pair.v_bits % 128 == 0  # others are left to the portable kernel
]
MANY_ROWS = [
    (pair.name, *case)
    for pair, case in itertools.product(
        QUANTIZED_PAIRS,
        [
            (64, 12, 16, [1] * 7), (64, 8, 64, [4] * 7), (64, 64, 16, [1] * 7), (96, 16, 32, [1] * 7),
            (96, 5, 16, [6] * 7), (192, 4, 16, [1] * 7), (192, 16, 32, [1] * 7), (192, 8, 16, [4] * 7),
            (128, 12, 16, [1] * 7), (128, 16, 128, [1] * 7), (128, 5, 16, [4] * 7), (128, 8, 16, [4] * 7),
            (128, 8, 48, [4] * 7), (128, 8, 32, [8] * 7), (128, 8, 16, [16] * 7), (128, 16, 16, [1, 4, 4, 1, 2, 1, 4]),
            (256, 16, 16, [1] * 7), (256, 6, 16, [4] * 7), (256, 8, 64, [4] * 7), (256, 16, 16, [4, 1, 4, 1, 1, 4, 4]),
        ],
    )
    if case[0] * pair.v_bits % 128 == 0
]  # fmt: skip


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("pair", "head_size"), LADDER)
def test_every_pair_and_head_size(pair, head_size, device):
    """Groups, block sizes and dtypes take turns, so that each meets every number of bits."""
    turn = [case.values for case in LADDER].index((pair, head_size))
    layout = make_layout(pair, head_size, (16, 32, 64, 128)[turn % 4])
    cache = random_cache(layout, [*SEQ_LENS, 2000], 2, device)
    check(cache, (1, 3, 4, 7, 8)[turn % 5], (torch.bfloat16, torch.float16)[turn % 2])


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 71])
def test_every_group(group, device):
    check(random_cache(make_layout("K4V2", 128), SEQ_LENS, 3, device), group)


@pytest.mark.parametrize(("pair", "head_size", "group", "block_size", "query_lens"), MANY_ROWS, ids=str)
def test_many_rows(pair, head_size, group, block_size, query_lens, device):
    """Passes of 16, 32 and 64 rows and several of them, some requests with fewer tokens than others."""
    layout = make_layout(pair, head_size, block_size)
    lengths = [max(length, 4 if max(query_lens) <= 4 else 16) for length in [*SEQ_LENS, 2000]]
    check(random_cache(layout, lengths, 2, device), group, query_lens=query_lens)


@pytest.mark.parametrize("group", [8, 12, 16])
@pytest.mark.parametrize("pass_query_len", [1, 2, 4])
def test_requests_of_few_tokens_among_those_of_many(group, pass_query_len, device):
    """They are launches of their own, and short prefills take more passes; nobody's rows are left out."""
    query_lens = [1, 4, 1, 1, 4, 2, 1, 16, 4, 3, 1]
    lengths = [max(length, 16) for length in [*SEQ_LENS, 700, 40_000, 3000, 20, 1]]
    check(
        random_cache(make_layout("K4V2", 128), lengths, 2, device), group, query_lens=query_lens,
        pass_query_len=pass_query_len,
    )  # fmt: skip


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize(
    ("block_size", "stage_tokens"), [(16, 16), (16, 64), (32, 32), (48, 16), (64, 16), (64, 64), (128, 32), (256, 64)]
)
def test_stages_and_blocks_of_any_ratio(block_size, stage_tokens, num_stages, device):
    cache = random_cache(make_layout("K4V2", 64, block_size), [150, 1, 64, 3000, 257], 1, device)
    check(cache, 2, config=DecodeConfig(stage_tokens, num_stages, min_ctas=2))


@pytest.mark.parametrize("pair", ["K8V8", "K4V2", "K2V2"])
@pytest.mark.parametrize(
    ("window", "skip", "first"), [(None, 64, 4), (None, 0, 0), (200, 64, 16), (64, 0, 0), (None, 64, 0)], ids=str
)
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1, 1, 1], [5, 1, 16, 2, 7, 1]], ids=["one_query", "several_queries"])
@pytest.mark.parametrize("group", [4, 12])
def test_the_newest_and_the_first_tokens_are_left_out(group, query_lens, window, skip, first, pair, device):
    """The log-sum-exp is there too, also of rows that see nothing, and the same in every launch."""
    cache = random_cache(make_layout(pair, 128), [70, 1, 16, 129, 2500, 40_000], 2, device)
    transforms = random_transforms(2, 128, device, linear_table(128, True, 40_000, device), offset=1.0, **SWITCHES)
    total, num_heads = sum(query_lens), 2 * group
    query = torch.randn(total + 3, num_heads, 128, device=device).bfloat16()
    options = {"sliding_window": window, "skip_newest": skip, "skip_first": first}
    lses = [torch.full((num_heads, total + 3), torch.nan, device=device) for _ in range(3)]
    workspace = workspace_of(cache, num_heads, len(query_lens), max(query_lens))
    got, again = (
        attend(cuda.paged_attention, cache, query, query_lens, transforms, workspace=workspace, lse=lse, **options)
        for lse in lses[:2]
    )
    check_counters(workspace)
    assert torch.equal(got, again) and torch.equal(*lses[:2])
    want_lse = lses[2][:, :total].contiguous()
    query = query[:total].float()
    want = attend(paged_attention_ref, cache, query, query_lens, transforms, lse=want_lse, **options)
    limit = 2 * TOLERANCE * largest_value(cache)
    torch.testing.assert_close(got[:total].float(), want, rtol=ROUNDING[torch.bfloat16], atol=limit)
    torch.testing.assert_close(lses[0][:, :total], want_lse, rtol=1e-4, atol=5e-3)
    assert not got[total:].any() and lses[0][:, total:].isneginf().all(), "rows beyond the last query"


@pytest.mark.parametrize("pair", ["K8V8", "K4V2"])
@pytest.mark.parametrize(
    ("window", "skip", "first"), [(None, 0, 0), (128, 0, 0), (None, 64, 4), (200, 64, 16)], ids=str
)
@pytest.mark.parametrize("query_lens", [[1, 1, 0, 1, 1, 1], [5, 1, 0, 2, 4, 1]], ids=["one_query", "several_queries"])
@pytest.mark.parametrize(("group", "dtype"), [(8, torch.bfloat16), (8, torch.float32), (16, torch.float16)], ids=str)
def test_attention_sinks(group, dtype, query_lens, window, skip, first, pair, device):
    """Once in each row, however many CTAs share it, and alone where a query sees no packed token."""
    cache = random_cache(make_layout(pair, 64), [70, 1, 0, 129, 2500, 40_000], 8, device)
    total, num_heads = sum(query_lens), 8 * group
    query = torch.randn(total + 3, num_heads, 64, device=device).bfloat16()
    sinks, span = random_sinks(num_heads, device, dtype), Span(window, skip, first)
    workspace = workspace_of(cache, num_heads, len(query_lens), max(query_lens))
    lses = [torch.full((num_heads, total + 3), torch.nan, device=device) for _ in range(2)]
    options = {**span._asdict(), "sinks": sinks, "workspace": workspace}
    got, again = (
        attend(cuda.paged_attention, cache, query, query_lens, LayerTransforms(), lse=lse, **options) for lse in lses
    )
    check_counters(workspace)
    assert torch.equal(got, again) and torch.equal(*lses)
    want, want_lse = plain_attention(cache, query, query_lens, sinks, span)
    limit = 2 * TOLERANCE * largest_value(cache)
    torch.testing.assert_close(got.double(), want, rtol=ROUNDING[torch.bfloat16], atol=limit)
    torch.testing.assert_close(lses[0].double(), want_lse, rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize(
    ("window", "soft_cap"), [(None, 0.0), (1, 0.0), (9, 0.0), (64, 0.0), (None, 2.0), (64, 2.0)], ids=str
)
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1, 1], [5, 1, 16, 2, 7]], ids=["one_query", "several_queries"])
@pytest.mark.parametrize("group", [3, 12, 24])
def test_queries_see_their_sliding_window_with_capped_logits(group, query_lens, window, soft_cap, device):
    cache = random_cache(make_layout("K4V4", 64), [70, 1, 16, 129, 2500], 2, device)
    check(cache, group, query_lens=query_lens, sliding_window=window, logits_soft_cap=soft_cap)


@pytest.mark.parametrize("group", [1, 4, 7])
def test_many_counts_of_queries(group, device):
    query_lens = [*range(1, 17), 1, 16]
    lengths = [*(30 + 3 * length for length in query_lens[:-2]), 1, 16]
    check(random_cache(make_layout("K8V4", 64), lengths, 2, device), group, torch.float16, query_lens=query_lens)


@pytest.mark.parametrize("pair", ["K8V8", "K4V4", "K2V2"])
@pytest.mark.parametrize(("group", "pass_query_len"), [(1, 1), (4, 1), (7, 1), (4, 2)])
def test_short_prefills_among_decodes(pair, group, pass_query_len, device):
    """Passes have room for what most requests have, and a short prefill takes more of them."""
    query_lens = [1] * 40 + [2, 9, 16, 16, 1]
    lengths = [*torch.randint(1, 2000, (40,)).tolist(), 500, 9, 1016, 40000, 70]
    check(
        random_cache(make_layout(pair, 128), lengths, 2, device), group, query_lens=query_lens,
        pass_query_len=pass_query_len,
    )  # fmt: skip


def test_padding_rows_become_0(device):
    batch = padded_batch(torch.bfloat16, device)
    workspace = workspace_of(batch.cache, 4, 5, 2)
    for part in (workspace.partial, workspace.state):
        part.fill_(torch.nan)
    got, want = batch.attend(cuda.paged_attention, workspace=workspace), batch.attend(paged_attention_ref)
    torch.testing.assert_close(got[:4], want[:4], rtol=2**-7, atol=TOLERANCE * largest_value(batch.cache))
    assert not got[2].any(), "a request of length 0"
    assert not got[4:].any(), "rows beyond the last query"


def test_a_batch_of_padding_alone(device):
    cache = random_cache(make_layout("K4V4", 64), [16, 16], 1, device)
    empty = PackedCache(cache.layout, cache.kv_cache, cache.block_table, torch.zeros_like(cache.seq_lens))
    got = launch_twice(empty, torch.randn(5, 4, 64, device=device).half(), [1, 2], LayerTransforms())
    assert not got.any()


@pytest.mark.parametrize("num_reqs", [1, 2, 33, 256])
def test_batches_of_any_size(num_reqs, device):
    lengths = [1, *torch.randint(1, 3000, (num_reqs,)).tolist()][-num_reqs:]
    check(random_cache(make_layout("K4V4", 128), lengths, 8, device), 4)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_one_long_request_among_short_ones(place, device):
    lengths = [1, 300, 17, 2, 64, 1000, 5]
    lengths.insert(place, 131_072)
    check(random_cache(make_layout("K4V4", 128), lengths, 8, device), 4)


def test_a_window_reads_no_stage_outside(device):
    case = far_window(device)
    rotary = linear_table(64, True, int(case.whole.seq_lens[0]), device)
    transforms = with_offset_pairs(random_transforms(1, 64, device, rotary, offset=2.0), 8)
    query = torch.randn(1, 4, 64, device=device).half()
    want = attend(paged_attention_ref, case.whole, query.float(), [1], transforms, sliding_window=case.window)
    got = launch_twice(case.poisoned, query, [1], transforms, sliding_window=case.window)
    torch.testing.assert_close(got.float(), want, rtol=2**-11, atol=TOLERANCE * largest_value(case.whole))


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [3, 1, 9]], ids=["one_query", "several_queries"])
@pytest.mark.parametrize("pair", ["K8V8", "K4V4", "K2V2"])
def test_the_portable_kernel_agrees(pair, query_lens, device):
    transforms = with_offset_pairs(
        random_transforms(2, 128, device, linear_table(128, True, 4000, device), offset=5.0, **SWITCHES), 8
    )
    cache = random_cache(make_layout(pair, 128), [4000, 1, 777], 2, device)
    query = torch.randn(sum(query_lens), 8, 128, device=device).bfloat16()
    got = launch_twice(cache, query, query_lens, transforms)
    workspace = portable.decode_workspace(query.shape[0], 8, 128, device)
    other = attend(portable.paged_attention, cache, query, query_lens, transforms, workspace=workspace)
    # The portable kernel's own tolerance with all transforms is 3e-3 of the largest value.
    torch.testing.assert_close(got, other, rtol=2**-7, atol=4e-3 * largest_value(cache))


def test_offsets_beyond_32_bits(device):
    query = torch.randn(2, 32, 128, device=device).half()
    got, want = (
        launch_twice(cache, query, [1, 1], LayerTransforms())
        for cache in beyond_32_bits(make_layout("K8V8", 128), device)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("pair", ["K4V2", "K8V8"])
@pytest.mark.parametrize("query_len", [1, 4])
def test_tokens_that_a_recent_window_serves_may_hold_anything(query_len, pair, device):
    """They may not be packed yet; a request shorter than the window has none that are."""
    cache = random_cache(make_layout(pair, 128), [1500, 20, 64, 70], 2, device)
    query = torch.randn(4 * query_len, 8, 128, device=device).bfloat16()
    results = []
    for poisoned in (0, 64):
        cache.poison_newest(poisoned)
        lse = torch.empty(8, len(query), device=device)
        options = {"skip_newest": 64, "workspace": workspace_of(cache, 8, 4, query_len), "lse": lse}
        results.append((attend(cuda.paged_attention, cache, query, [query_len] * 4, LayerTransforms(), **options), lse))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_workspace_may_be_larger_and_left_by_another_layer(device):
    """As the engine's is: for more requests and query tokens, and shared by layers of one shape."""
    cache = random_cache(make_layout("K4V2", 128), [5000, 40, 1], 2, device)
    query = torch.randn(3, 8, 128, device=device).bfloat16()
    want = launch_twice(cache, query, [1, 1, 1], LayerTransforms())
    workspace = workspace_of(cache, 8, 64, 16)
    for part in (workspace.partial, workspace.state, workspace.aside):
        part.fill_(torch.nan)
    got = attend(cuda.paged_attention, cache, query, [1, 1, 1], LayerTransforms(), workspace=workspace)
    assert torch.equal(got, want)


@pytest.mark.parametrize("num_pairs", [0, 8])
@pytest.mark.parametrize("max_query_len", [1, 4])
def test_a_cuda_graph_replays_what_eager_computes(max_query_len, num_pairs, device):
    """Captured once; then lengths, blocks, queries and bytes change, some requests become padding."""
    layout = make_layout("K4V2", 128)
    batch = GraphBatch(layout, max_query_len, device)
    rotary = linear_table(128, True, batch.MAX_POSITION, device) if num_pairs else None
    transforms = random_transforms(batch.NUM_KV_HEADS, 128, device, rotary, offset=5.0 * (num_pairs > 0), **SWITCHES)
    if num_pairs:
        transforms = with_offset_pairs(transforms, num_pairs)
    workspace = cuda.decode_workspace(6, max_query_len, batch.NUM_HEADS, batch.NUM_KV_HEADS, 128, device)
    queries = Queries(batch.block_table, batch.seq_lens, batch.query_start_loc, max_query_len)
    shape = AttentionShape(batch.NUM_HEADS, batch.NUM_KV_HEADS, 128, 128**-0.5)

    def run():
        cuda.paged_attention(
            batch.query, queries, Pages(batch.kv_cache, layout, transforms), shape, Span(), batch.output,
            launch=Launch(workspace),
        )  # fmt: skip

    batch.check_replay(run)
    check_counters(workspace)
    cache, query_lens = batch.caches[1], batch.query_lens(1)
    num_tokens = sum(query_lens)
    want = attend(paged_attention_ref, cache, batch.query[:num_tokens].float(), query_lens, transforms)
    limit = TOLERANCE * largest_value(cache)
    torch.testing.assert_close(batch.output[:num_tokens].float(), want, rtol=2**-8, atol=limit)
