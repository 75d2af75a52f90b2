"""Settings of the KV cache as measurements name them."""

import pytest

from kvtuner_tools.cache_setting import CacheSetting, cache_bits, unquantized_keywords

VOCABULARY = 37


def test_settings() -> None:
    assert CacheSetting.parse("fp8") == CacheSetting("fp8")
    assert CacheSetting.parse("kvtuner:a:b.yaml") == CacheSetting("kvtuner", "a:b.yaml")
    assert CacheSetting.parse("kvtuner:K8V4").label == "kvtuner:K8V4"
    assert CacheSetting.parse("fp8@FLASHINFER") == CacheSetting("fp8", attention_backend="FLASHINFER")
    assert CacheSetting.parse("fp8@FLASHINFER").label == "fp8@FLASHINFER"
    assert CacheSetting.parse("kvtuner:a@b.yaml") == CacheSetting("kvtuner", "a@b.yaml")
    for text in ("kvtuner", "kvtuner:", "fp8:K8V4", "", "fp8@", "@FLASHINFER", "kvtuner@FLASHINFER:K8V4"):
        with pytest.raises(ValueError, match="a setting"):
            CacheSetting.parse(text)


def test_evaluation_makes_prefill_read_the_quantized_cache() -> None:
    """Without the override a prompt in one chunk would attend to fresh keys and every profile would look lossless."""
    assert CacheSetting("kvtuner", "K4V4").additional_config(attend_cached_prefill=True) == {
        "kvtuner_profile": "K4V4",
        "kvtuner_attend_cached_prefill": True,
    }
    assert CacheSetting("kvtuner", "K4V4").additional_config() == {"kvtuner_profile": "K4V4"}
    assert CacheSetting("fp8").additional_config(attend_cached_prefill=True) == {}


def test_bits() -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_size": 256,
    }
    assert cache_bits(CacheSetting("kvtuner", "K8V4"), config, "m", 16) == (6.0, 6.5)
    assert cache_bits(CacheSetting("auto"), config, "m", 32) == (32.0, 32.0)
    assert cache_bits(CacheSetting("fp8"), config, "m", 16) == (8.0, 8.0)
    assert cache_bits(CacheSetting("int4_per_token_head"), config, "m", 16) is None


SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor"}


def test_auto_is_unquantized_whatever_the_checkpoint_asks_for(caplog):
    asked = {"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME}}
    keywords = unquantized_keywords(asked, "float32")
    assert keywords["hf_overrides"]["quantization_config"]["kv_cache_scheme"] is None
    assert "the checkpoint asks for a quantized KV cache (kv_cache_scheme=" in caplog.text
    assert unquantized_keywords({}, "float32") == {}


def test_scales_of_heads_are_loaded_as_the_scheme_lays_them_out():
    scheme = {**SCHEME, "strategy": "attn_head"}
    asked = {"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}}
    assert unquantized_keywords(asked, "bfloat16") == {"kv_cache_dtype": "bfloat16"}
