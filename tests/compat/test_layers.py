"""The name that vLLM finds our backends by. Which layer has which is tests/serving's."""

import copy
import pickle

import pytest
from vllm.config import CacheConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvtuner.attention.backend import KVTunerBackend, backend_for
from vllm_kvtuner.attention.window_cache import RecentBackend
from vllm_kvtuner.compat.layers import _leave_to_vllm
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.plugin import register


class OtherPluginsBackend(KVTunerBackend):
    """What another plugin puts under the name that vLLM leaves to plugins."""


@pytest.fixture(autouse=True)
def plugin_loaded():
    register()


@pytest.mark.parametrize("backend", [backend_for(PrecisionPair(8, 4)), RecentBackend])
def test_vllm_finds_our_backends_by_their_name(backend):
    found = AttentionBackendEnum[backend.get_name()]
    assert found.get_class() is KVTunerBackend
    assert found is not AttentionBackendEnum.CUSTOM


def test_the_name_travels_to_other_processes():
    name = AttentionBackendEnum[KVTunerBackend.get_name()]
    assert pickle.loads(pickle.dumps(name)) is name
    assert copy.deepcopy(name) is name


def test_another_plugin_can_have_custom(monkeypatch):
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", dict(registry._ATTN_OVERRIDES))
    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    registry.register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.OtherPluginsBackend")
    assert AttentionBackendEnum.CUSTOM.get_path() == f"{__name__}.OtherPluginsBackend"
    assert AttentionBackendEnum[KVTunerBackend.get_name()].get_class() is KVTunerBackend


def test_a_layer_in_vllms_own_cache_does_not_hear_of_the_checkpoints_scheme():
    """vLLM would take a dtype of "auto" for the scheme's. Its scales are loaded as it lays them out."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False, "symmetric": True}
    config = CompressedTensorsConfig.from_config(
        {"format": "dense", "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme}
    )
    given = {"quant_config": config, "cache_config": CacheConfig(cache_dtype="fp8")}
    kwargs = dict(given)
    _leave_to_vllm(kwargs)
    assert kwargs["quant_config"].kv_cache_scheme is None
    assert kwargs["quant_config"].get_quant_method.__self__ is config
    assert kwargs["cache_config"].cache_dtype == "auto"
    assert config.kv_cache_scheme is not None and given["cache_config"].cache_dtype == "fp8", "others' layers have them"
