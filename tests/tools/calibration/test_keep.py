"""Profiles that are kept where ``auto`` finds them."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvtuner_tools import cli
from kvtuner_tools.calibration import commands
from kvtuner_tools.calibration.keep import keep_for_user, keep_in_model
from kvtuner_tools.calibration.pipeline import Calibration
from kvtuner_tools.model_files import load_model_shape
from vllm_kvtuner.profile.auto import resolve_auto
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.statics import LayerStatics, load_statics, save_statics

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 256}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 128}
MODEL = "model: {name: toy, architecture: LlamaForCausalLM, num_layers: 2, num_kv_heads: 2, head_size: 64, weights: %s}"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model's folder with weights; the user's folder is empty."""
    monkeypatch.setenv("KVTUNER_PROFILE_FOLDER", str(tmp_path / "mine"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({"k_proj": np.arange(12.0)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def profile(model, tmp_path):
    """What calibration has written for it."""
    out = tmp_path / "out"
    out.mkdir()
    offsets = {layer: LayerStatics(key_offset=np.full((2, 64), layer, dtype=np.float32)) for layer in range(2)}
    save_statics(out / "profile.statics.safetensors", offsets, {})
    weights = ModelFiles(str(model)).weights
    text = f"version: 1\n{MODEL % repr(weights)}\nlayers: K4V2\ntransforms: {{key_offset: true}}\n"
    (out / "profile.yaml").write_text(f"{text}statics: profile.statics.safetensors\n")
    return out / "profile.yaml"


@pytest.mark.quick(1)
@pytest.mark.parametrize("place", ["user", "model"])
def test_auto_finds_what_was_kept(place, model, profile, tmp_path):
    path = keep_for_user(profile) if place == "user" else keep_in_model(profile, str(model))
    folder = tmp_path / "mine" / ModelFiles(str(model)).weights if place == "user" else model / "kvtuner"
    assert path.parent == folder
    assert path.name.startswith("3.50bit-") if place == "user" else path.name == "3.50bit.yaml"
    kept = load_profile(str(path))
    statics = load_statics(kept.statics, kept.resolve(kept.model))
    assert (statics[1].key_offset == 1).all()
    assert kept.statics.name == f"{path.stem}.statics.safetensors"
    found = resolve_auto("auto:3.5", ModelFiles(str(model)), load_model_shape(str(model)))
    assert found.chosen.spec == str(path)


def test_nothing_of_the_users_is_replaced(model, profile):
    first = keep_for_user(profile)
    assert keep_for_user(profile) == first
    assert not first.with_suffix(".html").exists()
    profile.write_text(profile.read_text() + "recent_window: 64\n")
    profile.with_name("report.html").write_text("<html>")
    second = keep_for_user(profile)
    assert second != first and first.exists()
    assert second.with_suffix(".html").read_text() == "<html>"
    assert keep_in_model(profile, str(model)) == keep_in_model(first, str(model))


def test_a_profile_without_weights_is_no_models(profile):
    text = profile.read_text()
    profile.write_text(re.sub(", weights: '.*'", "", text))
    assert load_profile(str(profile)).weights is None
    assert keep_for_user(profile) is None
    profile.write_text("version: 1\nlayers: K4V2\n")
    with pytest.raises(ProfileError, match="model must be given, since a profile's name has its stored bits"):
        keep_in_model(profile, "any")


def test_a_calibration_keeps_what_it_says_to_serve(model, profile, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Calibration, "run", lambda *_: "done")
    monkeypatch.setattr(Calibration, "summary", lambda _: [])
    monkeypatch.setattr(
        commands, "check_options", lambda options, *_: SimpleNamespace(options=options, note=None, texts=None)
    )
    monkeypatch.setattr(commands, "profile_to_serve", lambda out: out / "profile.yaml")
    arguments = ["calibrate", str(model), "--out", str(profile.parent), "--max-bits", "4", "--save-to-model"]
    assert cli.main(arguments) == 0
    kept = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("kept:")]
    assert kept[0] == str(model / "kvtuner" / "3.50bit.yaml")
    assert kept[1].startswith(str(tmp_path / "mine"))
