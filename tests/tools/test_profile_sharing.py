"""``kvtuner profile upload`` and ``download``, with a stand-in for the hub."""

import numpy as np
import pytest

from tests.helpers.hub import lead_to, running_hub
from vllm_kvtuner.profile.auto import resolve_auto
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.statics import LayerStatics, load_statics, save_statics

TEXT = """version: 1
model: {name: org/toy, architecture: ToyForCausalLM, num_layers: 2, num_kv_heads: 2, head_size: 64, weights: any}
layers: K4V2
transforms: {key_offset: true}
recent_window: 64
sink_tokens: 4
statics: profile.statics.safetensors
provenance: {heldout_scores: {this profile: {kl_mean: 0.0123}}}
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as made:
        lead_to(made, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        yield made


@pytest.fixture
def profile(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    offsets = {layer: LayerStatics(key_offset=np.full((2, 64), layer, dtype=np.float32)) for layer in range(2)}
    save_statics(out / "profile.statics.safetensors", offsets, {})
    (out / "profile.yaml").write_text(TEXT)
    (out / "report.html").write_text("<html>")
    return out / "profile.yaml"


def test_a_profile_goes_to_the_hub_and_back(run_cli, hub, profile, tmp_path):
    status, out, err = run_cli("profile", "upload", profile, "org/toy-kvtuner")
    assert (status, err) == (0, "")
    files = hub.commits["org/toy-kvtuner"][-1]
    assert set(files) == {
        "README.md",
        "kvtuner/3.50bit.html",
        "kvtuner/3.50bit.statics.safetensors",
        "kvtuner/3.50bit.yaml",
    }
    (spec,) = (line.rpartition(" ")[2] for line in out.splitlines() if line.startswith("serve"))
    assert spec == f"hf://org/toy-kvtuner@{hub.name('org/toy-kvtuner')}/3.50bit.yaml"
    served = load_profile(spec)
    statics = load_statics(served.statics, served.resolve(served.model))
    assert (statics[1].key_offset == 1).all()
    status, out, err = run_cli("profile", "download", "org/toy-kvtuner", "--out", tmp_path / "back")
    assert (status, err) == (0, "")
    assert out.splitlines() == [str(tmp_path / "back" / "3.50bit.yaml")]
    back = load_profile(out.strip())
    assert back.pairs == served.pairs and back.statics.read_bytes() == served.statics.read_bytes()
    found = resolve_auto("auto:3.5", ModelFiles("org/toy-kvtuner"), served.model)
    assert found.chosen.kl_mean == 0.0123


def test_the_card_tells_of_all_profiles_of_the_repository(run_cli, hub, profile):
    assert run_cli("profile", "upload", profile, "org/toy-kvtuner")[0] == 0
    profile.write_text(TEXT.replace("K4V2", "K4V4"))
    assert run_cli("profile", "upload", profile, "org/toy-kvtuner")[0] == 0
    card = hub.commits["org/toy-kvtuner"][-1]["README.md"].decode()
    assert card.startswith(
        "---\nbase_model:\n- org/toy\nlibrary_name: vllm\ntags:\n- vllm\n- kv-cache\n- kvtuner\n---\n"
    )
    assert "| `kvtuner/3.50bit.yaml` | 3.500 | 4.57 | 64 + 4 | 0.0123 | any |" in card
    assert "| `kvtuner/4.50bit.yaml` | 4.500 | 3.56 | 64 + 4 | 0.0123 | any |" in card
    assert "vllm serve org/toy --kv-cache-dtype kvtuner" in card


def test_the_report_of_a_kept_profile_goes_with_it(run_cli, hub, profile):
    profile.with_name("report.html").rename(profile.with_suffix(".html"))
    assert run_cli("profile", "upload", profile, "org/toy-kvtuner")[0] == 0
    assert hub.commits["org/toy-kvtuner"][-1]["kvtuner/3.50bit.html"] == b"<html>"


def test_a_card_that_somebody_wrote_stays(run_cli, hub, profile):
    hub.commit("org/toy", {"README.md": "# Mine", "config.json": "{}"})
    assert run_cli("profile", "upload", profile, "org/toy")[0] == 0
    files = hub.commits["org/toy"][-1]
    assert files["README.md"] == b"# Mine" and "kvtuner/3.50bit.yaml" in files


def test_one_file_of_a_repository(run_cli, hub, profile, tmp_path):
    first = hub.commit("org/repo", {"kvtuner/a.yaml": "version: 1\nlayers: K4V2\n", "kvtuner/b.yaml": "no"})
    hub.commit("org/repo", {"kvtuner/a.yaml": "version: 1\nlayers: K8V8\n"})
    status, out, _ = run_cli("profile", "download", f"hf://org/repo@{first}/a.yaml", "--out", tmp_path / "back")
    assert status == 0
    assert load_profile(out.strip()).pairs == load_profile("K4V2").pairs


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ("upload", "DIR", "org/a"),
            "must be a profile, or the output folder of a calibration that has ended, but got a f",
        ),
        (("upload", "DIR/none", "org/a"), "but got no such file"),
        (("download", "org/none", "--out", "DIR"), "hf://org/none: the hub must answer as asked, but got"),
        (
            ("download", "org/empty", "--out", "DIR"),
            "the repository must have profiles in kvtuner/, but got weights.bin",
        ),
        (("download", "org", "--out", "DIR"), "a profile of a repository must be hf://ORG/REPO"),
    ],
)
def test_what_cannot_be_shared(arguments, problem, run_cli, hub, tmp_path):
    hub.commit("org/empty", {"weights.bin": ""})
    status, _, err = run_cli("profile", *(each.replace("DIR", str(tmp_path)) for each in arguments))
    assert status == 1
    assert problem in err
