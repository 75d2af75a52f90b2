"""What queries are expected to read of keys, from layers such as vLLM's, and the feedback that follows."""

import math
from types import SimpleNamespace

import pytest
import torch
from vllm import distributed
from vllm.model_executor.layers.linear import ColumnParallelLinear

from tests.helpers.projections import HEAD_SIZE, HEADS, HIDDEN, KV_HEADS, beside, fused, projection
from vllm_kvtuner.engine import query_energy
from vllm_kvtuner.engine.query_energy import DAMPING, QueryHeads, input_norm, key_feedback, over_ranks
from vllm_kvtuner.pages.codes import UniformCodes
from vllm_kvtuner.pages.transforms import RotaryTable, hadamard

GROUP = HEADS // KV_HEADS
QKV = torch.arange((HEADS + 2 * KV_HEADS) * HEAD_SIZE, dtype=torch.float32) / 10
TOLERANCE = 1e-4
"""Relative: outputs of fp32 projections, their bias taken off."""


class Norm(torch.nn.Module):
    """RMS norm whose gains are kept as Gemma keeps them."""

    def __init__(self, gains):
        super().__init__()
        self.weight = torch.nn.Parameter(gains - 1)

    def forward(self, rows):
        return rows * (rows.square().mean(-1, keepdim=True) + 1e-12).rsqrt() * (1 + self.weight)


def heads(num_heads=HEADS, num_kv_heads=KV_HEADS):
    return QueryHeads(num_heads, num_kv_heads, HEAD_SIZE, torch.float32, torch.device("cpu"))


def energy_of(parent, norm=None, of=None):
    return query_energy.query_energy(parent, norm, of or heads())


def plain_energy(weight, bias, gains, head_gains=None):
    """The sums of the module's docstring, one by one."""
    energy, weight = torch.zeros(KV_HEADS, HEAD_SIZE, dtype=torch.float64), weight.detach()
    for head in range(HEADS):
        own = []
        for channel in range(HEAD_SIZE):
            row = head * HEAD_SIZE + channel
            own.append(
                sum(float(weight[row, x] * gains[x]) ** 2 for x in range(HIDDEN)) + float(bias.detach()[row]) ** 2
            )
        if head_gains is not None:
            mean = sum(own) / HEAD_SIZE
            own = [float(head_gains[channel]) ** 2 * each / mean for channel, each in enumerate(own)]
        energy[head // GROUP] += torch.tensor(own, dtype=torch.float64)
    return energy


@pytest.mark.parametrize("bias", [None, QKV], ids=["no bias", "bias"])
@pytest.mark.parametrize("rows_at_once", [5, 1024])
def test_energy_is_that_of_a_plain_loop(monkeypatch, bias, rows_at_once):
    monkeypatch.setattr(query_energy, "ROWS_AT_ONCE", rows_at_once)
    layer, gains = fused(bias), torch.rand(HIDDEN) + 0.1
    wanted = plain_energy(layer.weight, torch.zeros_like(QKV) if bias is None else bias, gains)
    energy = energy_of(beside(qkv_proj=layer), Norm(gains))
    torch.testing.assert_close(energy.double(), wanted, rtol=TOLERANCE, atol=0)


def test_gains_count_as_1_where_no_norm_is_known():
    layer = fused(QKV)
    wanted = plain_energy(layer.weight, QKV, torch.ones(HIDDEN))
    torch.testing.assert_close(energy_of(beside(qkv_proj=layer)).double(), wanted, rtol=TOLERANCE, atol=0)


def test_a_norm_of_each_head_fixes_its_energy():
    layer, gains = fused(None), torch.rand(HEAD_SIZE) + 0.1
    energy = energy_of(beside(qkv_proj=layer, q_norm=Norm(gains), k_norm=Norm(gains)))
    wanted = plain_energy(layer.weight, torch.zeros_like(QKV), torch.ones(HIDDEN), gains)
    torch.testing.assert_close(energy.double(), wanted, rtol=TOLERANCE, atol=0)


def test_a_projection_of_queries_alone():
    layer = projection(ColumnParallelLinear, HEADS * HEAD_SIZE, torch.randn(HEADS * HEAD_SIZE))
    parent = beside(q_proj=layer, k_proj=projection(ColumnParallelLinear, KV_HEADS * HEAD_SIZE, None))
    wanted = plain_energy(layer.weight, layer.bias.flip(0), torch.ones(HIDDEN))
    torch.testing.assert_close(energy_of(parent).double(), wanted, rtol=TOLERANCE, atol=0)


def test_the_projection_beneath_an_adapter():
    layer = fused(QKV)
    assert torch.equal(energy_of(beside(qkv_proj=beside(base_layer=layer))), energy_of(beside(qkv_proj=layer)))


@pytest.mark.parametrize(
    ("children", "problem"),
    [
        ({}, "one q projection beside the attention layer, but the model's Module has 0"),
        ({"qkv_proj": fused(QKV), "q_norm": Norm(torch.ones(HEADS * HEAD_SIZE))}, "normalizes them otherwise .q_norm."),
        ({"qkv_proj": fused(QKV), "qk_norm": torch.nn.Identity()}, "normalizes them otherwise .qk_norm."),
        ({"q_proj": projection(ColumnParallelLinear, 8, None)}, "a q projection of 4 heads of 8, but the model's"),
    ],
)
def test_queries_that_weights_do_not_tell(children, problem):
    with pytest.raises(ValueError, match=problem):
        energy_of(beside(**children))


def test_gated_queries_are_no_queries_alone():
    """Qwen3-Next's projection gives a gate beside every query head."""
    with pytest.raises(ValueError, match="a q projection of 2 heads of 8"):
        energy_of(beside(qkv_proj=fused(QKV)), of=heads(2, 2))


def test_the_norm_of_a_decoder_layer():
    norm = Norm(torch.ones(HIDDEN))
    assert input_norm(beside(input_layernorm=norm, self_attn=fused(None)), HIDDEN) is norm
    assert input_norm(beside(input_layernorm=norm), 2 * HIDDEN) is None  # of something else
    assert input_norm(beside(post_attention_layernorm=norm), HIDDEN) is None
    assert input_norm(None, HIDDEN) is None


@pytest.mark.parametrize("num_kv_heads", [2, 1], ids=["split", "replicated"])
def test_two_ranks_have_what_one_has(monkeypatch, num_kv_heads):
    """By hand: each rank's query heads are half of all, and its KV heads half, or the one that both have."""
    layer = fused(None)
    weight = layer.weight[: HEADS * HEAD_SIZE]
    alone = projection(ColumnParallelLinear, HEADS * HEAD_SIZE, None)
    alone.weight = torch.nn.Parameter(weight.clone())
    whole = energy_of(beside(q_proj=alone), of=heads(HEADS, num_kv_heads))
    parts, own = [], []
    for rank, rows in enumerate(weight.chunk(2)):
        half = projection(ColumnParallelLinear, len(rows), None)
        half.weight = torch.nn.Parameter(rows.clone())
        parts.append(energy_of(beside(q_proj=half), of=heads(HEADS // 2, 1)))
        own.append(slice(rank, rank + 1) if num_kv_heads == 2 else slice(0, 1))

    def placed(rank):
        given = torch.zeros(num_kv_heads, HEAD_SIZE)
        given[own[rank]] = parts[rank]
        return given

    for rank in range(2):
        monkeypatch.setattr(distributed, "tensor_model_parallel_all_reduce", lambda mine, r=rank: mine + placed(1 - r))
        torch.testing.assert_close(over_ranks(parts[rank], own[rank], num_kv_heads), whole[own[rank]])


def test_energy_that_is_not_finite_is_refused_by_all_ranks(monkeypatch):
    """The one whose own weights are well too, since the next sum over ranks would wait for those that stopped."""
    broken = energy_of(beside(qkv_proj=fused(QKV * math.inf)))
    whole = torch.cat([broken, torch.ones_like(broken)])
    monkeypatch.setattr(distributed, "tensor_model_parallel_all_reduce", lambda mine: whole)
    count = len(broken)
    for rank in range(2):
        own = slice(rank * count, (rank + 1) * count)
        with pytest.raises(ValueError, match="finite numbers, but the q projection gives others"):
            over_ranks(whole[own], own, 2 * count)


def rope(rotary_dim, is_neox):
    return RotaryTable(torch.zeros(0, rotary_dim), is_neox)


@pytest.mark.parametrize(("rotary_dim", "is_neox"), [(8, True), (8, False), (4, True)])
@pytest.mark.parametrize("equalization", [None, torch.linspace(0.5, 2, 16).view(2, 8)])
def test_feedback_weighs_errors_by_the_mean_energy_over_positions(rotary_dim, is_neox, equalization):
    energy, rotary = torch.rand(KV_HEADS, HEAD_SIZE), rope(rotary_dim, is_neox)
    feedback = key_feedback(energy, rotary, equalization)
    packed = torch.randn(5, KV_HEADS, HEAD_SIZE)
    # What the way back from a page makes of an error, in the frame after RoPE.
    errors = packed @ hadamard(HEAD_SIZE) * (1.0 if equalization is None else equalization)
    mean = energy.clone()
    for one, other in zip(*rotary.pairs(), strict=True):
        mean[:, one] = mean[:, other] = (energy[:, one] + energy[:, other]) / 2
    mean += DAMPING * mean.mean(-1, keepdim=True)
    wanted = (mean * errors.square()).sum(-1)
    ratio = feedback.weighted_error(packed) / wanted  # but for a factor of the head
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=0.02, atol=0)  # of fp16 factors


def test_feedback_is_less_error_where_queries_read():
    torch.manual_seed(0)
    energy = torch.tensor([[8.0, 4, 0.1, 0.1] * 16]).repeat(KV_HEADS, 1)
    feedback = key_feedback(energy, RotaryTable(torch.zeros(0, 64), True), None)
    rows = torch.randn(400, KV_HEADS, 64)
    packed = rows @ hadamard(64)

    def error(**how):
        errors = (UniformCodes(4).round_trip(packed, **how) - packed) @ hadamard(64)
        return float((energy * errors.square()).mean())

    assert error(feedback=feedback) < 0.6 * error(range_search=True)


def test_what_nobody_reads_is_rounded_to_the_nearest():
    feedback = key_feedback(torch.zeros(KV_HEADS, HEAD_SIZE), rope(8, True), None)
    assert torch.equal(feedback.factors.float(), torch.eye(HEAD_SIZE).expand(KV_HEADS, -1, -1))


def test_a_layer_whose_weights_do_not_tell_is_refused_or_left_out(caplog):
    from vllm_kvtuner.engine.modules import Modules
    from vllm_kvtuner.engine.query_feedback import Feedbacks

    layer, parent = torch.nn.Module(), beside()
    parent.add_module("attn", layer)
    parent.rotary_emb = None
    layer.impl = SimpleNamespace(settings=SimpleNamespace(precision=SimpleNamespace(index=3)))
    config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=SimpleNamespace(), dtype=torch.float32))
    modules = Modules(beside(self_attn=parent))
    reason = "one q projection beside the attention layer, but the model's Module has 0"
    with pytest.raises(ValueError, match=f"layer 3: key_round_feedback needs {reason}"):
        Feedbacks(modules, config, adapts=False).of(layer, slice(0, 2), None)
    feedbacks = Feedbacks(modules, config, adapts=True)
    assert feedbacks.of(layer, slice(0, 2), None) is None
    with caplog.at_level("INFO", logger="vllm.kvtuner"):
        feedbacks.log()
    assert f"feedback of keys from weights, layers 3: none, since it needs {reason}" in caplog.text
