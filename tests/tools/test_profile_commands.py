"""``kvtuner profile`` and ``kvtuner statics`` on small folders; no model is run."""

import argparse
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from kvtuner_tools import cli
from kvtuner_tools.profile_commands import parse_memory, tokens_that_fit
from vllm_kvtuner.profile.load import load_profile, shipped_profiles
from vllm_kvtuner.profile.statics import load_statics

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
}


@pytest.fixture
def model(tmp_path):
    """Makes a model folder with a config and, if given, weights in one or several files."""

    def make(*weights, **changes):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        for index, tensors in enumerate(weights):
            safetensors.torch.save_file(tensors, folder / f"model-{index}.safetensors")
        return str(folder)

    return make


@pytest.fixture
def run(capsys):
    def run(*arguments):
        status = cli.main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# profile show


def test_show_prints_both_bits_and_ranges(run):
    status, out, err = run("profile", "show", "llama31_3.25bit", "--memory", "20GiB")
    assert (status, err) == (0, "")
    assert "3.250 nominal bits, 3.500 stored bits" in out
    assert "28,672 (bf16 takes 131,072, 4.57 times as many)" in out
    assert "748,976 in 21,474,836,480 bytes (bf16: 163,840)" in out
    assert "5-6, 8-12, 14-16, 18-24, 26, 28, 30  K4V2    key_hadamard, value_hadamard, range_search" in out
    assert "arXiv 2502.04420" in out


def test_show_json(run):
    status, out, _ = run("profile", "show", "llama31_3.25bit.yaml", "--json", "--memory", "20GiB")
    shown = json.loads(out)
    assert status == 0
    assert (shown["nominal_bits"], shown["stored_bits"], shown["bytes_per_token"]) == (3.25, 3.5, 28672)
    assert shown["tokens_that_fit"] == 748_976
    assert [layer["layer"] for layer in shown["layers"]] == list(range(32))
    assert shown["layers"][13] == {
        "layer": 13,
        "pair": "K8V4",
        "k_bits": 8,
        "v_bits": 4,
        "transforms": ["key_hadamard", "value_hadamard", "range_search"],
        "recent_window": 0,
        "recent_window_bits": None,
        "sink_tokens": 0,
    }
    assert shown["recent_bytes_per_request"] == 0
    assert shown["provenance"]["scores"]["gsm8k_paper"] == 0.7925


def test_show_counts_recent_windows(run, model, tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("version: 1\nlayers: K4V4\nrecent_window: 64\nrecent_window_overrides: {1: 32}\n")
    status, out, _ = run("profile", "show", profile, "--model", model())
    assert status == 0
    assert "recent window    49,152 more bytes per request\n" in out  # (64 + 32) * 2 heads * 2 * 64 numbers * 2 bytes
    assert "0       K4V4    none        64 tokens in 16 bits\n1       K4V4    none        32 tokens in 16 bits" in out
    shown = json.loads(run("profile", "show", profile, "--model", model(), "--json")[1])
    assert shown["recent_bytes_per_request"] == 49_152
    assert [layer["recent_window"] for layer in shown["layers"]] == [64, 32]
    profile.write_text("version: 1\nlayers: {0: K16V16, 1: K4V4}\nrecent_window: 64\nsink_tokens: 4\n")
    out = run("profile", "show", profile, "--model", model())[1]
    assert "recent window    34,816 more bytes per request\n" in out  # 68 tokens of one layer
    assert "1       K4V4    none        64 tokens and the first 4 in 16 bits" in out
    shown = json.loads(run("profile", "show", profile, "--model", model(), "--json")[1])
    assert [layer["sink_tokens"] for layer in shown["layers"]] == [0, 4]


def test_a_pair_needs_a_model_for_stored_bits(run, model):
    _, out, _ = run("profile", "show", "K8V4", "--json", "--memory", "1GiB")
    shown = json.loads(out)
    assert shown["nominal_bits"] == 6
    assert [shown[key] for key in ("stored_bits", "bytes_per_token", "tokens_that_fit", "model")] == [None] * 4
    assert "give --model" in run("profile", "show", "K8V4")[1]

    folder = model()
    shown = json.loads(run("profile", "show", "K8V4", "--json", "--model", folder, "--memory", "1MiB")[1])
    assert (shown["stored_bits"], shown["bytes_per_token"]) == (6.5, 2 * 2 * 104)
    assert shown["tokens_that_fit"] == 2512
    assert len(shown["layers"]) == 2


def test_config_that_leaves_out_defaults_is_read_by_transformers(run, model, tmp_path):
    folder = model()
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    shown = json.loads(run("profile", "show", "K8V8", "--json", "--model", folder)[1])
    assert shown["bf16_bytes_per_token"] == 3 * 32 * 4 * 128, "transformers' Qwen2Config: 32 KV heads of 128"


# profile check


def test_check_of_all_shipped_profiles(run):
    status, out, err = run("profile", "check", *shipped_profiles())
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == len(shipped_profiles())
    assert "qwen25_7b_5.96bit: ok, 5.964 nominal bits, 6.214 stored bits" in out


def test_check_reports_every_problem_of_every_profile(run, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nlayers: {0: K5V4}\nprovenence: {}\n")
    status, out, err = run("profile", "check", bad, "K8V4", "nowhere")
    assert status == 1
    assert [line.split(":")[0] for line in err.splitlines()] == [str(bad), str(bad), "nowhere"]
    assert out.startswith("K8V4: ok")


def test_check_against_a_model(run, model):
    status, out, err = run("profile", "check", "llama31_3.25bit", "--model", model())
    assert (status, out) == (1, "")
    assert "model.architecture must be Qwen2ForCausalLM" in err
    assert "model.num_layers must be 2" in err


def test_check_json_is_one_object_per_line(run):
    status, out, _ = run("profile", "check", "--json", "llama31_3.25bit", "nowhere")
    good, bad = map(json.loads, out.splitlines())
    assert status == 1
    assert (good["ok"], good["problems"], good["stored_bits"]) == (True, [], 3.5)
    assert (bad["ok"], len(bad["problems"])) == (False, 1)


def test_check_reads_the_statics(run, model, tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"garbage")
    profile = tmp_path / "p.yaml"
    profile.write_text("version: 1\nlayers: K4V4\ntransforms: {key_offset: true}\nstatics: s.safetensors\n")
    status, _, err = run("profile", "check", profile, "--model", model())
    assert status == 1
    assert "must be a complete safetensors file" in err


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "must be a folder with a config.json"), ("{", "the file must be JSON"), ("[]", "must hold a JSON object")],
)
def test_folders_that_hold_no_model(run, tmp_path, content, problem):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    status, _, err = run("profile", "check", "K8V4", "--model", tmp_path)
    assert status == 1
    assert problem in err


# profile list


def test_list(run):
    _, out, _ = run("profile", "list")
    assert "llama31_3.25bit" in out
    assert "meta-llama/Llama-3.1-8B-Instruct" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("llama31_3.25bit"))
    assert row == ["llama31_3.25bit", "meta-llama/Llama-3.1-8B-Instruct", "3.250", "3.500"]
    rows = json.loads(run("profile", "list", "--json")[1])
    assert [row["name"] for row in rows] == list(shipped_profiles())
    assert all(row["stored_bits"] > row["nominal_bits"] for row in rows)


# memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 * 2**30), ("1.5 gib", 3 * 2**29), ("20GB", 20 * 10**9), ("512MiB", 2**29), ("7", 7), ("7B", 7)],
)
def test_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "20 apples", "1e9"])
def test_memory_that_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="memory must be a number with a unit"):
        parse_memory(text)


def test_tokens_come_in_whole_blocks():
    assert tokens_that_fit(16 * 100 - 1, 100) == 0
    assert tokens_that_fit(16 * 100, 100) == 16
    assert tokens_that_fit(33 * 100, 100) == 32


def test_profile_commands_import_no_torch():
    script = (
        "import sys; from kvtuner_tools.cli import main; main(['profile', 'list']);"
        "print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# statics


def bias(layer, name="self_attn.k_proj", size=128):
    tensor = torch.arange(size, dtype=torch.float32).add(1000 * layer).bfloat16()
    return {f"model.layers.{layer}.{name}.bias": tensor}


def expected(layer, start=0):
    values = torch.arange(start, start + 128, dtype=torch.float32).add(1000 * layer).bfloat16().float()
    return values.view(2, 64).numpy()


def test_statics_from_k_proj_bias(run, model, tmp_path):
    decoys = {
        "visual.blocks.0.attn.qkv.bias": torch.ones(12),
        "vision_tower.encoder.layers.0.self_attn.k_proj.bias": torch.ones(12),
        "model.layers.0.self_attn.q_proj.bias": torch.ones(256),
        "model.layers.0.self_attn.k_proj.weight": torch.ones(128, 256),
    }
    folder = model(bias(0) | decoys, bias(1))
    out = tmp_path / "q.safetensors"
    status, printed, err = run("statics", folder, "--out", out)
    assert (status, err) == (0, "")
    assert "key_offset of layers 0-1" in printed

    profile = tmp_path / "p.yaml"
    profile.write_text("version: 1\nlayers: K4V4\ntransforms: {key_offset: true}\nstatics: q.safetensors\n")
    assert run("profile", "check", profile, "--model", folder)[0] == 0
    from kvtuner_tools.model_files import load_model_shape

    statics = load_statics(out, load_profile(str(profile)).resolve(load_model_shape(folder)))
    for layer in (0, 1):
        np.testing.assert_array_equal(statics[layer].key_offset, expected(layer))
    with safetensors.safe_open(out, framework="numpy") as file:
        assert file.metadata()["model"] == folder
        assert file.metadata()["method"] == "k_proj.bias"
        assert {"numpy", "safetensors"} <= set(file.metadata())


def offsets_of(run, folder, tmp_path):
    status, _, err = run("statics", folder, "--out", tmp_path / "out.safetensors")
    assert (status, err) == (0, "")
    return safetensors.numpy.load_file(tmp_path / "out.safetensors")["layers.1.key_offset"]


def test_fused_biases(run, model, tmp_path):
    qkv = bias(0, "attn.c_attn", 512) | bias(1, "attn.c_attn", 512)
    folder = model(
        {name.replace("model.layers", "transformer.h"): each for name, each in qkv.items()}, model_type="qwen"
    )
    np.testing.assert_array_equal(offsets_of(run, folder, tmp_path), expected(1, start=256))

    per_head = bias(0, "attention.query_key_value", 384) | bias(1, "attention.query_key_value", 384)
    folder = model(per_head, model_type="gpt_neox", num_attention_heads=2, hidden_size=128)
    key_rows = torch.arange(384).add(1000).bfloat16().float().view(2, 3, 64)[:, 1].numpy()
    np.testing.assert_array_equal(offsets_of(run, folder, tmp_path), key_rows)


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
        (bias(0) | bias(1), {"rope_scaling": {"mrope_section": [8, 12, 12]}}, "positions are not one number per token"),
        (bias(0) | bias(1), {"kv_lora_rank": 512}, "MLA is not served"),
    ],
)
def test_models_without_a_usable_bias(run, model, tmp_path, weights, changes, problem):
    status, _, err = run("statics", model(weights, **changes), "--out", tmp_path / "out.safetensors")
    assert status == 1
    assert problem in err
    assert not (tmp_path / "out.safetensors").exists()


def test_statics_of_folders_without_weights(run, model, tmp_path):
    status, _, err = run("statics", model(), "--out", tmp_path / "out.safetensors")
    assert (status, "must have weights in safetensors" in err) == (1, True)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"garbage")
    status, _, err = run("statics", model(), "--out", tmp_path / "out.safetensors")
    assert (status, "must be a complete safetensors file" in err) == (1, True)
    status, _, err = run("statics", model(), "--out", tmp_path / "gone" / "out.safetensors")
    assert (status, "--out must be in a folder that exists" in err) == (1, True)
    status, _, err = run("statics", model(), "--out", tmp_path / "model" / "out.safetensors")
    assert (status, "--out must not be in the model's folder" in err) == (1, True)
