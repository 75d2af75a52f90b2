"""gather_cache against the reference on the same packed bytes.

Tests call this module's ``gather_cache``, so that another implementation can take its place.
"""

import itertools

import pytest
import torch

from tests.helpers.paged_cache import make_layout, random_cache, random_transforms, rotary_table
from vllm_kvtuner.kernels.contract import CachedTokens
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref
from vllm_kvtuner.kernels.triton.gather_cache import gather_cache
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import LayerTransforms

HEAD_SIZES = (64, 96, 128, 256)
SEQ_LENS = [40, 1, 16, 17, 95]
# First token and number of tokens gathered of each request: whole, none, one block, mid-block to mid-block.
SLICES = [(0, 40), (0, 1), (16, 0), (3, 14), (15, 66)]
# The kernel rotates by two fp16 terms of 11 bits each and sums in fp32.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gathered(function, cache, slices, transforms, dtype):
    """Keys and values of all slices by an implementation of gather_cache, followed by two rows that stay NaN."""
    device = cache.kv_cache.device
    starts, counts = zip(*slices, strict=True)
    cu_seq_lens = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
    shape = (sum(counts) + 2, cache.kv_cache.shape[1], cache.layout.head_size)
    keys, values = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
    seq_starts = torch.tensor(starts, dtype=torch.int32, device=device)
    tokens = CachedTokens(cache.block_table, cu_seq_lens, seq_starts, sum(counts))
    function(cache.pages(transforms), tokens, keys, values)
    return keys, values


def check(cache, slices, transforms, dtype):
    """This module's gather_cache, whichever stands there, gives what the reference gives."""
    got = gathered(gather_cache, cache, slices, transforms, dtype)
    want = gathered(gather_cache_ref, cache, slices, transforms, dtype)
    for ours, theirs in zip(got, want, strict=True):
        assert ours[-2:].isnan().all(), "rows beyond the tokens gathered stay"
        largest = theirs[:-2].abs().max().item()
        torch.testing.assert_close(ours[:-2], theirs[:-2], rtol=0, atol=TOLERANCES[dtype] * largest)


@pytest.mark.quick(2)
@pytest.mark.parametrize("index", range(len(QUANTIZED_PAIRS)), ids=[pair.name for pair in QUANTIZED_PAIRS])
def test_every_pair(index, device):
    layout = make_layout(QUANTIZED_PAIRS[index].name, HEAD_SIZES[index % 4], (16, 32, 48)[index % 3])
    cache = random_cache(layout, SEQ_LENS, 3, device)
    check(cache, SLICES, LayerTransforms(), tuple(TOLERANCES)[index % 3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "head_size", "rotary_dim", "is_neox"),
    [("K4V4", 128, 128, True), ("K2V8", 96, 48, True), ("K8V2", 64, 64, False), ("K4V2", 64, None, True)],
    ids=["neox", "partial", "interleaved", "unrotated"],
)
def test_transforms_are_undone(pair, head_size, rotary_dim, is_neox, device):
    check_transforms(pair, head_size, rotary_dim, is_neox, device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "head_size", "rotary_dim"),
    [("K2V4", 80, 80), ("K4V2", 112, 56), ("K2V8", 512, 128), ("K4V2", 512, None)],
)
def test_head_sizes_that_this_kernel_alone_serves(pair, head_size, rotary_dim, device):
    check_transforms(pair, head_size, rotary_dim, True, device)


def check_transforms(pair, head_size, rotary_dim, is_neox, device):
    rotary = None if rotary_dim is None else rotary_table(rotary_dim, is_neox, 128, device)
    transforms = random_transforms(
        2, head_size, device, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    check(random_cache(make_layout(pair, head_size), SEQ_LENS, 2, device), SLICES, transforms, torch.float32)


def test_far_positions(device):
    transforms = random_transforms(1, 64, device, rotary_table(64, True, 4000, device), offset=5.0)
    cache = random_cache(make_layout("K2V2", 64, 256), [3990], 1, device)
    check(cache, [(3950, 40)], transforms, torch.float32)


def test_nothing_to_gather(device):
    cache = random_cache(make_layout("K8V8", 64), [20], 1, device)
    keys, values = gathered(gather_cache, cache, [(7, 0)], LayerTransforms(), torch.float32)
    assert keys.isnan().all()
    assert values.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(QUANTIZED_PAIRS)), ids=[pair.name for pair in QUANTIZED_PAIRS])
def test_long_prefixes(index, device):
    pair, head_size = QUANTIZED_PAIRS[index].name, HEAD_SIZES[index % 4]
    rotary = rotary_table(head_size, True, 8192, device)
    transforms = random_transforms(
        8, head_size, device, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    cache = random_cache(make_layout(pair, head_size, 128), [8000, 3, 129, 4097], 8, device)
    check(cache, [(1, 7999), (0, 3), (128, 1), (0, 4097)], transforms, torch.bfloat16)
