"""Profiles in repositories of the hub, whose stand-in is a server on this machine."""

import numpy as np
import pytest
from huggingface_hub import HfApi, constants
from safetensors.numpy import save

from tests.helpers.hub import lead_to, running_hub
from vllm_kvtuner.profile import hub as hub_module
from vllm_kvtuner.profile.auto import resolve_auto
from vllm_kvtuner.profile.hub import fetch_profile, list_files, local_snapshot
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError

SHAPE = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 2)
PLAIN = "version: 1\nlayers: K4V2\n"
WITH_STATICS = PLAIN + "transforms: {key_offset: true}\nstatics: a.statics.safetensors\n"
STATICS = save({f"layers.{layer}.key_offset": np.ones((2, 64), dtype=np.float32) for layer in range(2)})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as made:
        lead_to(made, tmp_path / "cache", monkeypatch)
        yield made


def problem_of(spec):
    with pytest.raises(ProfileError) as caught:
        fetch_profile(spec)
    (problem,) = caught.value.problems
    return problem


def test_a_profile_comes_with_its_statics_and_nothing_else(hub):
    files = {"kvtuner/a.yaml": WITH_STATICS, "kvtuner/a.statics.safetensors": STATICS, "README.md": "", "w.bin": ""}
    name = hub.commit("org/repo", files)
    hub.commit("org/repo", {"kvtuner/a.yaml": PLAIN})
    for spec in (f"hf://org/repo@{name}", f"hf://org/repo@{name}/kvtuner/a.yaml", f"HF://org/repo@{name}/a.yaml"):
        fetched = fetch_profile(spec)
        assert fetched.commit == name
        profile = load_profile(spec)
        assert profile.source == fetched.path
        assert profile.statics.read_bytes() == STATICS
    assert not any("w.bin" in path for path in hub.asked)
    newest = load_profile("hf://org/repo")
    assert newest.statics is None and not newest.transforms.key_offset


def test_statics_are_of_the_profiles_commit(hub, monkeypatch):
    first = hub.commit("org/repo", {"a.yaml": WITH_STATICS, "a.statics.safetensors": STATICS})
    download = hub_module._download

    def download_and_commit(repository, name):
        path = download(repository, name)
        if name == "a.yaml":
            hub.commit("org/repo", {"a.statics.safetensors": b"others"})
        return path

    monkeypatch.setattr(hub_module, "_download", download_and_commit)
    fetched = fetch_profile("hf://org/repo")
    assert fetched.commit == first
    assert (fetched.path.parent / "a.statics.safetensors").read_bytes() == STATICS


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("hf://org", "a profile of a repository must be hf://ORG/REPO"),
        ("hf://org/repo/a.txt", "a profile of a repository must be hf://ORG/REPO"),
        ("hf://org/repo@/a.yaml", "a profile of a repository must be hf://ORG/REPO"),
        (
            "hf://org/repo/c.yaml",
            "must name a file of the repository, but got c.yaml; it has evil.yaml, kvtuner/a.yaml, kv",
        ),
        (
            "hf://org/repo",
            "must name one of the repository's profiles, but got none; it has evil.yaml, kvtuner/a.yaml, kv",
        ),
        ("hf://org/none", "the hub must answer as asked, but got "),
        ("hf://org/repo@9", "the hub must answer as asked, but got "),
        ("hf://org/repo/evil.yaml", "statics must name a file of the repository, but got '../../../etc/passwd'"),
        ("hf://org/repo/lost.yaml", "statics: the hub must answer as asked, but got "),
    ],
)
def test_what_cannot_be_brought(spec, problem, hub):
    files = {"kvtuner/a.yaml": PLAIN, "kvtuner/b.yaml": PLAIN, "lost.yaml": WITH_STATICS}
    files["evil.yaml"] = PLAIN + "statics: ../../../etc/passwd\n"
    hub.commit("org/repo", files)
    assert problem in problem_of(spec)


def test_without_the_hub_what_was_brought_serves(hub, monkeypatch):
    hub.commit("org/repo", {"kvtuner/a.yaml": PLAIN, "config.json": "{}"})
    assert local_snapshot("org/repo", None, None) is None
    repository = hub_module.Repository("org/repo")
    hub_module._download(repository, "config.json")
    path = fetch_profile("hf://org/repo").path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True, raising=False)
    before = len(hub.asked)
    assert fetch_profile("hf://org/repo").path == path
    assert list_files(repository, "it") == ["config.json", "kvtuner/a.yaml"]
    assert "the hub must answer as asked" in problem_of("hf://org/other")
    assert len(hub.asked) == before


def test_without_a_way_to_the_hub_it_is_asked_once(hub, monkeypatch):
    """Its library asks five more times, for each file."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    rule = "org/none: model must be a folder, or the id of a model that the hub has, but it could not be asked: "
    with pytest.raises(ProfileError) as caught:
        hub_module.refuse_unknown_model("org/none", None, None)
    assert caught.value.problems[0].startswith(rule)
    monkeypatch.setattr(hub_module, "_download", lambda *_: HfApi().model_info("org/none"))
    with pytest.raises(ProfileError, match="it: the hub must answer as asked, but got "):
        hub_module.fetch_file(hub_module.Repository("org/none"), "a.yaml", "it")


def test_models_that_the_hub_does_not_have_are_refused_at_once(hub, monkeypatch):
    hub.commit("org/model", {"config.json": "{}"})
    hub_module.refuse_unknown_model("org/model", None, None)
    for model, revision, problem in (
        ("org/none", None, "org/none: model must be .* that the hub has, but it has none of that name"),
        ("org/model", "9", "org/model: revision must be one that the hub has, but got '9'"),
    ):
        with pytest.raises(ProfileError, match=problem):
            hub_module.refuse_unknown_model(model, revision, None)
    hub_module._download(hub_module.Repository("org/model"), "config.json")
    asked = len(hub.asked)
    hub_module.refuse_unknown_model("org/model", None, "elsewhere")  # it is here
    hub_module.refuse_unknown_model("a/b/c", None, None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module.refuse_unknown_model("org/none", None, None)
    assert len(hub.asked) == asked


@pytest.mark.slow
def test_auto_looks_into_the_models_own_revision(hub):
    score = "provenance: {heldout_scores: {this profile: {kl_mean: %s}}}\n"
    hub.commit("org/model", {"config.json": "{}", "kvtuner/a.yaml": PLAIN + score % 0.2, "other/b.yaml": PLAIN})
    first = hub.name("org/model")
    hub.commit("org/model", {"kvtuner/b.yaml": PLAIN + score % 0.1, "kvtuner/bad.yaml": "version: 2\nlayers: K4V2\n"})
    found = resolve_auto("auto:3.5", ModelFiles("org/model", revision=first), SHAPE)
    assert (found.chosen.kl_mean, found.chosen.source) == (0.2, f"the model's repository, commit {first[:12]}")
    found = resolve_auto("auto:3.5", ModelFiles("org/model"), SHAPE)
    assert found.chosen.kl_mean == 0.1
    assert load_profile(found.chosen.spec).provenance
    reasons = {each.spec.rpartition("/")[2]: each.rejected for each in found.rejected}
    assert reasons["a.yaml"] == f"{found.chosen.spec} is better"
    assert reasons["bad.yaml"] == "version must be 1, but got 2"


def test_auto_says_that_the_hub_was_not_asked(hub):
    found = resolve_auto("auto:4.5", ModelFiles("org/none"), SHAPE)
    assert found.chosen.spec == "K4V4"
    assert found.rejected[0].spec == "hf://org/none"
    assert found.rejected[0].rejected.startswith("the hub must answer as asked, but got ")
