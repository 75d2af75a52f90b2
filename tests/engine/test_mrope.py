"""Which of a token's positions turns a rotary pair, asked of vLLM's own embeddings, and what M-RoPE is refused with."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope_interleaved import MRotaryEmbeddingInterleaved

from vllm_kvtuner.engine.mrope import MRope, unserved_positions
from vllm_kvtuner.engine.statics import rotary_table
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms, rotated_offset
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.profile import FROM_WEIGHTS, Profile, TransformSettings

HEAD_SIZE = 64
MAX_POSITION = 512
EMBEDDINGS = {
    "Qwen2-VL": (MRotaryEmbedding, {"mrope_section": [8, 12, 12]}),
    "Qwen3-VL": (MRotaryEmbedding, {"mrope_section": [12, 10, 10], "mrope_interleaved": True}),
    "partial": (MRotaryEmbedding, {"mrope_section": [4, 6, 6], "rotary_dim": 32}),
    "GLM-4V": (MRotaryEmbedding, {"mrope_section": [8, 12, 12], "is_neox_style": False}),
    "four positions": (MRotaryEmbedding, {"mrope_section": [8, 8, 8, 8]}),
    "YaRN": (MRotaryEmbedding, {"mrope_section": [8, 12, 12], "scaling_factor": 4.0}),
    "Ernie 4.5 VL": (Ernie4_5_VLRotaryEmbedding, {"mrope_section": [12, 12, 8]}),
    "Pangu VL": (MRotaryEmbeddingInterleaved, {"mrope_section": [12, 10, 10]}),
}
CONFIG = SimpleNamespace(
    model_config=SimpleNamespace(
        dtype=torch.float32, max_model_len=256, hf_text_config=SimpleNamespace(max_position_embeddings=384)
    )
)


def embedding(name):
    kind, options = EMBEDDINGS[name]
    options = {"rotary_dim": HEAD_SIZE, "is_neox_style": True, **options}
    with set_current_vllm_config(VllmConfig()):
        return kind(HEAD_SIZE, max_position_embeddings=MAX_POSITION, base=1e4, dtype=torch.float32, **options)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_offset_turns_as_the_model_turns_keys(name):
    module = embedding(name)
    num_axes = max(3, len(module.mrope_section))
    positions = torch.randint(module.cos_sin_cache.shape[0], (num_axes, 10))
    mrope = MRope(torch.zeros(num_axes, 11, dtype=torch.int64))
    table = rotary_table(module, CONFIG, 0, mrope)
    assert table.positions.step is mrope.step and rotary_table(module, CONFIG, 1, mrope) is table
    offset = torch.randn(1, HEAD_SIZE)
    got = rotated_offset(LayerTransforms(key_offset=offset, rotary=table), positions)[:, 0]
    key = offset.expand(10, -1).contiguous()
    torch.testing.assert_close(got, module(positions, key.clone(), key)[1], rtol=0, atol=1e-5)


def test_text_alone_turns_by_places():
    """In an engine without images, and only so far as its requests reach; all kernels turn such a table on."""
    table = rotary_table(embedding("Qwen2-VL"), CONFIG, 0)
    assert table.positions is None and table.frequencies is not None and table.cos_sin.shape[0] == 384


def test_embeddings_that_turn_otherwise_are_refused():
    class Other(MRotaryEmbedding):
        def forward(self, positions, query, key=None):
            return super().forward(positions + 1, query, key)

    EMBEDDINGS["other"] = (Other, {"mrope_section": [8, 12, 12]})
    try:
        module = embedding("other")
    finally:
        del EMBEDDINGS["other"]
    with pytest.raises(ValueError, match=r"layer 3: key_offset needs rotary pairs .* but the model's Other turns them"):
        rotary_table(module, CONFIG, 3, MRope(torch.zeros(3, 11, dtype=torch.int64)))


def config(mrope=True, images=True, connector=None, microbatches=False):
    return SimpleNamespace(
        model_config=SimpleNamespace(uses_mrope=mrope, supports_multimodal_inputs=images, model="toy"),
        kv_transfer_config=connector and SimpleNamespace(kv_connector=connector),
        parallel_config=SimpleNamespace(use_ubatching=microbatches),
    )


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_positions_are_the_model_runners_own(runner):
    step = torch.zeros(3, 9)
    found = SimpleNamespace(mrope_positions=SimpleNamespace(gpu=step))
    if runner == "V2":
        found = SimpleNamespace(model_state=SimpleNamespace(rope_state=SimpleNamespace(positions=step)))
    assert MRope.of(found, config()).step is step
    assert MRope.of(found, config(images=False)) is None
    assert MRope.of(found, config(mrope=False)) is None


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"connector": "NixlConnector", "microbatches": True}, ["NixlConnector for toy", "use_ubatching=True for toy"]),
        ({"connector": "NixlConnector", "images": False}, []),
        ({"connector": "NixlConnector", "mrope": False}, []),
        ({}, []),
    ],
    ids=["positions that would stay behind", "text alone", "one position", "neither"],
)
def test_what_does_not_bring_positions_along_is_refused(options, got):
    shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 2)
    profile = Profile("p", None, PrecisionPair(4, 4), transforms=TransformSettings(key_offset=FROM_WEIGHTS))
    problems = unserved_positions(config(**options), profile.resolve(shape))
    assert [line.rpartition(", but got ")[2] for line in problems] == got
    without = Profile("p", None, PrecisionPair(4, 4)).resolve(shape)
    assert unserved_positions(config(**options), without) == ()
