"""KV caches that checkpoints ask for: what is read of them, left out, and served as pairs."""

import json
from types import SimpleNamespace

import pytest

from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.checkpoint import checkpoint_scheme, without_scheme
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError

FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
LLM_COMPRESSOR = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FP8}
LAYERS = {
    "model.layers.0.self_attn": {"quant_algo": "FP8"},
    "model.layers.1.self_attn": {"quant_algo": "NVFP4"},
    "model.layers.3.self_attn": {"quant_algo": "FP8_K_NVFP4_V"},
}
MODELOPT = {
    "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "MIXED_PRECISION",
    "kv_cache_quantized_layers": LAYERS, "kv_cache_schema_version": 1,
}  # fmt: skip
OLDER_MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
SHAPE = ModelShape("m", "LlamaForCausalLM", (LayerShape(2, 64),) * 4)


def pairs_of(path):
    return [layer.pair.name for layer in load_profile(str(path)).resolve(SHAPE).layers]


def written(folder, config, name="config.json"):
    path = folder / name
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quantization_config": LLM_COMPRESSOR}, "kv_cache_scheme="),
        (SimpleNamespace(quantization_config=LLM_COMPRESSOR), "kv_cache_scheme="),
        (SimpleNamespace(compression_config=LLM_COMPRESSOR), "kv_cache_scheme="),
        (SimpleNamespace(text_config=SimpleNamespace(quantization_config=LLM_COMPRESSOR)), "kv_cache_scheme="),
        ({"quantization_config": MODELOPT}, "kv_cache_quantized_layers=of 3 layers"),
        ({"quantization_config": OLDER_MODELOPT}, "kv_cache_quant_algo='FP8'"),
        (OLDER_MODELOPT, "kv_cache_quant_algo='FP8'"),
    ],
)
def test_schemes_that_are_found(config, said):
    assert said in str(checkpoint_scheme(config))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {**LLM_COMPRESSOR, "kv_cache_scheme": None}},
        {"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": None}},
    ],
)
def test_checkpoints_that_ask_for_nothing(config):
    assert checkpoint_scheme(config) is None
    assert without_scheme(config) == {}


def test_overrides_leave_out_the_scheme_alone():
    plain = {**LLM_COMPRESSOR, "kv_cache_scheme": None}
    assert without_scheme({"quantization_config": LLM_COMPRESSOR}) == {"quantization_config": plain}
    assert without_scheme({"text_config": {"quantization_config": LLM_COMPRESSOR}}) == {
        "text_config": {"quantization_config": plain}
    }
    older = without_scheme({"quantization_config": OLDER_MODELOPT})["quantization_config"]
    assert older["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": None}
    assert checkpoint_scheme({"quantization_config": older}) is None


def test_modelopts_list_of_layers_is_a_profile(tmp_path):
    path = written(tmp_path, {"quantization_config": MODELOPT})
    assert pairs_of(path) == ["K8V8", "K4V4", "K16V16", "K8V4"]
    profile = load_profile(str(path))
    assert profile.adapts and profile.transforms.key_hadamard, "with all that needs no data"
    assert profile.source == path


@pytest.mark.parametrize(
    ("config", "name", "pair"),
    [
        ({"quantization_config": LLM_COMPRESSOR}, "config.json", "K8V8"),
        (OLDER_MODELOPT, "hf_quant_config.json", "K8V8"),
        ({"quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "nvfp4"}}, "config.json", "K4V4"),
    ],
)
def test_one_scheme_for_all_layers_is_a_profile(tmp_path, config, name, pair):
    assert pairs_of(written(tmp_path, config, name)) == [pair] * 4


def test_layers_beyond_the_model_are_refused(tmp_path):
    listed = {"model.layers.7.self_attn": {"quant_algo": "FP8"}}
    path = written(tmp_path, {"quantization_config": {**MODELOPT, "kv_cache_quantized_layers": listed}})
    with pytest.raises(ProfileError, match="layers must lie within the layers 0-3 of m, but got 7"):
        load_profile(str(path)).resolve(SHAPE)


def test_all_problems_of_a_list_at_once(tmp_path):
    listed = {
        "model.layers.0.self_attn": {"quant_algo": "FP3"},
        "model.layers.1.self_attn": {"quant_algo": "FP8"},
        "model.layers.1.cross_attn": {"quant_algo": "FP8"},
        "model.self_attn": {"quant_algo": "FP8"},
    }
    changed = {**MODELOPT, "kv_cache_quantized_layers": listed, "kv_cache_schema_version": 2}
    path = written(tmp_path, {"quantization_config": changed})
    with pytest.raises(ProfileError) as caught:
        load_profile(str(path))
    version, algorithm, twice, unnamed = caught.value.problems
    assert version == f"{path}: kv_cache_schema_version must be 1, but got 2"
    assert "kv_cache_quantized_layers.model.layers.0.self_attn must be one of FP8, " in algorithm
    assert "must name a layer once, but got layer 1 again" in twice
    assert "kv_cache_quantized_layers.model.self_attn must be the name of a layer with its number" in unnamed


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "the file must be JSON"),
        ("{}", "the file must ask for a KV cache"),
        (json.dumps({"quantization_config": {"kv_cache_scheme": {"num_bits": 3}}}), "num_bits must be 4 or 8"),
    ],
)
def test_files_that_are_no_profile(tmp_path, content, problem):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match=problem):
        load_profile(str(path))


def test_a_pair_for_other_layers_is_no_pair_of_the_named(tmp_path):
    profile = load_profile(str(written(tmp_path, {"quantization_config": MODELOPT})))
    assert profile.pair_of(0) == PrecisionPair(8, 8)
    assert profile.nominal_bits == (8 + 4 + 6) / 3
