"""The CUDA kernels' arithmetic and bookkeeping on a CPU, lane by lane, against the reference on the same bytes."""

import math

import pytest
import torch

from tests.helpers import cuda_emulator
from tests.helpers.decode_cases import attend, plain_attention, random_sinks
from tests.helpers.paged_cache import empty_cache, make_layout, random_cache, random_transforms, slots_of
from vllm_kvtuner.kernels.contract import CachedTokens, Pages, Span, WindowRows
from vllm_kvtuner.kernels.cuda import build, gather_cache, paged_attention, reshape_and_cache
from vllm_kvtuner.kernels.cuda.paged_attention_config import DecodeConfig
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref, reshape_and_cache_ref, store_rows_ref
from vllm_kvtuner.pages.transforms import LayerTransforms, RotaryTable, linear_rotary, rotate_values

pytestmark = pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available()))

CPU = torch.device("cpu")
BF16, FP16 = torch.bfloat16, torch.float16
SEQ_LENS = [1, 15, 0, 16, 150, 17]
"""More requests than CTAs, one without tokens, and one that several CTAs share."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    torch.manual_seed(0)
    cuda_emulator.install(monkeypatch)


def rotary(rotary_dim: int, is_neox: bool = True) -> RotaryTable:
    frequency = 10000.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float64) / (rotary_dim // 2))
    angle = torch.arange(512, dtype=torch.float64)[:, None] * frequency
    table = linear_rotary(torch.cat([angle.cos(), angle.sin()], dim=-1).float(), is_neox, CPU)
    assert table is not None
    return table


def offset_in(pairs: int, num_kv_heads: int, head_size: int, table: RotaryTable, **switches: bool) -> LayerTransforms:
    """A key offset in the first ``pairs`` rotary pairs alone."""
    offset = torch.zeros(num_kv_heads, head_size)
    for dims in table.pairs():
        offset[:, dims[:pairs]] = 5 * torch.randn(num_kv_heads, pairs)
    return LayerTransforms(offset, table, **switches)


def split_options(options, query_lens):
    """What the kernel alone takes, and what the reference takes too."""
    shared = {name: value for name, value in options.items() if name not in ("pass_query_len", "config")}
    launch = {"pass_query_len": options.get("pass_query_len", max(query_lens)), "config": options.get("config")}
    return launch, shared


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("pair", "head_size", "group", "block_size", "dtype", "query_lens", "options", "transforms"),
    [
        pytest.param("K4V4", 128, 4, 16, BF16, [1], {}, None, id="K4V4"),
        pytest.param("K8V8", 128, 4, 64, FP16, [1], {}, None, id="K8V8, block size 64"),
        pytest.param("K2V2", 64, 3, 16, FP16, [1], {}, None, id="K2V2, head size 64, group of 3"),
        pytest.param("K4V2", 256, 1, 32, BF16, [1], {}, None, id="K4V2, head size 256"),
        pytest.param("K2V8", 96, 7, 16, FP16, [1], {}, None, id="K2V8, head size 96, group of 7"),
        pytest.param(
            "K2V4", 128, 8, 16, FP16, [1],
            {"config": DecodeConfig(32, 2, 2)}, None, id="group of 8, CTAs of 4 warps",
        ),
        pytest.param("K4V4", 256, 8, 16, BF16, [1], {}, None, id="K4V4, head size 256, group of 8"),
        pytest.param("K4V2", 192, 16, 16, FP16, [1], {}, None, id="K4V2, head size 192, group of 16"),
        pytest.param("K2V8", 160, 16, 16, FP16, [1], {}, None, id="K2V8, head size 160, group of 16"),
        pytest.param("K8V4", 128, 2, 16, FP16, [1, 5, 1, 16, 3, 2], {}, None, id="1 to 16 query tokens"),
        pytest.param("K4V4", 128, 12, 16, FP16, [1], {}, None, id="group of 12"),
        pytest.param("K8V8", 128, 16, 64, BF16, [1], {}, None, id="K8V8, group of 16"),
        pytest.param("K2V2", 128, 16, 32, FP16, [1], {}, None, id="K2V2, group of 16"),
        pytest.param("K2V8", 96, 16, 16, FP16, [1], {}, None, id="K2V8, head size 96, group of 16"),
        pytest.param("K2V2", 64, 8, 16, FP16, [1], {}, None, id="K2V2, head size 64, group of 8"),
        pytest.param("K8V2", 256, 16, 16, FP16, [1], {}, None, id="K8V2, head size 256, group of 16"),
        pytest.param("K4V4", 128, 8, 16, FP16, [4], {}, None, id="32 rows, warp groups"),
        pytest.param("K2V4", 128, 17, 64, FP16, [1], {}, None, id="K2V4, group of 17, warp groups"),
        pytest.param("K8V2", 64, 16, 16, FP16, [3], {}, None, id="K8V2, head size 64, 48 rows, warp groups"),
        pytest.param("K4V8", 256, 8, 16, FP16, [4], {}, None, id="K4V8, head size 256, 32 rows, warp groups"),
        pytest.param("K2V2", 128, 8, 16, FP16, [4, 1, 16, 2, 4, 1], {}, None, id="two launches"),
        pytest.param(
            "K4V4", 128, 32, 16, FP16, [1],
            {"config": DecodeConfig(32, 2, 1, 4, 1, True, 0, 1)}, None, id="32 rows, a warp alone",
        ),
        pytest.param(
            "K4V4", 128, 8, 16, FP16, [4],
            {"config": DecodeConfig(128, 2, 1, 8, 4, True)}, None, id="32 rows, warp groups, stages of 128",
        ),
        pytest.param(
            "K4V4", 64, 12, 16, FP16, [1, 3, 1, 2, 3, 1],
            {"sliding_window": 40, "logits_soft_cap": 20.0}, None, id="group of 12, sliding window, capped",
        ),
        pytest.param(
            "K4V4", 128, 16, 16, FP16, [1], {},
            lambda: offset_in(7, 2, 128, rotary(128), key_hadamard=True), id="group of 16, key offset, rotations",
        ),
        pytest.param(
            "K2V2", 128, 16, 16, FP16, [2], {},
            lambda: offset_in(40, 2, 128, rotary(128), value_hadamard=True), id="warp groups, key offset, rotations",
        ),
        pytest.param(
            "K4V4", 96, 16, 16, FP16, [1], {},
            lambda: random_transforms(2, 96, CPU, None, equalization=True, key_hadamard=True),
            id="group of 16, equalization",
        ),
        pytest.param(
            "K4V4", 128, 4, 16, BF16, [1, 1, 16, 1, 3, 1],
            {"pass_query_len": 1}, None, id="more passes for short prefills",
        ),
        pytest.param("K4V4", 64, 4, 16, FP16, [1, 3, 1, 2, 4, 1], {"sliding_window": 40}, None, id="sliding window"),
        pytest.param("K4V8", 64, 4, 16, FP16, [1], {"logits_soft_cap": 30.0}, None, id="soft cap"),
        pytest.param(
            "K4V4", 128, 4, 16, FP16, [1],
            {}, lambda: LayerTransforms(key_hadamard=True, value_hadamard=True), id="rotations",
        ),
        pytest.param(
            "K4V4", 96, 4, 16, FP16, [1],
            {}, lambda: random_transforms(2, 96, CPU, None, equalization=True, key_hadamard=True), id="equalization",
        ),
        pytest.param(
            "K4V4", 128, 4, 16, FP16, [1],
            {}, lambda: offset_in(7, 2, 128, rotary(128), key_hadamard=True), id="key offset",
        ),
        pytest.param(
            "K2V2", 128, 4, 16, FP16, [1],
            {}, lambda: offset_in(40, 2, 128, rotary(128)), id="key offset, many pairs",
        ),
        pytest.param(
            "K4V4", 256, 4, 16, FP16, [1],
            {"config": DecodeConfig(16, 2, 1, num_warps=2)}, lambda: offset_in(72, 2, 256, rotary(256)),
            id="key offset, more pairs than threads",
        ),
        pytest.param(
            "K8V8", 128, 4, 16, FP16, [1],
            {}, lambda: offset_in(8, 2, 128, rotary(128)), id="key offset, shorter stages",
        ),
        pytest.param(
            "K8V2", 64, 8, 16, FP16, [2],
            {}, lambda: offset_in(16, 2, 64, rotary(32, is_neox=False)), id="key offset, all pairs, partly rotated",
        ),
    ],
)  # fmt: skip
def test_decode(pair, head_size, group, block_size, dtype, query_lens, options, transforms):
    layout = make_layout(pair, head_size, block_size)
    transforms = transforms() if transforms else LayerTransforms()
    query_lens = query_lens if len(query_lens) > 1 else query_lens * len(SEQ_LENS)
    seq_lens = [max(length, queries) if length else 0 for length, queries in zip(SEQ_LENS, query_lens, strict=True)]
    cache = random_cache(layout, seq_lens, 2, CPU)
    total = sum(query_lens)
    query = torch.randn(total + 2, 2 * group, head_size).to(dtype)
    launch, options = split_options(options, query_lens)
    workspace = paged_attention.decode_workspace(len(seq_lens), launch["pass_query_len"], 2 * group, 2, head_size, CPU)
    got = attend(
        paged_attention.paged_attention, cache, query, query_lens, transforms, workspace=workspace, **launch, **options
    )
    want = attend(paged_attention_ref, cache, query[:total].float(), query_lens, transforms, **options)
    error = (got[:total].float() - want).norm() / want.norm()
    assert error < (3e-3 if dtype == BF16 else 6e-4)
    assert (got[total:] == 0).all(), "rows beyond the last query"
    assert not workspace.arrivals.any(), "counters are 0 between launches"


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("pair", "group", "query_lens", "options", "transforms"),
    [
        pytest.param("K4V4", 4, [1], {"skip_newest": 24}, None, id="one query"),
        pytest.param("K4V2", 4, [1], {"skip_newest": 140}, None, id="most requests see nothing"),
        pytest.param("K4V4", 2, [1, 5, 1, 16, 3, 2], {"skip_newest": 12}, None, id="some queries see nothing"),
        pytest.param(
            "K4V4", 2, [1, 5, 1, 16, 3, 2],
            {"skip_newest": 12, "skip_first": 4, "pass_query_len": 1}, None, id="more passes for short prefills",
        ),
        pytest.param("K4V2", 16, [1], {"skip_newest": 24, "skip_first": 4}, None, id="group of 16"),
        pytest.param(
            "K4V4", 16, [3, 2, 3, 1, 3, 2], {"skip_newest": 12, "sliding_window": 40}, None, id="warp groups",
        ),
        pytest.param(
            "K8V4", 4, [1, 3, 1, 2, 4, 1],
            {"skip_newest": 9, "sliding_window": 40, "logits_soft_cap": 4.0}, None, id="sliding window, capped",
        ),
        pytest.param("K8V8", 4, [1], {"sliding_window": 24}, None, id="the window itself"),
        pytest.param(
            "K4V4", 4, [1],
            {"skip_newest": 24}, lambda: offset_in(7, 2, 64, rotary(64), value_hadamard=True), id="transforms",
        ),
        pytest.param("K4V4", 4, [1], {"skip_newest": 9, "skip_first": 4}, None, id="sink tokens"),
        pytest.param("K2V2", 4, [1], {"skip_newest": 9, "skip_first": 16}, None, id="as many as a step has"),
        pytest.param(
            "K8V4", 2, [1, 5, 1, 16, 3, 2],
            {"skip_newest": 9, "skip_first": 4, "sliding_window": 40, "logits_soft_cap": 4.0}, None, id="all limits",
        ),
    ],
)  # fmt: skip
def test_the_newest_tokens_are_left_out(pair, group, query_lens, options, transforms):
    """And the log-sum-exp is there, by which attention over them is merged."""
    transforms = transforms() if transforms else LayerTransforms()
    query_lens = query_lens if len(query_lens) > 1 else query_lens * len(SEQ_LENS)
    seq_lens = [max(length, queries) if length else 0 for length, queries in zip(SEQ_LENS, query_lens, strict=True)]
    cache = random_cache(make_layout(pair, 64), seq_lens, 2, CPU)
    total, num_heads = sum(query_lens), 2 * group
    query = torch.randn(total + 2, num_heads, 64).to(FP16)
    got_lse, want_lse = torch.full((num_heads, total + 2), torch.nan), torch.empty(num_heads, total)
    launch, options = split_options(options, query_lens)
    workspace = paged_attention.decode_workspace(len(seq_lens), launch["pass_query_len"], num_heads, 2, 64, CPU)
    got = attend(
        paged_attention.paged_attention, cache, query, query_lens, transforms, got_lse, workspace=workspace,
        **launch, **options,
    )  # fmt: skip
    want = attend(paged_attention_ref, cache, query[:total].float(), query_lens, transforms, want_lse, **options)
    sees_nothing = want_lse.T.isneginf()
    assert sees_nothing.any() and not sees_nothing.all()
    assert (got[:total][sees_nothing] == 0).all() and (got[total:] == 0).all()
    assert (got[:total].float() - want).norm() < 6e-4 * want.norm()
    torch.testing.assert_close(got_lse[:, :total], want_lse, rtol=0, atol=2e-3)
    assert (got_lse[:, total:] == -torch.inf).all(), "rows beyond the last query"
    assert not workspace.arrivals.any(), "counters are 0 between launches"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "group", "query_lens", "options", "dtype", "transforms"),
    [
        pytest.param("K8V8", 8, [1], {}, torch.float32, LayerTransforms(), id="group of 8"),
        pytest.param(
            "K4V4", 8, [1, 3, 1, 2, 4, 1], {"sliding_window": 40, "logits_soft_cap": 4.0}, BF16, LayerTransforms(),
            id="sliding window, capped, several queries",
        ),
        pytest.param(
            "K4V2", 4, [1], {"skip_newest": 140}, FP16, LayerTransforms(), id="most requests see no packed token",
        ),
        pytest.param(
            "K4V2", 16, [1], {"skip_newest": 24, "skip_first": 4}, BF16, LayerTransforms(value_hadamard=True),
            id="group of 16, beside a recent window",
        ),
        pytest.param(
            "K4V4", 16, [3, 2, 3, 1, 3, 2], {"skip_newest": 12, "sliding_window": 40}, BF16, LayerTransforms(),
            id="warp groups",
        ),
    ],
)  # fmt: skip
def test_attention_sinks(pair, group, query_lens, options, dtype, transforms):
    """Once in each row, however many CTAs and warps share it, and alone where a query sees no token."""
    query_lens = query_lens if len(query_lens) > 1 else query_lens * len(SEQ_LENS)
    seq_lens = [max(length, queries) if length else 0 for length, queries in zip(SEQ_LENS, query_lens, strict=True)]
    cache = random_cache(make_layout(pair, 64), seq_lens, 2, CPU)
    total, num_heads = sum(query_lens), 2 * group
    query = torch.randn(total + 2, num_heads, 64).to(FP16)
    sinks, lse = random_sinks(num_heads, CPU, dtype), torch.full((num_heads, total + 2), torch.nan)
    workspace = paged_attention.decode_workspace(len(seq_lens), max(query_lens), num_heads, 2, 64, CPU)
    got = attend(
        paged_attention.paged_attention, cache, query, query_lens, transforms, lse, workspace=workspace, sinks=sinks,
        **options,
    )  # fmt: skip
    span = Span(**{name: value for name, value in options.items() if name in Span._fields})
    want, want_lse = plain_attention(cache, query, query_lens, sinks, span, options.get("logits_soft_cap", 0.0))
    want = rotate_values(want, transforms)
    assert (got.double() - want).norm() < 1e-3 * want.norm()
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=2e-3)
    assert not workspace.arrivals.any(), "counters are 0 between launches"


def decode_one(function, cache, query, **options):
    """An implementation's output for one request's newest token."""
    return attend(function, cache, query, [1], LayerTransforms(), **options).float()


def decode_one_by_cuda(cache, query, **options):
    workspace = paged_attention.decode_workspace(1, 1, query.shape[1], 2, cache.layout.head_size, CPU)
    return decode_one(paged_attention.paged_attention, cache, query, **options, workspace=workspace)


def test_blocks_that_left_the_window_may_hold_anything():
    """Copies come in stages of 64 tokens, of which the window's first may begin in blocks that others own by now."""
    cache = random_cache(make_layout("K4V4", 64), [150], 2, CPU)
    query = torch.randn(1, 8, 64)
    want = decode_one(paged_attention_ref, cache, query, sliding_window=40)
    cache.kv_cache[cache.block_table[0, : (150 - 40) // 16].long()] = 255
    got = decode_one_by_cuda(cache, query.to(FP16), sliding_window=40)
    assert (got - want).norm() < 2e-3 * want.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([2600], id="one request"),
        pytest.param([700, 90, 900], id="few"),
        pytest.param([400, 3, 1, 2, 5, 400, 16, 17, 400, 33, 400], id="short among long"),
        pytest.param([1] * 70, id="one token each"),
        pytest.param([1, 2000, 1], id="a share ends in what a segment counts for besides its stages"),
    ],
)
def test_shares(lengths):
    """Every stage is in one CTA's share, whatever segments count for besides their stages."""
    cache = random_cache(make_layout("K4V4", 64), lengths, 2, CPU)
    query = torch.randn(len(lengths), 8, 64)
    workspace = paged_attention.decode_workspace(len(lengths), 1, 8, 2, 64, CPU)
    query_lens = [1] * len(lengths)
    want = attend(paged_attention_ref, cache, query, query_lens, LayerTransforms())
    config = DecodeConfig(stage_tokens=16, num_stages=2, min_ctas=1)
    got = attend(
        paged_attention.paged_attention, cache, query.to(FP16), query_lens, LayerTransforms(), workspace=workspace,
        config=config,
    )  # fmt: skip
    assert (got.float() - want).norm() < 2e-3 * want.norm()
    assert not workspace.arrivals.any(), "counters are 0 between launches"


@pytest.mark.quick(1)
@pytest.mark.parametrize("heads", [8, 32, 64])
def test_constant_values_under_growing_logits(heads):
    """Rows of scale 0 give no weight that could grow too large; the total must stay finite all the same."""
    cache = random_cache(make_layout("K8V8", 64), [96], 2, CPU)
    keys, values = (side.meta for side in cache.sides)
    keys[..., 0] = values[..., 0] = 0
    token = torch.arange(96)
    # From the second step on, logits stand 127.5 above those of the first, to base 2: P is finite, sums of it are not.
    minimum = torch.where(token < 32, 0.0, 127.5 / (3 * 64 / 8 * math.log2(math.e)))
    keys[cache.block_table[0, token // 16].long(), :, token % 16, 1] = minimum.half()[:, None]
    query = torch.full((1, heads, 64), 3.0)
    want = decode_one(paged_attention_ref, cache, query)
    got = decode_one_by_cuda(cache, query.to(FP16))
    assert (got - want).norm() < 2e-3 * want.norm()


@pytest.mark.quick(1)
@pytest.mark.parametrize("heads", [8, 32, 64])
@pytest.mark.parametrize("pair", ["K8V8", "K4V2"])
def test_many_small_weights_beside_a_large_one(pair, heads):
    """A first token with nearly all of the weight and no value: what is left of the output is the others', whose
    weights are 2^-14 of its own, in its stage and in others."""
    cache = random_cache(make_layout(pair, 64), [1500], 2, CPU)
    keys, values = (side.meta for side in cache.sides)
    first = cache.block_table[0, 0].long()
    keys[..., 0] = 0
    keys[..., 1] = 0
    keys[first, :, 0, 1] = 14 / (3 * 64 / 8 * math.log2(math.e))
    values[first, :, 0] = 0
    query = torch.full((1, heads, 64), 3.0)
    want = decode_one(paged_attention_ref, cache, query)
    got = decode_one_by_cuda(cache, query.to(FP16))
    assert 1e-3 < want.abs().max() < 0.2
    assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.slow
@pytest.mark.parametrize("heads", [32, 64])
def test_sums_are_set_aside_in_long_segments(heads, monkeypatch):
    """Whatever their references do afterwards; here every 128 tokens of a warp or team."""
    text = build.Source.text
    monkeypatch.setattr(
        build.Source,
        "text",
        lambda source: text(source).replace("ASIDE_TOKENS = V_BITS == 8 ? 1024 : 2048", "ASIDE_TOKENS = 128"),
    )
    cache = random_cache(make_layout("K4V4", 64), [3000], 2, CPU)
    keys = cache.sides[0].meta
    rising = torch.arange(3000) / 1000
    keys[cache.block_table[0, torch.arange(3000) // 16].long(), :, torch.arange(3000) % 16, 1] += rising.half()[:, None]
    query = torch.randn(1, heads, 64)
    want = decode_one(paged_attention_ref, cache, query)
    got = decode_one_by_cuda(cache, query.to(FP16))
    assert (got - want).norm() < 1e-3 * want.norm()


@pytest.mark.quick(2)
@pytest.mark.parametrize("many_rows", [False, True])
@pytest.mark.parametrize("pair", ["K8V4", "K4V2", "K2V8"])
def test_store_and_gather(pair, many_rows, monkeypatch):
    monkeypatch.setattr(reshape_and_cache, "MANY_ROWS", 0 if many_rows else 1 << 62)
    layout = make_layout(pair, 96, 16)
    table = rotary(48)
    transforms = random_transforms(2, 96, CPU, table, offset=5.0, equalization=True)
    seq_lens = [33, 1, 16]
    cache = random_cache(layout, seq_lens, 2, CPU)
    slots = slots_of(cache.block_table, seq_lens, 16)
    positions = torch.cat([torch.arange(length) for length in seq_lens])
    key, value = torch.randn(2, sum(seq_lens), 2, 96).to(BF16)
    got, want = (Pages(empty_cache(layout, cache.kv_cache.shape[0], 2, CPU), layout, transforms) for _ in range(2))
    window = WindowRows(torch.zeros(4, 2, 32, 192, dtype=BF16), torch.randperm(4 * 32)[: len(slots)])
    window.slot_mapping[::5] = -1
    reshape_and_cache.reshape_and_cache(key, value, slots, positions, got, window)
    reshape_and_cache_ref(key, value, slots, positions, want)
    assert torch.equal(got.kv_cache, want.kv_cache)
    kept = window._replace(kv_cache=torch.zeros_like(window.kv_cache))
    store_rows_ref(key, value, kept)
    assert torch.equal(window.kv_cache, kept.kv_cache)

    ends = torch.tensor([0, *torch.tensor(seq_lens).cumsum(0).tolist()], dtype=torch.int32)
    firsts = torch.zeros(len(seq_lens), dtype=torch.int32)
    tokens = CachedTokens(cache.block_table, ends, firsts, sum(seq_lens))
    out = [torch.full((2, sum(seq_lens), 2, 96), torch.nan) for _ in range(2)]
    for gather, (keys, values) in zip((gather_cache.gather_cache, gather_cache_ref), out, strict=True):
        gather(want, tokens, keys, values)
    torch.testing.assert_close(*out, rtol=2e-6, atol=2e-5)
