"""paged_attention against the reference on the same packed bytes.

Tolerances are fractions of the largest value cached. A folded query and the probabilities are rounded to fp16 (2^-11
each); with logits of standard deviation 1 or 2 the former moves a probability by up to about 1e-3, the latter by
5e-4, and their errors average out over tokens. An output in bf16 adds 2^-8 of itself.
"""

import pytest
import torch

from tests.helpers.decode_cases import (
    HEAD_SIZES,
    SEQ_LENS,
    GraphBatch,
    attend,
    balanced_query,
    beyond_32_bits,
    changing_value_scales,
    far_window,
    flat_rows_beside_steep_ones,
    largest_value,
    padded_batch,
    scale_values,
    values_near_the_middle,
)
from tests.helpers.paged_cache import make_layout, random_cache, random_transforms, rotary_table
from vllm_kvtuner.kernels.contract import AttentionShape, Launch, Pages, Queries, Span
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.kernels.triton.paged_attention import decode_workspace, paged_attention
from vllm_kvtuner.kernels.triton.paged_attention_config import DecodeConfig, decode_config
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import LayerTransforms

TOLERANCES = {torch.float32: 1e-3, torch.float16: 1.5e-3, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(
    cache,
    group,
    dtype=torch.float32,
    query_lens=None,
    transforms=None,
    config=None,
    query=None,
    tolerance=None,
    pass_query_len=None,
    **options,
):
    """The kernel's output lies within tolerance of the reference's, and is all there."""
    transforms = transforms or LayerTransforms()
    query_lens = query_lens or [1] * len(cache.seq_lens)
    num_heads, head_size = cache.kv_cache.shape[1] * group, cache.layout.head_size
    device = cache.kv_cache.device
    if query is None:
        query = torch.randn(sum(query_lens), num_heads, head_size, device=device).to(dtype)
    workspace = decode_workspace(query.shape[0], num_heads, head_size, device)
    got = attend(
        paged_attention, cache, query, query_lens, transforms, workspace=workspace, config=config,
        pass_query_len=pass_query_len, **options,
    )  # fmt: skip
    want = attend(paged_attention_ref, cache, query, query_lens, transforms, **options)
    assert not want.isnan().any()
    limit = (TOLERANCES[dtype] if tolerance is None else tolerance) * largest_value(cache)
    # Beside the error of sums, both are rounded to the dtype: at times to neighbouring numbers.
    rtol = 2**-7 if dtype is torch.bfloat16 else 0
    torch.testing.assert_close(got, want, rtol=rtol, atol=limit)
    return got


@pytest.mark.quick(1)
@pytest.mark.parametrize("index", range(len(QUANTIZED_PAIRS)), ids=[pair.name for pair in QUANTIZED_PAIRS])
def test_every_pair(index, device):
    layout = make_layout(QUANTIZED_PAIRS[index].name, HEAD_SIZES[index % 4], (16, 32, 128, 48)[index % 4])
    group = (4, 1, 7)[index % 3]
    cache = random_cache(layout, SEQ_LENS, 2, device)
    check(cache, group, tuple(TOLERANCES)[index // 3])


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["K2V2", "K4V4", "K8V8"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_head_size(pair, head_size, device):
    check(random_cache(make_layout(pair, head_size), [33, 80], 1, device), 2)


@pytest.mark.slow
@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
@pytest.mark.parametrize("block_size", [16, 64, 80, 256])
def test_tiles_and_blocks_of_any_ratio(block_n, block_size, device):
    cache = random_cache(make_layout("K4V2", 64, block_size), [150, 1, 64], 1, device)
    check(cache, 2, config=DecodeConfig(8, block_n, 2, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("num_splits", [1, 2, 5, 20])
def test_splits_even_more_than_tiles(num_splits, device):
    cache = random_cache(make_layout("K8V4", 64), [70, 1, 17], 2, device)
    check(cache, 2, config=DecodeConfig(8, 16, num_splits, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("block_m", [8, 16, 32])
def test_more_heads_than_a_program_holds(block_m, device):
    cache = random_cache(make_layout("K4V4", 64), [40, 7], 1, device)
    check(cache, 71, torch.bfloat16, config=DecodeConfig(block_m, 32, 2, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("soft_cap", [0.0, 2.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("window", [None, 1, 9, 64], ids=["full", "window1", "window9", "window64"])
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1], [5, 1, 16, 2]], ids=["one_query", "several_queries"])
def test_queries_see_their_sliding_window_with_capped_logits(query_lens, window, soft_cap, device):
    cache = random_cache(make_layout("K4V4", 64), [70, 1, 16, 129], 2, device)
    check(cache, 3, query_lens=query_lens, sliding_window=window, logits_soft_cap=soft_cap)


@pytest.mark.slow
@pytest.mark.parametrize("soft_cap", [0.0, 2.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize(
    ("window", "skip", "first"),
    [(None, 1, 0), (None, 24, 4), (None, 300, 0), (40, 24, 0), (64, 63, 16), (None, 0, 0), (None, 54, 16), (64, 4, 3)],
)
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1, 1], [5, 1, 16, 2, 16]], ids=["one_query", "several_queries"])
def test_the_newest_and_the_first_tokens_are_left_out(query_lens, window, skip, first, soft_cap, device):
    """Some queries see tokens in few splits or none; the blocks of what is left out may hold anything."""
    cache = random_cache(make_layout("K4V4", 64), [70, 1, 16, 129, 30], 2, device)
    transforms = random_transforms(2, 64, device, rotary_table(32, True, 200, device), offset=2.0, value_hadamard=True)
    query = torch.randn(sum(query_lens) + 1, 6, 64, device=device)
    config = DecodeConfig(8, 16, 3, 1, 2)
    options = {"sliding_window": window, "logits_soft_cap": soft_cap, "skip_newest": skip, "skip_first": first}
    want_lse, got_lse = (torch.full((6, len(query)), torch.nan, device=device) for _ in range(2))
    want = attend(paged_attention_ref, cache, query, query_lens, transforms, lse=want_lse, **options)
    for request, (length, queries) in enumerate(zip(cache.seq_lens.tolist(), query_lens, strict=True)):
        # Blocks that begin after the last token that is seen.
        beyond = max(-(-(length - skip) // 16), 0)
        if queries == 1 and skip:
            cache.kv_cache[cache.block_table[request, beyond : -(-length // 16)].long()] = 255
    workspace = decode_workspace(len(query), 6, 64, device)
    options |= {"workspace": workspace, "config": config}
    got = attend(paged_attention, cache, query, query_lens, transforms, lse=got_lse, **options)
    limit = 2e-3 * largest_value(cache)
    torch.testing.assert_close(got[:-1], want[:-1], rtol=0, atol=limit)
    torch.testing.assert_close(got_lse[:, :-1], want_lse[:, :-1], rtol=0, atol=2e-3)
    assert not got[-1].any() and (got_lse[:, -1] == -torch.inf).all(), "rows beyond the last query"


@pytest.mark.slow
@pytest.mark.parametrize(("pair", "head_size"), [("K2V2", 112), ("K8V4", 512)])
def test_spans_of_heads_of_other_sizes(pair, head_size, device):
    """A sliding window, tokens that other segments serve, and a cap, of several query tokens."""
    cache, query_lens = random_cache(make_layout(pair, head_size, 48), [70, 1, 97], 1, device), [3, 1, 1]
    query = torch.randn(5, 8, head_size, device=device)
    options = {"sliding_window": 64, "skip_newest": 9, "skip_first": 4, "logits_soft_cap": 2.0}
    transforms = LayerTransforms(key_hadamard=True, value_hadamard=True)
    lses = [torch.empty(8, 5, device=device) for _ in range(2)]
    want = attend(paged_attention_ref, cache, query, query_lens, transforms, lse=lses[0], **options)
    options |= {"workspace": decode_workspace(5, 8, head_size, device), "config": DecodeConfig(8, 16, 2, 2, 2)}
    got = attend(paged_attention, cache, query, query_lens, transforms, lse=lses[1], **options)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * largest_value(cache))
    torch.testing.assert_close(lses[1], lses[0], rtol=0, atol=2e-3)


@pytest.mark.slow
def test_many_counts_of_queries(device):
    query_lens = [1, 2, 3, 7, 8, 9, 15, 16]
    cache = random_cache(make_layout("K8V2", 64), [30 + 3 * length for length in query_lens], 1, device)
    check(cache, 4, torch.float16, query_lens=query_lens, config=DecodeConfig(32, 32, 2, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 4])
def test_short_prefills_among_decodes(group, device):
    cache = random_cache(make_layout("K4V2", 64), [70, 40, 129, 16, 1], 2, device)
    check(cache, group, torch.float16, query_lens=[1, 1, 16, 9, 1], pass_query_len=1)


@pytest.mark.slow
def test_padding_rows_become_0(device):
    batch = padded_batch(torch.float32, device)
    workspace = decode_workspace(7, 4, 64, device)
    for part in (workspace.output, workspace.lse):
        part.fill_(torch.nan)
    got, want = batch.attend(paged_attention, workspace=workspace), batch.attend(paged_attention_ref)
    torch.testing.assert_close(got[:4], want[:4], rtol=0, atol=4e-3)
    assert not got[2].any(), "a request of length 0"
    assert not got[4:].any(), "rows beyond the last query"


@pytest.mark.slow
@pytest.mark.parametrize("query_lens", [[1], [4]], ids=["one_query", "several_queries"])
def test_blocks_that_left_the_window_may_hold_anything(query_lens, device):
    """Within the window's first tile too, and the log-sum-exp knows nothing of them."""
    cache = random_cache(make_layout("K8V8", 64), [150], 2, device)
    query = torch.randn(sum(query_lens), 6, 64, device=device)
    options = {"sliding_window": 40, "workspace": decode_workspace(4, 6, 64, device)}
    options |= {"config": DecodeConfig(8, 64, 2, 1, 2)}
    results = []
    for _ in range(2):
        lse = torch.empty(6, len(query), device=device)
        results.append((attend(paged_attention, cache, query, query_lens, LayerTransforms(), lse=lse, **options), lse))
        left = (150 - query_lens[0] - 40 + 1) // 16
        cache.kv_cache[cache.block_table[0, :left].long()] = 255  # as fp16 scales, NaN
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("query_lens", [[1, 1], [4, 4]], ids=["one_query", "several_queries"])
def test_tokens_that_a_recent_window_serves_may_hold_anything(query_lens, device):
    """They may not be packed yet; a request shorter than the window has none that are."""
    cache = random_cache(make_layout("K4V2", 64), [150, 20], 2, device)
    query = torch.randn(sum(query_lens), 6, 64, device=device)
    results = []
    for poisoned in (0, 24):
        cache.poison_newest(poisoned)
        lse = torch.empty(6, len(query), device=device)
        options = {"skip_newest": 24, "workspace": decode_workspace(8, 6, 64, device), "lse": lse}
        results.append((attend(paged_attention, cache, query, query_lens, LayerTransforms(), **options), lse))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.slow
def test_a_window_reads_no_tile_outside(device):
    case = far_window(device)
    rotary = rotary_table(64, True, int(case.whole.seq_lens[0]), device)
    transforms = random_transforms(1, 64, device, rotary, offset=2.0)
    query = torch.randn(1, 4, 64, device=device)
    options = {"sliding_window": case.window}
    want = attend(paged_attention_ref, case.whole, query, [1], transforms, **options)
    options |= {"workspace": decode_workspace(1, 4, 64, device), "config": DecodeConfig(8, 16, 3, 1, 2)}
    got = attend(paged_attention, case.poisoned, query, [1], transforms, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [1e-6, 1e-4, 300.0, 9000.0])
@pytest.mark.parametrize("pair", ["K4V2", "K4V8"])
def test_value_scales_of_any_size(pair, spread, device):
    cache = random_cache(make_layout(pair, 64), [70, 129], 1, device)
    scale_values(cache, spread)
    got = check(cache, 4)
    assert got.abs().max() > 0.1 * spread


@pytest.mark.slow
def test_value_scales_that_change_within_a_request(device):
    check(changing_value_scales(device), 4, config=DecodeConfig(8, 16, 2, 1, 2))


def test_flat_rows_beside_steep_ones(device):
    got = check(flat_rows_beside_steep_ones(device), 4)
    assert got.abs().max() > 10


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["K4V4", "K8V8"])
def test_uniform_attention(pair, device):
    """With queries of 0 the output is the mean of the values, small beside the codes' sum and the minima's."""
    cache = random_cache(make_layout(pair, 64), [3000], 1, device)
    check(cache, 2, query=torch.zeros(1, 2, 64, device=device), tolerance=1e-5, config=DecodeConfig(8, 64, 2, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("block_n", [16, 64])
def test_rounding_of_probabilities_cancels(block_n, device):
    cache, limit = values_near_the_middle(device)
    check(cache, 4, tolerance=limit / largest_value(cache), config=DecodeConfig(8, block_n, 2, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("query_lens", [[1, 1], [4, 2]], ids=["one_query", "several_queries"])
@pytest.mark.parametrize(
    ("head_size", "rotary_dim", "is_neox", "dtype"),
    [
        (64, 64, True, torch.bfloat16),
        (128, 128, False, torch.float32),
        (96, 48, True, torch.float16),
        (64, 16, False, torch.bfloat16),
        (64, None, True, torch.bfloat16),
    ],
    ids=["neox", "interleaved", "partial", "partial_interleaved", "unrotated"],
)
def test_key_offset(head_size, rotary_dim, is_neox, dtype, query_lens, device):
    rotary = None if rotary_dim is None else rotary_table(rotary_dim, is_neox, 700, device, dtype)
    transforms = random_transforms(2, head_size, device, rotary, offset=5.0)
    cache = random_cache(make_layout("K4V4", head_size), [700, 30], 2, device)
    config = DecodeConfig(8, 64, 2, 1, 2)
    check(cache, 2, query_lens=query_lens, transforms=transforms, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_offsets_of_hundreds_of_logits_keep_fp32_accuracy(dtype, device):
    """Two tokens whose offsets' logits, of about 500, are equal: rounded to 16 bits they would part by 0.1 or more."""
    transforms = random_transforms(2, 64, device, rotary_table(64, True, 2, device, dtype), offset=20.0)
    cache = random_cache(make_layout("K8V8", 64), [2], 2, device, spread=0.01)
    check(cache, 8, query=balanced_query(transforms, 16, size=30), transforms=transforms)


@pytest.mark.slow
def test_a_constant_offset_counts_under_a_soft_cap(device):
    """Without a cap it moves all logits alike; under one it does not."""
    transforms = random_transforms(1, 64, device, rotary_table(32, True, 200, device), offset=2.0)
    cache = random_cache(make_layout("K4V4", 64), [90, 200], 1, device)
    check(cache, 4, transforms=transforms, logits_soft_cap=3.0, tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "head_size"),
    [
        *(("K8V8", 64), ("K2V4", 96), ("K4V2", 128), ("K2V2", 256), ("K8V2", 96)),
        *(("K2V4", 80), ("K2V2", 512)),
    ],
)
def test_all_transforms(pair, head_size, device):
    rotary = rotary_table(head_size // 2, True, 200, device)
    transforms = random_transforms(
        2, head_size, device, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    cache = random_cache(make_layout(pair, head_size), SEQ_LENS, 2, device)
    check(cache, 3, query_lens=[2, 1, 3, 1, 1, 4], transforms=transforms, tolerance=3e-3)


@pytest.mark.slow
def test_a_small_workspace_limits_the_splits(device):
    cache = random_cache(make_layout("K4V4", 64), [70, 129], 1, device)
    query = torch.randn(2, 2, 64, device=device)
    workspace = decode_workspace(2, 2, 64, device)
    small = type(workspace)(
        workspace.query, workspace.constants, workspace.coefficients, workspace.output[:8], workspace.lse[:8]
    )
    config = DecodeConfig(8, 16, 9, 1, 2)
    workspace.lse[8:] = 7.0
    got = attend(paged_attention, cache, query, [1, 1], LayerTransforms(), workspace=small, config=config)
    want = attend(paged_attention_ref, cache, query, [1, 1], LayerTransforms())
    torch.testing.assert_close(got, want, rtol=0, atol=4e-3)
    assert (workspace.lse[8:] == 7.0).all(), "nothing is written beyond the workspace"


@pytest.mark.parametrize("num_reqs", [1, 7, 256])
def test_config_fills_the_card_and_no_more(num_reqs):
    config = decode_config(num_reqs, 8, 4, make_layout("K4V4", 128), False, 132)
    programs = num_reqs * 8 * config.num_splits
    assert programs >= 4 * 132
    assert config.num_splits == 1 or (config.num_splits - 1) * num_reqs * 8 < 24 * 132


@pytest.mark.gpu
@pytest.mark.parametrize("transformed", [False, True], ids=["plain", "transformed"])
@pytest.mark.parametrize("index", range(len(QUANTIZED_PAIRS)), ids=[pair.name for pair in QUANTIZED_PAIRS])
def test_compiled(index, transformed, device):
    """Over the two halves every pair meets two head sizes and two query lengths."""
    shift = index + 2 * transformed
    head_size, max_query_len = HEAD_SIZES[shift % 4], (1, 5, 1, 16)[(shift + index // 4) % 4]
    lengths = [8000, 1, 15, 777, 0, 4096, 16]
    query_lens = [max(1, min(max_query_len, length)) for length in lengths]
    cache = random_cache(make_layout(QUANTIZED_PAIRS[index].name, head_size), lengths, 2, device)
    transforms = None
    if transformed:
        rotary = rotary_table(head_size, True, 8000, device)
        transforms = random_transforms(
            2, head_size, device, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
        )
    check(cache, 4, torch.bfloat16, query_lens=query_lens, transforms=transforms, tolerance=8e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("block_m", [8, 16, 32])
@pytest.mark.parametrize("num_warps", [1, 2, 4])
def test_compiled_for_any_number_of_warps(block_m, num_warps, device):
    """4 warps and 64 tokens take other matrix instructions (wgmma on Hopper) than fewer warps."""
    cache = random_cache(make_layout("K4V8", 128), [2000, 1, 130], 2, device)
    config = DecodeConfig(block_m, 64, 3, num_warps, 3)
    check(cache, 8, query_lens=[3, 1, 4], config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [4, 66])
@pytest.mark.parametrize("pair", [pair.name for pair in QUANTIZED_PAIRS])
def test_uniform_attention_over_131072_tokens(pair, num_splits, device):
    """Nearly uniform, and exactly; 4 splits sum 32,768 tokens each, where fp32 sums of codes lose the most."""
    cache = random_cache(make_layout(pair, 128), [131_072], 2, device)
    for size in (0.0, 0.02):
        query = size * torch.randn(1, 8, 128, device=device)
        config = DecodeConfig(8, 64, num_splits, 1, 3)
        check(cache, 4, query=query, tolerance=2e-4, config=config)


@pytest.mark.gpu
def test_far_positions_with_an_offset(device):
    transforms = random_transforms(2, 128, device, rotary_table(128, True, 131_072, device), offset=20.0)
    cache = random_cache(make_layout("K4V4", 128), [131_072, 100_001], 2, device)
    check(cache, 4, transforms=transforms, tolerance=2e-3)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    query = torch.randn(2, 32, 128, device=device)
    workspace = decode_workspace(2, 32, 128, device)
    got, want = (
        attend(paged_attention, cache, query, [1, 1], LayerTransforms(), workspace=workspace)
        for cache in beyond_32_bits(make_layout("K8V8", 128), device)
    )
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("max_query_len", [1, 4])
def test_a_cuda_graph_replays_what_eager_computes(max_query_len, device):
    """Captured once; then lengths, blocks, queries and bytes change, some requests become padding."""
    layout = make_layout("K4V2", 128)
    batch = GraphBatch(layout, max_query_len, device)
    rotary = rotary_table(128, True, batch.MAX_POSITION, device)
    transforms = random_transforms(
        8, 128, device, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    launch = Launch(decode_workspace(batch.query.shape[0], batch.NUM_HEADS, 128, device))
    queries = Queries(batch.block_table, batch.seq_lens, batch.query_start_loc, max_query_len)
    pages = Pages(batch.kv_cache, layout, transforms)
    shape = AttentionShape(batch.NUM_HEADS, batch.NUM_KV_HEADS, 128, 128**-0.5)

    def run():
        paged_attention(batch.query, queries, pages, shape, Span(), batch.output, launch=launch)

    batch.check_replay(run)
