"""Transforms: each undone exactly, and folded into queries without changing a logit."""

import math

import pytest
import torch

from tests.helpers.paged_cache import random_transforms, rotary_table
from vllm_kvtuner.pages.transforms import (
    LayerTransforms,
    fold_query,
    hadamard,
    restore_keys,
    rotate_values,
    rotated_offset,
    transform_keys,
)

NUM_KV_HEADS, GROUP = 2, 3
FAR = [0, 1, 63, 9_999, 131_071]
CPU = torch.device("cpu")
ROTARIES = [(64, 64, True), (64, 64, False), (96, 48, True), (128, 32, False), (64, None, True)]
ROTARY_IDS = ["neox", "interleaved", "partial_neox", "partial_interleaved", "unrotated"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(head_size, rotary_dim, is_neox, **switches):
    rotary = None
    if rotary_dim is not None:
        rotary = rotary_table(rotary_dim, is_neox, max(FAR) + 1, CPU, torch.float32)
    return random_transforms(NUM_KV_HEADS, head_size, CPU, rotary, offset=5.0, equalization=True, **switches)


def rotate(x, positions, rotary):
    """RoPE in fp64 of x [num_tokens, heads, head_size], pair by pair as the papers write it."""
    x, out = x.double(), x.double().clone()
    half = rotary.rotary_dim // 2
    for pair in range(half):
        first, second = (pair, pair + half) if rotary.is_neox else (2 * pair, 2 * pair + 1)
        cos, sin = (rotary.cos_sin[positions, column].double()[:, None] for column in (pair, half + pair))
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128, 192, 256])
def test_hadamard_is_orthonormal_and_its_own_inverse(head_size):
    matrix = hadamard(head_size, dtype=torch.float64)
    block = head_size & -head_size
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(head_size, dtype=torch.float64), rtol=0, atol=1e-12)
    inside = torch.block_diag(*[torch.ones(block, block)] * (head_size // block)).bool()
    assert (matrix[inside].abs() == 1 / math.sqrt(block)).all()
    assert not matrix[~inside].any()


@pytest.mark.quick(1)
@pytest.mark.parametrize(("head_size", "rotary_dim", "is_neox"), ROTARIES, ids=ROTARY_IDS)
def test_the_rotated_offset_is_rope_of_the_offset(head_size, rotary_dim, is_neox):
    transforms = make(head_size, rotary_dim, is_neox)
    positions = torch.tensor(FAR)
    want = transforms.key_offset.double().expand(len(FAR), -1, -1)
    if transforms.rotary is not None:
        want = rotate(want, positions, transforms.rotary)
    torch.testing.assert_close(rotated_offset(transforms, positions).double(), want, rtol=0, atol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("hadamard_too", [False, True])
@pytest.mark.parametrize(("head_size", "rotary_dim", "is_neox"), ROTARIES, ids=ROTARY_IDS)
def test_restored_keys_are_the_keys(head_size, rotary_dim, is_neox, hadamard_too):
    transforms = make(head_size, rotary_dim, is_neox, key_hadamard=hadamard_too)
    key, positions = torch.randn(len(FAR), NUM_KV_HEADS, head_size), torch.tensor(FAR)
    stored = transform_keys(key, positions, transforms)
    assert (stored - key).abs().max() > 1, "the transforms do something"
    torch.testing.assert_close(restore_keys(stored, positions, transforms), key, rtol=0, atol=2e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("hadamard_too", [False, True])
@pytest.mark.parametrize(("head_size", "rotary_dim", "is_neox"), ROTARIES, ids=ROTARY_IDS)
def test_logits_survive_folding(head_size, rotary_dim, is_neox, hadamard_too):
    """q . K_t = fold(q) . K'_t + q . R_t m, at positions far from any other."""
    transforms = make(head_size, rotary_dim, is_neox, key_hadamard=hadamard_too)
    key, positions = torch.randn(len(FAR), NUM_KV_HEADS, head_size), torch.tensor(FAR)
    query = torch.randn(4, NUM_KV_HEADS * GROUP, head_size)
    folded = fold_query(query, transforms, NUM_KV_HEADS).view(4, NUM_KV_HEADS, GROUP, head_size)
    plain = query.view(4, NUM_KV_HEADS, GROUP, head_size)
    got = torch.einsum("nkgd,tkd->nkgt", folded, transform_keys(key, positions, transforms))
    got += torch.einsum("nkgd,tkd->nkgt", plain, rotated_offset(transforms, positions))
    want = torch.einsum("nkgd,tkd->nkgt", plain.double(), key.double())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4)


def test_equalization_equal_within_pairs_commutes_with_rope():
    """Why a factor per pair can be divided out of keys after RoPE: the offset before RoPE may be divided too."""
    transforms = make(64, 64, True)
    positions = torch.tensor(FAR)
    factors = transforms.key_equalization.double()
    x = torch.randn(len(FAR), NUM_KV_HEADS, 64, dtype=torch.float64)
    torch.testing.assert_close(
        rotate(x, positions, transforms.rotary) / factors, rotate(x / factors, positions, transforms.rotary)
    )


@pytest.mark.parametrize("head_size", [64, 96])
def test_rotated_values_come_back(head_size):
    transforms = LayerTransforms(value_hadamard=True)
    value = torch.randn(3, NUM_KV_HEADS, head_size)
    rotated = rotate_values(value, transforms)
    assert (rotated - value).abs().max() > 0.5
    torch.testing.assert_close(rotate_values(rotated, transforms), value, rtol=0, atol=1e-6)
    assert torch.equal(rotate_values(value, LayerTransforms()), value)
