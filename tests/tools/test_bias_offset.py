"""``kvtuner statics`` on small folders; no model is run."""

import numpy as np
import pytest
import safetensors.torch
import torch

from kvtuner_tools.model_files import load_model_shape
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.statics import load_statics


def bias(layer, name="self_attn.k_proj", size=128):
    tensor = torch.arange(size, dtype=torch.float32).add(1000 * layer).bfloat16()
    return {f"model.layers.{layer}.{name}.bias": tensor}


def expected(layer, start=0):
    values = torch.arange(start, start + 128, dtype=torch.float32).add(1000 * layer).bfloat16().float()
    return values.view(2, 64).numpy()


def test_statics_from_k_proj_bias(run_cli, make_model, tmp_path):
    decoys = {
        "visual.blocks.0.attn.qkv.bias": torch.ones(12),
        "vision_tower.encoder.layers.0.self_attn.k_proj.bias": torch.ones(12),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(256),
        "model.layers.0.self_attn.k_proj.weight": torch.ones(128, 256),
    }
    folder = make_model(bias(0) | decoys, bias(1))
    out = tmp_path / "q.safetensors"
    status, printed, err = run_cli("statics", folder, "--out", out)
    assert (status, err) == (0, "")
    assert "key_offset of layers 0-1" in printed

    profile = tmp_path / "p.yaml"
    profile.write_text("version: 1\nlayers: K4V4\ntransforms: {key_offset: true}\nstatics: q.safetensors\n")
    assert run_cli("profile", "check", profile, "--model", folder)[0] == 0
    statics = load_statics(out, load_profile(str(profile)).resolve(load_model_shape(folder)))
    for layer in (0, 1):
        np.testing.assert_array_equal(statics[layer].key_offset, expected(layer))
    with safetensors.safe_open(out, framework="numpy") as file:
        assert file.metadata()["model"] == folder
        assert file.metadata()["method"] == "k_proj.bias"
        assert {"numpy", "safetensors"} <= set(file.metadata())


def offsets_of(run_cli, folder, tmp_path):
    status, _, err = run_cli("statics", folder, "--out", tmp_path / "out.safetensors")
    assert (status, err) == (0, "")
    return safetensors.numpy.load_file(tmp_path / "out.safetensors")["layers.1.key_offset"]


def test_fused_biases(run_cli, make_model, tmp_path):
    qkv = bias(0, "attn.c_attn", 512) | bias(1, "attn.c_attn", 512)
    folder = make_model(
        {name.replace("model.layers", "transformer.h"): each for name, each in qkv.items()}, model_type="qwen"
    )
    np.testing.assert_array_equal(offsets_of(run_cli, folder, tmp_path), expected(1, start=256))

    per_head = bias(0, "attention.query_key_value", 384) | bias(1, "attention.query_key_value", 384)
    folder = make_model(per_head, model_type="gpt_neox", num_attention_heads=2, hidden_size=128)
    key_rows = torch.arange(384).add(1000).bfloat16().float().view(2, 3, 64)[:, 1].numpy()
    np.testing.assert_array_equal(offsets_of(run_cli, folder, tmp_path), key_rows)


@pytest.mark.parametrize(
    ("weights", "changes", "problem"),
    [
        (
            {"model.layers.0.self_attn.k_proj.weight": torch.ones(2)},
            {},
            "the offset would be zero; leave key_offset out",
        ),
        (bias(0), {}, "k projections must all have a bias, but got none for 1"),
        (bias(0, size=64) | bias(1), {}, "must have 128 numbers for LayerShape(num_kv_heads=2, head_size=64)"),
        (bias(0, "self_attn.qkv_proj", 512), {}, "must be fused as in models of the types chatglm"),
        (bias(0, "self_attn.qkv_proj", 200), {"model_type": "phi3"}, "but got [200]"),
        (bias(0) | {"model.layers.0.self_attn.k_norm.weight": torch.ones(64)}, {}, "must not normalize keys"),
        (bias(0) | bias(1), {"kv_lora_rank": 512}, "MLA is not served"),
    ],
)
def test_models_without_a_usable_bias(run_cli, make_model, tmp_path, weights, changes, problem):
    status, _, err = run_cli("statics", make_model(weights, **changes), "--out", tmp_path / "out.safetensors")
    assert status == 1
    assert problem in err
    assert not (tmp_path / "out.safetensors").exists()


def test_statics_of_folders_without_weights(run_cli, make_model, tmp_path):
    status, _, err = run_cli("statics", make_model(), "--out", tmp_path / "out.safetensors")
    assert (status, "must have weights in safetensors" in err) == (1, True)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"garbage")
    status, _, err = run_cli("statics", make_model(), "--out", tmp_path / "out.safetensors")
    assert (status, "must be a complete safetensors file" in err) == (1, True)
    status, _, err = run_cli("statics", make_model(), "--out", tmp_path / "gone" / "out.safetensors")
    assert (status, "--out must be in a folder that exists" in err) == (1, True)
    status, _, err = run_cli("statics", make_model(), "--out", tmp_path / "model" / "out.safetensors")
    assert (status, "--out must not be in the model's folder" in err) == (1, True)
