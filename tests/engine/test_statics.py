"""Which tensors and which rotary table a layer is given."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from vllm_kvtuner.engine.statics import _feedback, _heads_of_rank, layer_rotary, rotary_table
from vllm_kvtuner.profile.statics import FeedbackStatics


@pytest.mark.parametrize(
    ("total", "local", "world_size", "expected"),
    [
        pytest.param(8, 8, 1, [(0, 8)], id="one rank"),
        pytest.param(8, 2, 4, [(0, 2), (2, 4), (4, 6), (6, 8)], id="two heads a rank"),
        pytest.param(2, 1, 4, [(0, 1), (0, 1), (1, 2), (1, 2)], id="each head on two ranks"),
    ],
)
def test_a_rank_takes_the_statics_of_its_own_heads(total, local, world_size, expected):
    slices = [_heads_of_rank(total, local, rank, world_size) for rank in range(world_size)]
    assert [(part.start, part.stop) for part in slices] == expected
    assert all(np.arange(total)[part].size == local for part in slices)


def test_a_rank_takes_the_feedback_of_its_own_heads():
    factors = np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float16)
    static = FeedbackStatics(factors, {2: (0.8, 1.0)}, ())
    feedback = _feedback(static, slice(1, 3), torch.device("cpu"))
    assert feedback.factors.dtype == torch.float16
    assert torch.equal(feedback.factors, torch.from_numpy(factors[1:3]))
    assert feedback.ranges == {2: (0.8, 1.0)}
    assert _feedback(None, slice(0, 4), torch.device("cpu")) is None


class _Rotary(torch.nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)


class _Config:
    class model_config:
        dtype = torch.bfloat16

        class hf_text_config:
            rope_parameters: ClassVar = {"rope_type": "default"}


def test_the_rotary_table_is_the_models_own():
    table = torch.randn(32, 16)
    rotary = rotary_table(_Rotary(cos_sin_cache=table, is_neox_style=False), _Config, 0)
    assert torch.equal(rotary.cos_sin, table.bfloat16())
    assert not rotary.is_neox


@pytest.mark.parametrize(("use_long", "rows"), [(False, slice(0, 8)), (True, slice(8, 32))])
def test_phi3_takes_the_table_of_the_context_in_use(use_long, rows):
    table = torch.randn(32, 16)
    module = _Rotary(long_short_cos_sin_cache=table, original_max_position_embeddings=8, use_long_rope=use_long)
    assert torch.equal(rotary_table(module, _Config, 0).cos_sin, table[rows].bfloat16())


def test_a_layer_without_rope_has_no_table():
    assert rotary_table(None, _Config, 0) is None


def test_a_rotary_embedding_kept_elsewhere_is_not_taken_for_none():
    assert layer_rotary(_Rotary(rotary_emb=None), _Config, 0) is None
    with pytest.raises(ValueError, match="layer 3: key_offset needs the rotary embedding beside the attention layer"):
        layer_rotary(_Rotary(), _Config, 3)


@pytest.mark.parametrize(
    "attributes",
    [
        pytest.param({}, id="no table"),
        pytest.param({"cos_sin_cache": torch.zeros(4, 4, dtype=torch.complex64)}, id="complex table"),
    ],
)
def test_rotary_embeddings_without_one_row_per_position_are_refused(attributes):
    with pytest.raises(ValueError, match="layer 3: key_offset needs"):
        rotary_table(_Rotary(**attributes), _Config, 3)
