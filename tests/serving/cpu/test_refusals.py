"""What cannot be served is refused with one message, before weights are loaded: the models here have none."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.engine import cpu_only, run_engine
from vllm_kvtuner.profile.statics import LayerStatics, save_statics

pytestmark = cpu_only

OFFSET = "version: 1\nlayers: K4V4\ntransforms: {key_offset: true}\nstatics: statics.safetensors\n"


@pytest.fixture(scope="module")
def weightless(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weightless") / "llama"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def refused(model, *messages, **options):
    with pytest.raises(ValueError, match=re.escape(messages[0])) as caught:
        run_engine(model, **options)
    for message in messages:
        assert message in str(caught.value)


def test_a_good_profile_gets_as_far_as_the_weights(weightless):
    with pytest.raises(RuntimeError, match="weights"):
        run_engine(weightless, profile="K8V8:plain")


def test_vllm_serve_says_it_as_its_parser_would(weightless):
    """One line for each problem, argparse's status, and no traceback."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(weightless), "--kv-cache-dtype", "kvtuner"]
    done = subprocess.run(
        [*command, "--kvtuner-profile", "smollm2_135m_window_4.50bit"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "model.num_layers must be 4" in line)
    assert "vllm serve: error: " in line


def test_kvtuner_without_a_profile_is_auto(weightless):
    with pytest.raises(RuntimeError, match="weights"):
        run_engine(weightless, kv_cache_dtype="kvtuner")


def test_a_budget_that_needs_calibration(weightless):
    message = "auto:2: a budget without a profile of this model must be at least 3.5 stored bits"
    refused(weightless, message, "needs calibration", profile="auto:2")


def test_a_profile_without_kvtuner(weightless):
    refused(
        weightless,
        "a precision profile ('K8V8') takes effect with --kv-cache-dtype kvtuner only, but got --kv-cache-dtype auto",
        profile="K8V8",
        kv_cache_dtype="auto",
    )


def test_a_profile_that_is_not_there(weightless):
    refused(weightless, "smollm2_135m_window_4.5: ", "smollm2_135m_window_4.50bit", profile="smollm2_135m_window_4.5")


def test_a_profile_for_another_model(weightless):
    must_be = f"that of {weightless}, but got"
    refused(
        weightless,
        f"smollm2_135m_window_4.50bit.yaml: model.num_layers must be 4, {must_be} 30",
        profile="smollm2_135m_window_4.50bit",
    )


def test_missing_layers(weightless, tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 1\nlayers: {0-1: K8V8}\n")
    rule = f"must give every layer of {weightless} a pair, but got none for 2-3"
    refused(weightless, f"{profile}: layers {rule}", profile=profile)


def test_all_problems_at_once(weightless, tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 2\nlayers: {0-2: K8V8, 3: K8V5}\ncolour: red\n")
    refused(weightless, "version must be 1, but got 2", "layers.3: ", "but got 5", "colour", profile=profile)


def test_a_block_size_that_does_not_pack(weightless):
    refused(weightless, "block_size must be a multiple of 16", "but got 8", profile="K8V8:plain", block_size=8)


def test_statics_that_are_not_there(weightless, tmp_path):
    (tmp_path / "profile.yaml").write_text(OFFSET)
    refused(
        weightless,
        f"{tmp_path}/profile.yaml: statics must name a file (relative to the profile), but got 'statics.safetensors'",
        profile=tmp_path / "profile.yaml",
    )


def test_statics_of_another_model(weightless, tmp_path):
    (tmp_path / "profile.yaml").write_text(OFFSET)
    tensor = np.zeros((2, 64), np.float32)
    save_statics(tmp_path / "statics.safetensors", {layer: LayerStatics(key_offset=tensor) for layer in (0, 1)}, {})
    refused(weightless, "layers.2.key_offset", "layers.3.key_offset", profile=tmp_path / "profile.yaml")


def test_truncated_statics(weightless, tmp_path):
    (tmp_path / "profile.yaml").write_text(OFFSET)
    statics = tmp_path / "statics.safetensors"
    tensor = np.zeros((2, 64), np.float32)
    save_statics(statics, {layer: LayerStatics(key_offset=tensor) for layer in range(4)}, {})
    statics.write_bytes(statics.read_bytes()[:-100])
    refused(weightless, f"{statics}: the file must be a complete safetensors", profile=tmp_path / "profile.yaml")


def test_statics_of_a_model_with_other_heads(weightless, tmp_path):
    (tmp_path / "profile.yaml").write_text(OFFSET)
    tensor = np.zeros((4, 64), np.float32)
    statics = {layer: LayerStatics(key_offset=tensor) for layer in range(4)}
    save_statics(tmp_path / "statics.safetensors", statics, {})
    message = "layers.3.key_offset must have the shape (2, 64) (num_kv_heads, head_size), but got (4, 64)"
    refused(weightless, message, profile=tmp_path / "profile.yaml")


def test_a_model_that_has_changed_since_the_profile_was_made(weightless, tmp_path):
    """The same folder and layers, other heads."""
    changed = tmp_path / "model"
    shutil.copytree(weightless, changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1, "head_dim": 128}))
    model = "{name: llama, architecture: LlamaForCausalLM, num_layers: 4, num_kv_heads: 2, head_size: 64}"
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"version: 1\nmodel: {model}\nlayers: K4V4\n")
    heads = f"{profile}: model.num_kv_heads must be 1, that of {changed}, but got 2"
    refused(changed, heads, "model.head_size must be 128", profile=profile)
