"""The CUDA paged_attention under rotations, equalization and key offsets."""

import pytest
import torch

from tests.helpers.cuda_decode import SWITCHES, check
from tests.helpers.decode_cases import (
    SEQ_LENS,
    balanced_query,
    linear_table,
    with_offset_pairs,
)
from tests.helpers.paged_cache import make_layout, random_cache, random_transforms

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "names",
    [(), ("key_hadamard",), ("value_hadamard",), ("equalization",), tuple(SWITCHES)],
    ids=lambda names: "_and_".join(names) or "none",
)
@pytest.mark.parametrize("head_size", [96, 128])
@pytest.mark.parametrize("group", [4, 12, 32])
def test_transforms(group, head_size, names, device):
    transforms = random_transforms(2, head_size, device, **dict.fromkeys(names, True))
    check(random_cache(make_layout("K4V4", head_size), SEQ_LENS, 2, device), group, transforms=transforms)


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [4, 2, 16]], ids=["one_query", "several_queries"])
@pytest.mark.parametrize("num_pairs", [1, 8, 13, None], ids=["1_pair", "8_pairs", "13_pairs", "all_pairs"])
@pytest.mark.parametrize(
    ("head_size", "rotary_dim", "is_neox"),
    [(64, 64, True), (128, 128, False), (96, 48, True), (64, 32, False)],
    ids=["neox", "interleaved", "partial", "partial_interleaved"],
)
def test_key_offset(head_size, rotary_dim, is_neox, num_pairs, query_lens, device):
    transforms = random_transforms(2, head_size, device, linear_table(rotary_dim, is_neox, 3000, device), offset=5.0)
    if num_pairs is not None:
        transforms = with_offset_pairs(transforms, num_pairs)
    cache = random_cache(make_layout("K4V4", head_size), [700, 30, 3000], 2, device)
    check(cache, 4, query_lens=query_lens, transforms=transforms)


def test_an_offset_that_is_not_rotated_moves_all_logits_alike(device):
    transforms = random_transforms(2, 64, device, offset=2.0)
    check(random_cache(make_layout("K4V4", 64), SEQ_LENS, 2, device), 4, transforms=transforms)


def test_key_offset_under_a_soft_cap(device):
    transforms = random_transforms(2, 64, device, linear_table(64, True, 200, device), offset=2.0)
    check(
        random_cache(make_layout("K4V4", 64), [90, 200], 2, device), 4, transforms=with_offset_pairs(transforms, 8),
        logits_soft_cap=3.0,
    )  # fmt: skip


@pytest.mark.parametrize("num_pairs", [8, 64])
@pytest.mark.parametrize("group", [4, 12, 32])
def test_far_positions_with_an_offset(group, num_pairs, device):
    transforms = random_transforms(2, 128, device, linear_table(128, True, 131_072, device), offset=20.0)
    cache = random_cache(make_layout("K4V4", 128), [131_072, 100_001], 2, device)
    check(cache, group, transforms=with_offset_pairs(transforms, num_pairs))


def test_offsets_of_hundreds_of_logits_keep_fp32_accuracy(device):
    """Two tokens whose offsets' logits, of about 500, nearly balance: in 16 bits they would part by 0.1 or more."""
    transforms = random_transforms(2, 64, device, linear_table(64, True, 2, device), offset=20.0)
    cache = random_cache(make_layout("K8V8", 64), [2], 2, device, spread=0.01)
    query = balanced_query(transforms, 16, size=30.0)
    check(cache, 8, torch.float16, query=query, transforms=transforms)


@pytest.mark.parametrize(
    ("pair", "head_size", "group"),
    [
        ("K8V8", 64, 3), ("K2V4", 96, 4), ("K4V2", 128, 4), ("K2V2", 256, 8), ("K8V4", 96, 1), ("K4V4", 128, 7),
        ("K4V4", 256, 16), ("K8V8", 128, 16), ("K2V2", 64, 16), ("K4V4", 96, 16),
    ],
)  # fmt: skip
def test_all_transforms(pair, head_size, group, device):
    rotary = linear_table(head_size // 2, True, 2000, device)
    transforms = with_offset_pairs(random_transforms(2, head_size, device, rotary, offset=5.0, **SWITCHES), 8)
    cache = random_cache(make_layout(pair, head_size), [*SEQ_LENS, 2000], 2, device)
    check(cache, group, query_lens=[2, 1, 3, 1, 1, 4, 2], transforms=transforms)
