"""Random weights: the same for the same name, and of the sizes that the parameters' kinds want."""

import pytest
import torch

from kvtuner_tools.architectures.weights import ATTENTION_BIAS_STD, GAIN, fill


def filled(name, *shape):
    values = torch.full(shape, float("nan"))
    fill(name, values)
    return values


def test_the_same_name_gives_the_same_numbers():
    first, second, other = (filled(name, 4, 8) for name in ("a.weight", "a.weight", "b.weight"))
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "shape", "low", "high"),
    [
        ("layers.0.input_layernorm.weight", (1000,), 0.5, 1.5),
        ("layers.0.mixer.A", (1000,), -1.5, -0.5),
        ("layers.0.self_attn.sinks", (1000,), 2.0, 6.0),
        ("layers.0.scale", (1,), 1.0, 1.0),
    ],
)
def test_bounds(name, shape, low, high):
    values = filled(name, *shape)
    assert low <= values.min() and values.max() <= high


@pytest.mark.parametrize(
    ("name", "shape", "std"),
    [
        ("layers.0.mlp.gate.weight", (100, 400), GAIN / 20),
        ("layers.0.experts.w2", (4, 100, 400), GAIN / 20),
        ("layers.0.self_attn.qkv_proj.bias", (10000,), ATTENTION_BIAS_STD),
    ],
)
def test_spread(name, shape, std):
    assert filled(name, *shape).std() == pytest.approx(std, rel=0.05)
