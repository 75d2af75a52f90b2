"""Named shapes and a rank's share of them."""

import json

import pytest
from transformers import AutoConfig

from kvtuner_tools.bench import presets as module
from kvtuner_tools.bench.points import LayerHeads
from kvtuner_tools.bench.presets import SHAPES, Preset, presets, share_kv_heads, share_of
from vllm_kvtuner.profile.model_shape import ModelShape

HEADS = {
    "gemma3_27b": ("32/16/128", "8/4/128", "4/2/128"),
    "glm46": ("96/8/128", "24/2/128", "12/1/128"),
    "gpt_oss_120b": ("64/8/64+sinks", "16/2/64+sinks", "8/1/64+sinks"),
    "gpt_oss_20b": ("64/8/64+sinks", "16/2/64+sinks", "8/1/64+sinks"),
    "llama31_8b": ("32/8/128", "8/2/128", "4/1/128"),
    "llama33_70b": ("64/8/128", "16/2/128", "8/1/128"),
    "qwen36_27b": ("24/4/256", "6/1/256", "3/1/256"),
    "qwen36_35b_a3b": ("16/2/256", "4/1/256", "2/1/256"),
    "qwen3_235b_a22b": ("64/4/128", "16/1/128", "8/1/128"),
    "qwen3_30b_a3b": ("32/4/128", "8/1/128", "4/1/128"),
    "qwen3_32b": ("64/8/128", "16/2/128", "8/1/128"),
}
"""Heads, KV heads and head size of every preset: whole, and under tensor parallelism of 4 and 8."""
ATTENTION_LAYERS = {
    "gemma3_27b": 62, "glm46": 92, "gpt_oss_120b": 36, "gpt_oss_20b": 24, "llama31_8b": 32, "llama33_70b": 80,
    "qwen36_27b": 16, "qwen36_35b_a3b": 10, "qwen3_235b_a22b": 94, "qwen3_30b_a3b": 48, "qwen3_32b": 64,
}  # fmt: skip
SERVED = {"gemma3_27b", "llama31_8b", "llama33_70b", "qwen36_27b", "qwen3_32b"}


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", sorted(HEADS))
def test_heads(name):
    assert tuple(str(LayerHeads.parse(f"{name}{share}")) for share in ("", ":tp4", ":tp8")) == HEADS[name]
    for ranks in (1, 4, 8):
        with Preset(name, ranks).folder() as folder:
            shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(folder), name)
        assert len(shape.attention_layers) == ATTENTION_LAYERS[name]
        heads = LayerHeads.parse(str(Preset(name, ranks)))
        layers = {shape.layers[index] for index in shape.attention_layers}
        assert {(layer.num_kv_heads, layer.head_size) for layer in layers} == {(heads.num_kv_heads, heads.head_size)}


def test_every_preset_is_in_the_table():
    assert presets() == sorted(HEADS)


def test_windows_of_the_models_that_have_them():
    for name, window, full in (("gemma3_27b", 1024, 10), ("gpt_oss_120b", 128, 18)):
        config = AutoConfig.from_pretrained(SHAPES / name)
        assert config.sliding_window == window
        assert config.layer_types.count("full_attention") == full


def test_a_share_is_what_one_rank_holds():
    whole = json.loads((SHAPES / "llama33_70b" / "config.json").read_text())
    share = Preset.parse("llama33_70b:tp8").config()

    changed = {key: share.get(key) for key in {*whole, *share} if share.get(key) != whole.get(key)}
    assert changed == {
        "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 3584, "vocab_size": 16032,
    }  # fmt: skip
    hidden, size, layers = share["hidden_size"], share["head_dim"], share["num_hidden_layers"]
    attention = 2 * hidden * size * (share["num_attention_heads"] + share["num_key_value_heads"])
    weights = layers * (attention + 3 * hidden * share["intermediate_size"]) + 2 * hidden * share["vocab_size"]
    assert 8 * weights == pytest.approx(70.6e9, rel=2e-3), "eight ranks hold the model, norms left out"


def test_a_share_keeps_the_size_of_heads_that_the_config_does_not_give():
    config = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100,
              "intermediate_size": 64, "eos_token_id": 99}  # fmt: skip
    share = share_of(config, 4)
    assert share == {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
                     "vocab_size": 32, "intermediate_size": 16}  # fmt: skip
    assert share_of(config, 1) == config


def test_kv_heads_of_a_share():
    assert [share_kv_heads(8, ranks) for ranks in (1, 2, 8, 16)] == [8, 4, 1, 1]
    with pytest.raises(ValueError, match="divide the KV heads or be a multiple of them, but got 3 and 8"):
        share_kv_heads(8, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llama", "a named shape is one of .*, but got 'llama'"),
        ("llama33_70b:tp0", "a named shape is one of"),
        ("llama33_70b:8", "a named shape is one of"),
        ("llama33_70b:tp8:tp2", "a named shape is one of"),
        ("../shapes/llama33_70b", "a named shape is one of"),
        ("llama33_70b:tp5", "llama33_70b:tp5: num_attention_heads must be a multiple of the 5 ranks, but got 64"),
        ("gemma3_27b:tp64", "gemma3_27b:tp64: num_attention_heads must be a multiple of the 64 ranks, but got 32"),
    ],
)
def test_what_is_no_preset_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Preset.parse(text)


def test_a_folder_lasts_as_long_as_it_is_used():
    with Preset("llama33_70b").folder() as folder:
        assert folder == SHAPES / "llama33_70b"
    with Preset("llama33_70b", 8).folder() as folder:
        assert folder.name == "llama33_70b_tp8"
        assert json.loads((folder / "config.json").read_text()) == Preset("llama33_70b", 8).config()
    assert not folder.exists()


def test_engines_take_dense_models(monkeypatch):
    installed = {"torchvision": None}
    monkeypatch.setattr(module.importlib.util, "find_spec", installed.__getitem__)
    assert "qwen36_27b:tp8 needs torchvision" in Preset("qwen36_27b", 8).serve_refusal
    installed["torchvision"] = object()
    assert {name for name in presets() if Preset(name).serve_refusal is None} == SERVED
    assert "glm46:tp8 is a mixture of experts" in Preset("glm46", 8).serve_refusal
