"""The key offset of a model's own weights, from layers such as vLLM's."""

import re

import pytest
import torch
from vllm import distributed
from vllm.model_executor.layers.linear import ColumnParallelLinear

from tests.helpers.projections import HEAD_SIZE, HEADS, KV_HEADS, beside, fused, projection
from vllm_kvtuner.engine.key_bias import PAIRS_STEP, key_bias, largest_pairs
from vllm_kvtuner.pages.transforms import RotaryTable


def bias_of(parent, num_kv_heads=KV_HEADS):
    return key_bias(parent, num_kv_heads, HEAD_SIZE, torch.float32)


QKV = torch.arange((HEADS + 2 * KV_HEADS) * HEAD_SIZE, dtype=torch.float32)


def test_the_keys_part_of_a_fused_projection_as_it_is_added():
    first = HEADS * HEAD_SIZE
    expected = QKV[first : first + KV_HEADS * HEAD_SIZE].view(KV_HEADS, HEAD_SIZE)
    assert torch.equal(bias_of(beside(qkv_proj=fused(QKV), o_proj=torch.nn.Linear(4, 4))), expected)


def test_the_projection_beneath_an_adapter():
    wrapper = beside(base_layer=fused(QKV))
    assert torch.equal(bias_of(beside(qkv_proj=wrapper)), bias_of(beside(qkv_proj=fused(QKV))))


def test_a_projection_of_keys_alone():
    bias = torch.randn(KV_HEADS * HEAD_SIZE)
    alone = projection(ColumnParallelLinear, bias.numel(), bias)
    parent = beside(q_proj=projection(ColumnParallelLinear, 32, torch.randn(32)), k_proj=alone)
    assert torch.equal(bias_of(parent), bias.view(KV_HEADS, HEAD_SIZE))


def test_no_bias_is_no_offset_even_beside_a_norm():
    assert bias_of(beside(qkv_proj=fused(None), k_norm=torch.nn.Identity())) is None


@pytest.mark.parametrize(
    ("children", "problem"),
    [
        ({"o_proj": torch.nn.Identity()}, "one k projection beside the attention layer, but the model's Module has 0"),
        ({"qkv_proj": fused(QKV), "k_norm": torch.nn.Identity()}, "the model's Module normalizes them (k_norm)"),
        ({"qkv_proj": fused(QKV), "key_layernorm": torch.nn.Identity()}, "normalizes them (key_layernorm)"),
    ],
)
def test_keys_that_are_not_the_projections(children, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        bias_of(beside(**children))


def test_other_heads_than_the_attention_layers():
    with pytest.raises(ValueError, match="a k projection of 4 heads of 8, but the model's Module has another"):
        bias_of(beside(qkv_proj=fused(QKV)), num_kv_heads=4)


@pytest.fixture
def ranks(monkeypatch):
    """This process is one rank, or one of several whose offsets are given."""

    def make(*others):
        monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: 1 + len(others))
        monkeypatch.setattr(
            distributed,
            "tensor_model_parallel_all_reduce",
            lambda energy: energy + sum(other.square().sum(0) for other in others),
        )

    make()
    return make


def rotary(is_neox=True, rotary_dim=HEAD_SIZE):
    return RotaryTable(torch.zeros(4, rotary_dim), is_neox)


@pytest.mark.parametrize(("is_neox", "pair"), [(True, [1, 5]), (False, [4, 5])])
def test_the_largest_pairs_are_kept(ranks, is_neox, pair):
    offset = torch.full((KV_HEADS, HEAD_SIZE), 0.1)
    offset[1, 5] = -9.0
    kept, count = largest_pairs(offset, rotary(is_neox), step=1)
    assert count == 1
    assert kept.abs().amax(0).nonzero()[:, 0].tolist() == pair
    assert torch.equal(kept[:, pair], offset[:, pair])


@pytest.mark.parametrize(("rest", "count"), [(2.1, 0), (1.9, 1), (1.5, 2), (1.1, 3), (0.9, 4)])
def test_as_few_pairs_as_leave_little(ranks, rest, count):
    """Pairs of equal numbers: 0 to 4 of them leave a root mean square of 2, 3 ** .5, 2 ** .5, 1 and 0."""
    offset = torch.full((KV_HEADS, HEAD_SIZE), 2.0)
    kept, got = largest_pairs(offset, rotary(), rest, step=1)
    assert got == count
    assert (0 if kept is None else int(kept[0].count_nonzero())) == 2 * count


def test_pairs_come_in_steps(ranks):
    offset = torch.full((1, 64), 0.1)
    offset[0, 3] = 9.0
    assert largest_pairs(offset, rotary(rotary_dim=64))[1] == PAIRS_STEP


def test_what_is_not_rotated_is_kept(ranks):
    offset = torch.full((KV_HEADS, HEAD_SIZE), 0.1)
    kept, count = largest_pairs(offset, rotary(rotary_dim=4))
    assert count == 0
    assert torch.equal(kept[:, 4:], offset[:, 4:])
    assert not kept[:, :4].any()
    assert largest_pairs(offset, None)[0] is offset


def test_a_rank_keeps_the_pairs_that_are_largest_over_all_ranks(ranks):
    """Pages may be read by engines of other numbers of ranks."""
    offset, other = torch.zeros(2, 1, HEAD_SIZE)
    offset[0, 0], offset[0, 1], other[0, 1] = 0.5, 0.1, 3.0
    ranks(other)
    kept, count = largest_pairs(offset, rotary(), step=1)
    assert (kept[0, 0].item(), kept[0, 1].item(), count) == (0.0, pytest.approx(0.1), 1)
    ranks()
    whole, count_of_one = largest_pairs(torch.cat([offset, other]), rotary(), step=1)
    assert torch.equal(whole[:1], kept)
    assert count_of_one == count


@pytest.mark.parametrize("size", [0.0, 0.1])
def test_a_small_bias_is_no_offset(ranks, size):
    assert largest_pairs(torch.full((KV_HEADS, HEAD_SIZE), size), rotary()) == (None, 0)


def test_a_bias_that_is_not_finite(ranks):
    with pytest.raises(ValueError, match="finite"):
        largest_pairs(torch.full((KV_HEADS, HEAD_SIZE), torch.inf), rotary())
