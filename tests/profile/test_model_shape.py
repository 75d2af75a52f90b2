"""Model configs of many kinds, as their config.json files have them."""

from types import SimpleNamespace

import pytest

from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "hidden_size": 512,
    "num_key_value_heads": 2,
}


def shape_of(**changes):
    return ModelShape.from_hf_config({**LLAMA, **changes}, "m")


def test_grouped_query_attention():
    shape = shape_of()
    assert shape == ModelShape("m", "LlamaForCausalLM", (LayerShape(2, 64),) * 2)
    assert ModelShape.from_hf_config(SimpleNamespace(**LLAMA), "m") == shape


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({"num_key_value_heads": None}, LayerShape(8, 64)),
        ({"head_dim": 128}, LayerShape(2, 128)),
        ({"head_dim": 0}, LayerShape(2, 64)),
        ({"head_dim": None}, LayerShape(2, 64)),
        ({"model_type": "falcon", "multi_query": True, "num_kv_heads": 8, "alibi": False}, LayerShape(1, 64)),
        ({"model_type": "falcon", "new_decoder_architecture": True, "multi_query": True}, LayerShape(2, 64)),
        ({"model_type": "falcon", "multi_query": False}, LayerShape(8, 64)),
        ({"model_type": "gpt_bigcode", "num_key_value_heads": None}, LayerShape(1, 64)),
        ({"model_type": "dbrx", "num_key_value_heads": None, "attn_config": {"kv_n_heads": 4}}, LayerShape(4, 64)),
        ({"model_type": "qwen3", "head_dim": 128, "partial_rotary_factor": 0.5}, LayerShape(2, 128)),
    ],
)
def test_kv_heads_and_head_size(changes, layer):
    shape = shape_of(**changes)
    assert shape.layers == (layer, layer)
    assert shape.unsupported == ()


def test_older_spellings():
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 3, "n_head": 4, "n_embd": 256}
    assert ModelShape.from_hf_config(config, "m").layers == (LayerShape(4, 64),) * 3


def test_nested_text_config():
    text = {key: value for key, value in LLAMA.items() if key != "architectures"}
    for key in ("text_config", "llm_config", "language_config"):
        shape = ModelShape.from_hf_config({"architectures": ["ToyVL"], key: text}, "m")
        assert shape == ModelShape("m", "ToyVL", (LayerShape(2, 64),) * 2)
    thinker = {"architectures": ["Omni"], "thinker_config": {"text_config": text}}
    assert ModelShape.from_hf_config(thinker, "m").layers == (LayerShape(2, 64),) * 2


def test_mixed_sliding_window_is_served():
    shape = shape_of(model_type="gemma3_text", layer_types=["sliding_attention", "full_attention"], head_dim=256)
    assert shape.layers == (LayerShape(2, 256),) * 2
    assert shape.unsupported == ()


def test_layers_that_cache_nothing():
    for key, other in (("layer_types", "linear_attention"), ("layers_block_type", "mamba")):
        shape = shape_of(**{key: [other, "full_attention"]})
        assert shape.layers == (LayerShape(0, 0), LayerShape(2, 64))
        assert shape.attention_layers == (1,)
        assert shape.unsupported == ()


def test_per_layer_kv_heads():
    shape = shape_of(num_key_value_heads=[1, 4], head_dim=[64, 128])
    assert shape.layers == (LayerShape(1, 64), LayerShape(4, 128))


def test_per_layer_configs_of_transformers():
    layers = [
        SimpleNamespace(**LLAMA, head_dim=64),
        SimpleNamespace(**{**LLAMA, "num_key_value_heads": 1}, head_dim=256),
    ]
    config = SimpleNamespace(architectures=["Toy"], num_hidden_layers=2, per_layer_config=layers)
    assert ModelShape.from_hf_config(config, "m").layers == (LayerShape(2, 64), LayerShape(1, 256))


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({**LLAMA, "num_hidden_layers": None}, "num_hidden_layers"),
        ({"model_type": "x", "num_hidden_layers": 2, "hidden_size": 64}, "num_attention_heads"),
        ({**LLAMA, "attn_layer_period": 8}, "layer_types"),
        ({**LLAMA, "global_head_dim": 512}, "shape of every layer"),
    ],
)
def test_configs_that_do_not_give_the_shape(config, missing):
    with pytest.raises(ProfileError, match=f"m: config must give .*{missing}"):
        ModelShape.from_hf_config(config, "m")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 512}, "MLA is not served), but got kv_lora_rank=512"),
        ({"is_encoder_decoder": True}, "encoder-decoder models are not served"),
        ({"is_encoder_decoder": True, "num_attention_heads": None}, "encoder-decoder models are not served"),
        ({"cross_attention_layers": [1]}, "self-attention only, but got cross_attention_layers=[1]"),
        ({"head_dim": 192, "v_head_dim": 128}, "one head size, but got v_head_dim=128"),
        ({"param_sink_number": 128}, "no learned sink tokens (not served), but got param_sink_number=128"),
        ({"model_type": "bloom"}, "no ALiBi (not served), but got model_type='bloom'"),
        ({"model_type": "falcon", "alibi": True}, "but got alibi=True"),
        ({"model_type": "mpt", "attn_config": {"alibi": True}}, "but got attn_config.alibi=True"),
        ({"model_type": "mpt"}, "but got attn_config.alibi=True"),
        ({"model_type": "baichuan", "hidden_size": 5120, "num_attention_heads": 40}, "baichuan' with hidden_size=5120"),
        ({"position_embedding_type": "alibi"}, "but got position_embedding_type='alibi'"),
        ({"num_kv_shared_layers": 1}, "in every layer, but got num_kv_shared_layers=1"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "but got chunked_attention"),
        ({"model_type": "mamba2", "num_attention_heads": None}, "must have attention layers, but got none"),
        ({"layer_types": ["mamba", "mamba"]}, "must have attention layers, but got none"),
        ({"block_configs": [{}, {}]}, "but got block_configs"),
    ],
)
def test_kinds_not_served(changes, reason):
    shape = shape_of(**changes)
    assert len(shape.unsupported) == 1
    assert reason in shape.unsupported[0]
    with pytest.raises(ProfileError) as caught:
        load_profile("K8V4").resolve(shape)
    assert caught.value.problems == (f"K8V4: model m {shape.unsupported[0]}",)


def test_served_relatives_of_kinds_not_served():
    assert shape_of(model_type="falcon", alibi=False).unsupported == ()
    assert shape_of(model_type="mpt", attn_config={"alibi": False, "rope": True}).unsupported == ()
    assert shape_of(model_type="baichuan", hidden_size=4096, num_attention_heads=32).unsupported == ()
    assert shape_of(v_head_dim=64, head_dim=64).unsupported == ()
    assert shape_of(param_sink_number=0).unsupported == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt_oss"}, True),
        ({"model_type": "granite_swa"}, True),
        ({"model_type": "granite_swa", "attention_sinks": False}, False),
        ({"add_swa_attention_sink_bias": True, "add_full_attention_sink_bias": False}, True),
        ({"add_swa_attention_sink_bias": False}, False),
        ({}, False),
    ],
)
def test_models_with_attention_sinks_are_served(changes, expected):
    shape = shape_of(**changes)
    assert (shape.attention_sinks, shape.unsupported) == (expected, ())
