"""Rotations by angles proportional to the position, and the key offset's logit turned on from token to token."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.helpers.decode_cases import linear_table, with_offset_pairs
from tests.helpers.paged_cache import random_transforms
from vllm_kvtuner.engine.statics import rotary_table
from vllm_kvtuner.pages.transforms import ANGLE_STEP, LayerTransforms, linear_rotary, rotated_offset

CPU = torch.device("cpu")
MAX_POSITION = 131_072
FAR = [0, 1, 15, 16, 17, 4_097, 99_999, MAX_POSITION - 1]
SCALINGS = {
    "plain": {"rope_type": "default", "rope_theta": 1e6},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 32_768,
    },
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def model_table(scaling, max_position=MAX_POSITION):
    """A model's table as it computes it, in fp32 throughout; and its frequencies and amplitude in fp64."""
    head_size = 64
    if scaling["rope_type"] == "default":
        exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        frequencies, amplitude = 1.0 / scaling["rope_theta"] ** exponent, 1.0
    else:
        config = LlamaConfig(
            head_dim=head_size, hidden_size=256, num_attention_heads=4, max_position_embeddings=max_position,
            rope_parameters=scaling,
        )  # fmt: skip
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, CPU)
    angles = torch.arange(max_position, dtype=torch.float32)[:, None] * frequencies.float()
    table = torch.cat([angles.cos(), angles.sin()], dim=-1) * amplitude
    return table, frequencies.double(), float(amplitude)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotations_are_proportional_to_the_position(name):
    table, frequencies, amplitude = model_table(SCALINGS[name])
    assert (amplitude > 1.1) == (name == "yarn")
    rotary = linear_rotary(table, False, CPU)
    assert rotary is not None
    assert not rotary.is_neox and rotary.cos_sin.dtype == torch.float32
    assert rotary.amplitude == pytest.approx(amplitude, rel=1e-6)
    # Angles of the first position in fp32 give frequencies to 1e-7 radians, 0.01 at the far end.
    torch.testing.assert_close(rotary.frequencies, frequencies, rtol=1e-6, atol=1e-7)
    angles = torch.tensor(FAR, dtype=torch.float64)[:, None] * rotary.frequencies
    exact = amplitude * torch.cat([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(rotary.cos_sin[FAR].double(), exact, rtol=0, atol=2e-7)
    assert (rotary.cos_sin - table).abs().max() < 0.03


@pytest.mark.slow
def test_a_table_in_the_models_dtype_is_taken_where_its_rounding_is_small():
    """Rounded to bf16, the second row's angles are too coarse to go by at far positions, but not at near ones."""
    table = model_table(SCALINGS["plain"], 8)[0].bfloat16().float()
    assert linear_rotary(table, True, CPU) is not None
    assert linear_rotary(model_table(SCALINGS["plain"])[0].bfloat16().float(), True, CPU) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda table: torch.cat([table[:4096], table[4096:].roll(1, 0)]), id="long part shifted"),
        pytest.param(lambda table: torch.cat([table[:-1], -table[-1:]]), id="last row differs"),
        pytest.param(lambda table: table[(torch.arange(len(table)) ** 0.99).long()], id="sublinear"),
        pytest.param(lambda table: torch.cat([table[:, 32:], table[:, :32]], dim=-1), id="sines first"),
        pytest.param(lambda table: table * torch.linspace(1, 1.1, len(table))[:, None], id="amplitude grows"),
        pytest.param(lambda table: torch.full_like(table, torch.nan), id="not a number"),
        pytest.param(lambda table: table[:1], id="one row"),
    ],
)
def test_other_rotations_are_rejected(change):
    table = model_table(SCALINGS["plain"], 8192)[0]
    assert linear_rotary(table, True, CPU) is not None
    assert linear_rotary(change(table), True, CPU) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_size", "rotary_dim", "is_neox", "count"),
    [(64, 64, True, 32), (64, 64, False, 8), (96, 48, True, 5), (64, 16, False, 1)],
    ids=["neox_all", "interleaved_8", "partial_5", "partial_interleaved_1"],
)
def test_the_offsets_logit_is_a_sum_over_pairs_of_angles_added_up(head_size, rotary_dim, is_neox, count):
    """In float64, at positions split into multiples of ANGLE_STEP and the rest, against rotated_offset's own."""
    rotary = linear_table(rotary_dim, is_neox, MAX_POSITION, CPU)
    transforms = with_offset_pairs(random_transforms(2, head_size, CPU, rotary, offset=5.0), count)
    offset = dataclasses.replace(transforms, key_offset=transforms.key_offset.clone())
    offset.key_offset[:, rotary_dim:] = 0  # moves all logits of a row alike
    pairs = offset.offset_pairs
    assert len(pairs.index) % 8 == 0 and 0 <= len(pairs.index) - count < 8

    positions = torch.tensor(FAR)
    coarse = rotary.coarse_angles[positions // ANGLE_STEP][:, pairs.index.long()].double()
    fine = rotary.fine_angles[positions % ANGLE_STEP][:, pairs.index.long()].double()
    cos = coarse[..., 0] * fine[..., 0] - coarse[..., 1] * fine[..., 1]
    sin = coarse[..., 1] * fine[..., 0] + coarse[..., 0] * fine[..., 1]
    query = torch.randn(2, head_size, dtype=torch.float64)
    first, second = query[:, (pairs.dims & 0xFFFF).long()], query[:, (pairs.dims >> 16).long()]
    numbers = pairs.numbers.double()
    along = first * numbers[..., 0] + second * numbers[..., 1]
    across = second * numbers[..., 0] - first * numbers[..., 1]
    got = torch.einsum("kp,tp->tk", along, cos) + torch.einsum("kp,tp->tk", across, sin)

    want = torch.einsum("kd,tkd->tk", query, rotated_offset(offset, positions).double())
    assert want.abs().max() > 2
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_reach_beyond_the_last_position(name):
    """A kernel turns whole runs of tokens on, those beyond a request included: 8 warps, of stages of 64 tokens."""
    rotary = linear_rotary(model_table(SCALINGS[name], 1000)[0], True, CPU)
    assert len(rotary.coarse_angles) > (1000 + 8 * 64 + 64) // ANGLE_STEP
    assert rotary.fine_angles.shape == (ANGLE_STEP, 32, 2)
    assert torch.equal(rotary.fine_angles[0], torch.tensor([1.0, 0.0]).expand(32, 2))
    torch.testing.assert_close(rotary.coarse_angles[0, :, 0], torch.full((32,), rotary.amplitude))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 32])
def test_offset_pairs_are_those_with_an_offset(count):
    transforms = with_offset_pairs(random_transforms(3, 64, CPU, linear_table(64, False, 9, CPU), offset=1.0), count)
    pairs = transforms.offset_pairs
    filled = -(-count // 8) * 8
    assert pairs.index.shape == pairs.dims.shape == (filled,) and pairs.numbers.shape == (3, filled, 2)
    assert pairs.index.dtype == pairs.dims.dtype == torch.int32
    assert not pairs.numbers[:, count:].any(), "filled up by pairs that add nothing"
    rebuilt = torch.zeros(3, 64)
    for side, dims in enumerate((pairs.dims & 0xFFFF, pairs.dims >> 16)):
        rebuilt[:, dims[:count].long()] = pairs.numbers[:, :count, side]
    assert torch.equal(rebuilt, transforms.key_offset)


def test_without_a_rotated_offset_there_are_no_pairs():
    assert LayerTransforms(rotary=linear_table(64, True, 9, CPU)).offset_pairs is None
    assert random_transforms(1, 64, CPU, offset=1.0).offset_pairs is None


class _Config:
    class model_config:
        dtype = torch.bfloat16


@pytest.fixture(scope="module")
def rope():
    """vLLM's rotary embeddings by their scaling, in the dtype of a bf16 model."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    def make(parameters, max_position):
        with set_current_vllm_config(VllmConfig()):
            return get_rope(
                64, max_position=max_position, is_neox_style=True, rope_parameters=parameters, dtype=torch.bfloat16
            )

    return make


@pytest.mark.quick(1)
@pytest.mark.parametrize(("name", "max_position"), [("plain", 40_000), ("llama3", 40_000), ("yarn", 32_768)])
def test_the_plugin_finds_vllms_rotations_proportional(rope, name, max_position):
    """From the table before it was rounded to the model's dtype, once for all layers that share the module."""
    module = rope(SCALINGS[name], max_position)
    rotary = rotary_table(module, _Config, 0)
    assert rotary.frequencies is not None and rotary.is_neox
    assert rotary.cos_sin.shape == module.cos_sin_cache.shape
    assert (rotary.cos_sin - module.cos_sin_cache).abs().max() < 0.03
    assert rotary_table(module, _Config, 1) is rotary


def test_the_plugin_takes_another_rotation_as_it_is():
    class Sublinear(torch.nn.Module):
        is_neox_style = False

        def __init__(self):
            super().__init__()
            self.cos_sin_cache = self._compute_cos_sin_cache().bfloat16()

        def _compute_cos_sin_cache(self):
            return model_table(SCALINGS["plain"], 4096)[0][(torch.arange(4096) ** 0.99).long()]

    module = Sublinear()
    rotary = rotary_table(module, _Config, 0)
    assert rotary.frequencies is None and not rotary.is_neox
    assert torch.equal(rotary.cos_sin, module.cos_sin_cache)


def test_the_plugin_takes_phi3s_table_as_it_is():
    """Its table is computed from arguments that differ between short and long contexts."""

    class Phi3(torch.nn.Module):
        original_max_position_embeddings, use_long_rope = 16, True

        def __init__(self):
            super().__init__()
            self.long_short_cos_sin_cache = torch.cat([self._compute_cos_sin_cache(rows, 1.0) for rows in (16, 32)])

        def _compute_cos_sin_cache(self, max_position, factor):
            return factor * model_table(SCALINGS["plain"], max_position)[0]

    module = Phi3()
    rotary = rotary_table(module, _Config, 0)
    assert rotary.frequencies is None
    assert torch.equal(rotary.cos_sin, module.long_short_cos_sin_cache[16:].bfloat16())
