"""Errors of the CUDA paged_attention: values and keys of any size, long sums, FlashAttention beside it."""

import pytest
import torch

from tests.helpers.cuda_decode import check, launch_twice
from tests.helpers.decode_cases import (
    attend,
    attention_bf16,
    attention_float64,
    changing_value_scales,
    dequantized,
    flat_rows_beside_steep_ones,
    largest_value,
    scale_values,
    values_near_the_middle,
)
from tests.helpers.paged_cache import PackedCache, make_layout, random_cache
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import LayerTransforms

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("scale", [1e-7, 1e-4, 1.0, 300.0])
@pytest.mark.parametrize("pair", ["K4V2", "K4V8"])
@pytest.mark.parametrize("group", [4, 16, 32])
def test_value_scales_of_any_size(group, pair, scale, device):
    cache = random_cache(make_layout(pair, 64), [70, 129], 1, device)
    scales = cache.sides[1].meta[..., 0].float()
    scale_values(cache, scale / scales.nanmean().item())
    got = check(cache, group)
    assert got.abs().max() > 0.1 * scale


@pytest.mark.parametrize("group", [4, 16, 32])
def test_value_scales_that_change_within_a_request(group, device):
    check(changing_value_scales(device), group)


@pytest.mark.parametrize("group", [4, 16, 32])
def test_flat_rows_beside_steep_ones(group, device):
    got = check(flat_rows_beside_steep_ones(device), group)
    assert got.abs().max() > 10


@pytest.mark.parametrize("group", [4, 16, 32])
def test_rows_of_constant_values(group, device):
    """Scale 0 everywhere: the output is a mean of the minima."""
    cache = random_cache(make_layout("K4V4", 64), [60, 1], 1, device)
    cache.sides[1].meta[..., 0].nan_to_num_(0).zero_()
    got = check(cache, group)
    assert got.abs().max() > 1


@pytest.mark.parametrize("pair", ["K2V8", "K8V2"])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("group", [4, 16, 32])
def test_keys_of_hundreds(group, rotated, pair, device):
    """Logits of hundreds, where a query's fixed point is off by 0.01 and hardly more than one token counts."""
    cache = random_cache(make_layout(pair, 128), [1000, 77], 2, device, spread=65.0)
    assert cache.sides[0].meta.nan_to_num(0).abs().max() > 250
    check(cache, group, tolerance=1e-2, transforms=LayerTransforms(key_hadamard=rotated))


@pytest.mark.parametrize("copies", [1, 32])
@pytest.mark.parametrize("pair", [pair.name for pair in QUANTIZED_PAIRS])
def test_uniform_attention_over_131072_tokens(pair, copies, device):
    """Nearly uniform, and exactly; with 32 copies of the request every warp sums thousands of tokens."""
    cache = random_cache(make_layout(pair, 128), [131_072], 2, device)
    many = PackedCache(cache.layout, cache.kv_cache, cache.block_table.repeat(copies, 1), cache.seq_lens.repeat(copies))
    for size in (0.0, 0.02):
        query = (size * torch.randn(1, 8, 128, device=device)).half()
        want = attend(paged_attention_ref, cache, query.float(), [1], LayerTransforms())
        got = launch_twice(many, query.repeat(copies, 1, 1), [1] * copies, LayerTransforms()).float()
        limit = 1e-5 * largest_value(cache)
        torch.testing.assert_close(got, want.expand_as(got), rtol=2**-11, atol=limit)


@pytest.mark.parametrize("pair", ["K8V8", "K4V4", "K2V2"])
@pytest.mark.parametrize("group", [16, 32])
def test_sums_of_many_tokens_stay_as_accurate(group, pair, device):
    """Nearly uniform attention over 131,072 tokens, which few warps add up: no larger errors than FlashAttention's."""
    copies = 32
    cache = random_cache(make_layout(pair, 128), [131_072], 2, device)
    many = PackedCache(cache.layout, cache.kv_cache, cache.block_table.repeat(copies, 1), cache.seq_lens.repeat(copies))
    query = (0.02 * torch.randn(1, 2 * group, 128, device=device)).bfloat16()
    got = launch_twice(many, query.repeat(copies, 1, 1), [1] * copies, LayerTransforms()).double()
    key, value = dequantized(cache, 0)
    want = attention_float64(query[0], key, value)
    half_unit = 2.0 ** (want.abs().log2().floor() - 8)
    flash = (attention_bf16(query[0], key, value) - attention_float64(query[0], key.bfloat16(), value.bfloat16())).abs()
    assert ((got - want).abs() - half_unit).max() <= flash.max()


def test_rounding_of_weights_cancels(device):
    cache, limit = values_near_the_middle(device)
    check(cache, 4, torch.float16, tolerance=limit / largest_value(cache))


@pytest.mark.parametrize(
    "case",
    ["one_token", "mixed_lengths", "large_keys", "long", "uniform"],
)
@pytest.mark.parametrize("pair", ["K8V8", "K4V4", "K4V2", "K2V2"])
@pytest.mark.parametrize("group", [4, 8, 16, 32])
def test_no_less_accurate_than_flash_attention_in_bf16(group, pair, case, device):
    """Both against float64 on what their own cache holds, in the error that is not the output's own rounding.

    The bound: where FlashAttention's bf16 probabilities put its largest error, ours is no larger (nor than 2^-12 of the
    largest value, for a request of one token, where FlashAttention has no error).
    """
    lengths, spread, size = {
        "one_token": ([1] * 8, 1.0, 1.0),
        "mixed_lengths": ([3, 16, 100, 257, 1000, 2049, 4000, 5000], 1.0, 1.0),
        "large_keys": ([100, 3000, 1000], 65.0, 1 / 65),
        "long": ([60_000, 131_072], 1.0, 1.0),
        "uniform": ([131_072], 1.0, 0.02),
    }[case]
    cache = random_cache(make_layout(pair, 128), lengths, 4, device, spread)
    query = (size * torch.randn(len(lengths), 4 * group, 128, device=device)).bfloat16()
    got = launch_twice(cache, query, [1] * len(lengths), LayerTransforms()).double()
    ours = flash = 0.0
    for request in range(len(lengths)):
        key, value = dequantized(cache, request)
        want = attention_float64(query[request], key, value)
        half_unit = 2.0 ** (want.abs().log2().floor() - 8)
        ours = max(ours, ((got[request] - want).abs() - half_unit).max().item())
        want = attention_float64(query[request], key.bfloat16(), value.bfloat16())
        flash = max(flash, (attention_bf16(query[request], key, value) - want).abs().max().item())
    assert ours <= max(flash, 2**-12 * largest_value(cache) if case == "one_token" else 0.0)
