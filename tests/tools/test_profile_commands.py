"""``kvtuner profile`` on small folders; no model is run."""

import argparse
import json
import subprocess
import sys

import pytest

from kvtuner_tools import profile_commands
from kvtuner_tools.arguments import memory_text, parse_memory
from kvtuner_tools.profile_commands import tokens_that_fit
from vllm_kvtuner.profile.load import shipped_profiles
from vllm_kvtuner.profile.problems import ProfileError


def test_show_prints_both_bits_and_ranges(run_cli):
    status, out, err = run_cli("profile", "show", "llama31_3.25bit", "--memory", "20GiB")
    assert (status, err) == (0, "")
    assert "3.250 nominal bits, 3.500 stored bits" in out
    assert "28,672 (bf16 takes 131,072, 4.57 times as many)" in out
    assert "748,976 in 21,474,836,480 bytes (bf16: 163,840)" in out
    layers = "5-6, 8-12, 14-16, 18-24, 26, 28, 30  K4V2    key_hadamard, value_hadamard, range_search"
    assert f"{layers}  64 tokens and the first 4 in 16 bits" in out
    assert "arXiv 2502.04420" in out


def test_show_json(run_cli):
    status, out, _ = run_cli("profile", "show", "llama31_3.25bit.yaml", "--json", "--memory", "20GiB")
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
        "recent_window": 64,
        "recent_window_bits": 16,
        "sink_tokens": 4,
    }
    assert shown["recent_bytes_per_request"] == 68 * 131_072
    assert shown["provenance"]["scores"]["gsm8k_paper"] == 0.7925


def test_show_counts_recent_windows(run_cli, make_model, tmp_path):
    profile = tmp_path / "p.yaml"
    profile.write_text("version: 1\nlayers: K4V4\nrecent_window: 64\nrecent_window_overrides: {1: 32}\n")
    status, out, _ = run_cli("profile", "show", profile, "--model", make_model())
    assert status == 0
    assert "recent window    49,152 more bytes per request\n" in out  # (64 + 32) * 2 heads * 2 * 64 numbers * 2 bytes
    assert "0       K4V4    none        64 tokens in 16 bits\n1       K4V4    none        32 tokens in 16 bits" in out
    shown = json.loads(run_cli("profile", "show", profile, "--model", make_model(), "--json")[1])
    assert shown["recent_bytes_per_request"] == 49_152
    assert [layer["recent_window"] for layer in shown["layers"]] == [64, 32]
    profile.write_text("version: 1\nlayers: {0: K16V16, 1: K4V4}\nrecent_window: 64\nsink_tokens: 4\n")
    out = run_cli("profile", "show", profile, "--model", make_model())[1]
    assert "recent window    34,816 more bytes per request\n" in out  # 68 tokens of one layer
    assert "1       K4V4    none        64 tokens and the first 4 in 16 bits" in out
    shown = json.loads(run_cli("profile", "show", profile, "--model", make_model(), "--json")[1])
    assert [layer["sink_tokens"] for layer in shown["layers"]] == [0, 4]


def test_a_pair_needs_a_model_for_stored_bits(run_cli, make_model):
    shown = json.loads(run_cli("profile", "show", "K8V4", "--json")[1])
    assert (shown["schema"], shown["nominal_bits"]) == ("kvtuner-profile/1", 6)
    assert [shown[key] for key in ("stored_bits", "bytes_per_token", "tokens_that_fit", "model")] == [None] * 4
    assert "give --model" in run_cli("profile", "show", "K8V4")[1]

    folder = make_model()
    shown = json.loads(run_cli("profile", "show", "K8V4", "--json", "--model", folder, "--memory", "1MiB")[1])
    assert (shown["stored_bits"], shown["bytes_per_token"]) == (6.5, 2 * 2 * 104)
    assert shown["tokens_that_fit"] == 2512
    assert len(shown["layers"]) == 2


@pytest.mark.parametrize("action", ["show", "check"])
def test_memory_of_a_pair_needs_a_model(run_cli, action):
    status, out, err = run_cli("profile", action, "K4V4", "--memory", "20")
    assert (status, out) == (1, "")
    assert err.startswith("K4V4: --memory needs --model for a profile that names none") and err.count("\n") == 1


def test_a_pair_is_shown_as_it_is_served(run_cli, make_model):
    out = run_cli("profile", "show", "K4V4", "--model", make_model())[1]
    assert "recent window    69,632 more bytes per request; fewer where requests are short\n" in out
    assert "key offset       the k projection's bias, when the model is loaded\n" in out
    assert "key feedback     by the q projection's weights, when the model is loaded\n" in out
    treatment = "key_offset, key_hadamard, value_hadamard, range_search, key_round_feedback  64 tokens and the first 4"
    assert f"0-1     K4V4    {treatment} in 16 bits" in out
    shown = json.loads(run_cli("profile", "show", "K4V4:plain", "--model", make_model(), "--json")[1])
    assert (shown["adapts"], shown["key_offset_from_weights"], shown["left_out"]) == (False, False, [])
    assert {(tuple(layer["transforms"]), layer["recent_window"]) for layer in shown["layers"]} == {((), 0)}


def test_a_pair_keeps_its_offset_under_m_rope(run_cli, make_model):
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12]}
    out = run_cli("profile", "show", "K4V4", "--model", make_model(rope_scaling=rope))[1]
    assert "key offset       the k projection's bias, when the model is loaded\n" in out
    assert "without " not in out


def test_config_that_leaves_out_defaults_is_read_by_transformers(run_cli, make_model, tmp_path):
    folder = make_model()
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    shown = json.loads(run_cli("profile", "show", "K8V8", "--json", "--model", folder)[1])
    assert shown["bf16_bytes_per_token"] == 3 * 32 * 4 * 128, "transformers' Qwen2Config: 32 KV heads of 128"


def test_check_of_all_shipped_profiles(run_cli):
    status, out, err = run_cli("profile", "check", *shipped_profiles())
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == len(shipped_profiles())
    assert "published/qwen25_7b_5.96bit: ok, 5.964 nominal bits, 6.214 stored bits" in out


def test_check_reports_every_problem_of_every_profile(run_cli, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("version: 1\nlayers: {0: K5V4}\nprovenence: {}\n")
    status, out, err = run_cli("profile", "check", bad, "K8V4", "nowhere")
    assert status == 1
    assert [line.split(":")[0] for line in err.splitlines()] == [str(bad), str(bad), "nowhere"]
    assert out.startswith("K8V4: ok")


def test_check_against_a_model(run_cli, make_model):
    status, out, err = run_cli("profile", "check", "llama31_3.25bit", "--model", make_model())
    assert (status, out) == (1, "")
    assert "model.architecture must be Qwen2ForCausalLM" in err
    assert "model.num_layers must be 2" in err


def test_check_json_lists_the_profiles(run_cli):
    status, out, _ = run_cli("profile", "check", "--json", "llama31_3.25bit", "nowhere")
    document = json.loads(out)
    good, bad = document["profiles"]
    assert (status, document["schema"]) == (1, "kvtuner-profile-check/1")
    assert (good["ok"], good["problems"], good["stored_bits"]) == (True, [], 3.5)
    assert (bad["ok"], len(bad["problems"])) == (False, 1)


def test_check_reads_the_statics(run_cli, make_model, tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"garbage")
    profile = tmp_path / "p.yaml"
    profile.write_text("version: 1\nlayers: K4V4\ntransforms: {key_offset: true}\nstatics: s.safetensors\n")
    status, _, err = run_cli("profile", "check", profile, "--model", make_model())
    assert status == 1
    assert "must be a complete safetensors file" in err


@pytest.mark.parametrize("model", ["/nonexistent", "./models/llama", "a/b/c", "models/"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(run_cli, monkeypatch, model):
    monkeypatch.setattr("kvtuner_tools.model_files.load_config", lambda *_: pytest.fail("the hub was asked"))
    status, _, err = run_cli("profile", "check", "K8V4", "--model", model)
    assert (status, err.count("\n")) == (1, 1)
    assert err.endswith("or the id of a model, but got no such folder\n")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "must be a folder with a config.json"), ("{", "the file must be JSON"), ("[]", "must hold a JSON object")],
)
def test_folders_that_hold_no_model(run_cli, tmp_path, content, problem):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    status, _, err = run_cli("profile", "check", "K8V4", "--model", tmp_path)
    assert status == 1
    assert problem in err


@pytest.mark.slow
def test_list(run_cli):
    rows = {line.split()[0]: line.split() for line in run_cli("profile", "list")[1].splitlines()}
    assert rows["name"] == ["name", "model", "stored", "bits", "x", "bf16", "window", "KL", "GSM8K"]
    name, bits = "published/llama31_3.25bit", ["3.500", "4.57", "64+4", "-", "0.792", "(paper)"]
    assert rows[name] == [name, "meta-llama/Llama-3.1-8B-Instruct", *bits], (
        "a paper's score is told from a measured one"
    )
    assert rows["qwen25_coder_1.5b_feedback_3.50bit"][2:] == ["3.500", "4.57", "64+4", "0.0025", "-"]
    assert rows["qwen25_coder_1.5b_feedback_3.00bit"][2:] == ["3.000", "5.33", "64+4", "0.0059", "0.548"]
    document = json.loads(run_cli("profile", "list", "--json")[1])
    assert document["schema"] == "kvtuner-profile-list/1"
    assert [row["name"] for row in document["profiles"]] == list(shipped_profiles())
    assert all(row["stored_bits"] > row["nominal_bits"] for row in document["profiles"])
    assert {row["gsm8k"] for row in document["profiles"] if row["gsm8k_paper"]} == {None}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * 2**30),
        ("1.5 gib", 3 * 2**29),
        ("20GB", 20 * 10**9),
        ("512MiB", 2**29),
        ("7", 7),
        ("7B", 7),
        ("1g", 10**9),
        ("1G", 2**30),
        ("25.6k", 25600),
    ],
)
def test_memory(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("size", [0, 1, 1 << 30, 3 << 29, 10**9])
def test_memory_is_written_as_it_is_read(size):
    assert parse_memory(memory_text(size)) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "20 apples", "1e9"])
def test_memory_that_is_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="memory must be a number with a unit"):
        parse_memory(text)


def test_tokens_come_in_whole_blocks():
    assert tokens_that_fit(16 * 100 - 1, 100) == 0
    assert tokens_that_fit(16 * 100, 100) == 16
    assert tokens_that_fit(33 * 100, 100) == 32


@pytest.mark.slow
def test_profile_commands_import_no_torch():
    script = (
        "import sys; from kvtuner_tools.cli import main; main(['profile', 'list']);"
        "print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_a_budget_by_need(run_cli, make_model):
    # 2 layers of 2 heads of 64: K4V2 takes 224 bytes a token, K4V4 288, and a request's window 69,632 with either.
    arguments = ("--model", make_model(), "--memory", "1MiB")
    status, out, _ = run_cli("profile", "show", "auto:fit=256x8", *arguments)
    assert status == 0
    assert out.startswith("profile          K4V2\n")
    status, _, err = run_cli("profile", "show", "auto:fit=1024x8", *arguments)
    assert status == 1
    assert "8 requests of 1,024 tokens must fit in 1,048,576 bytes" in err
    status, out, _ = run_cli(
        "profile", "resolve", arguments[1], "--profile", "auto:fit=256x8", "--memory", "1MiB", "--json"
    )
    found = json.loads(out)
    assert (status, found["schema"], found["chosen"]["spec"]) == (0, "kvtuner-resolution/2", "K4V2")
    assert found["budget"] == "8 requests of 256 tokens in 1,048,576 bytes"


def test_resolve_reads_the_model_at_its_revision(run_cli, monkeypatch):
    def stop(model, source):
        raise ProfileError([f"{model} at {source.revision}"])

    monkeypatch.setattr(profile_commands, "load_model_shape", stop)
    status, _, err = run_cli("profile", "resolve", "org/model", "--revision", "v2")
    assert (status, err) == (1, "org/model at v2\n")
