"""What ``auto`` means for a model: where profiles are looked for, which is taken, and why the others are not."""

import dataclasses

import pytest

from vllm_kvtuner.profile.auto import is_auto, parse_budget, resolve_auto
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError

SHAPE = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 128),) * 4)


@pytest.fixture
def model(tmp_path):
    """A model's folder, with profiles in it by name and text."""

    def make(**profiles):
        folder = tmp_path / "model" / "kvtuner"
        folder.mkdir(parents=True)
        for name, text in profiles.items():
            (folder / f"{name}.yaml").write_text(f"version: 1\n{text}\n")
        return str(folder.parent)

    return make


def problems_of(*arguments):
    with pytest.raises(ProfileError) as caught:
        resolve_auto(*arguments)
    return caught.value.problems


@pytest.mark.parametrize(
    ("spec", "chosen", "bits"),
    [("auto", "K4V4", 4.25), ("auto:3.5", "K4V2", 3.25), ("AUTO:16", "K8V8", 8.25), ("auto:6.25", "K8V4", 6.25)],
)
def test_without_profiles_a_pair_is_built(spec, chosen, bits, tmp_path):
    found = resolve_auto(spec, str(tmp_path), SHAPE)
    assert (found.chosen.spec, found.chosen.source, found.chosen.stored_bits) == (chosen, "built from weights", bits)
    assert found.chosen.rejected is None
    assert all(each.rejected for each in found.rejected)
    assert load_profile(chosen).adapts


def test_the_models_own_profiles_come_first(model):
    score = "provenance: {heldout_scores: {this profile: {kl_mean: %s}}}"
    folder = model(
        a=f"layers: K4V2\n{score % 0.02}",
        b=f"layers: K4V2\n{score % 0.01}",
        c="layers: K4V2",
        large="layers: K8V8",
        small=f"layers: K2V2\n{score % 0.001}",
        wrong="layers: {0: K4V4}",
    )
    found = resolve_auto("auto:3.5", folder, SHAPE)
    assert found.chosen.spec == f"{folder}/kvtuner/b.yaml"
    assert (found.chosen.source, found.chosen.kl_mean) == ("the model's folder", 0.01)
    reasons = {each.spec.rpartition("/")[2]: each.rejected for each in found.rejected}
    assert reasons["large.yaml"] == "takes 8.25 stored bits of 3.5"
    assert reasons["wrong.yaml"] == "layers must give every layer of toy a pair, but got none for 1-3"
    assert reasons["a.yaml"] == reasons["c.yaml"] == reasons["small.yaml"] == f"{found.chosen.spec} is better"


def test_a_folder_without_a_fitting_profile_is_passed_over(model):
    folder = model(large="layers: K8V8")
    found = resolve_auto("auto:4.25", folder, SHAPE)
    assert found.chosen.spec == "K4V4"
    assert found.rejected[0].rejected == "takes 8.25 stored bits of 4.25"


def test_statics_of_a_folder_are_read(model):
    folder = model(a="layers: K4V4\nstatics: nothing.safetensors\ntransforms: {key_offset: true}")
    (own, *_) = resolve_auto("auto", folder, SHAPE).rejected
    assert own.rejected.startswith("statics must name a file")


def test_shipped_profiles_of_the_shape_are_named_and_not_taken(tmp_path):
    shipped = load_profile("qwen25_7b_3.93bit")
    found = resolve_auto("auto", str(tmp_path), dataclasses.replace(shipped.model, name="tuned"))
    assert found.chosen.spec == "K4V4"
    names = [each.spec for each in found.rejected if each.source == "shipped"]
    assert "qwen25_7b_3.93bit" in names
    assert "llama31_3.25bit" not in names


def test_a_budget_that_needs_calibration(tmp_path):
    (line,) = problems_of("auto:3", str(tmp_path), SHAPE)
    assert line.startswith("auto:3: a budget without a profile of this model must be at least 3.25 stored bits")
    assert "needs calibration: kvtuner calibrate" in line


@pytest.mark.parametrize("spec", ["auto:", "auto:0", "auto:17", "auto:x", "auto:3.5,calibrate", "auto:-1", "auto:1e1"])
def test_wrong_budgets(spec):
    assert is_auto(spec)
    with pytest.raises(ProfileError) as caught:
        parse_budget(spec)
    (line,) = caught.value.problems
    assert "a budget must be at most 16 stored bits, such as auto:3.5, but got" in line


def test_a_budget_by_need_is_not_served():
    (line,) = problems_of("auto:fit=32768x64", "model", SHAPE)
    assert line.endswith("kvtuner calibrate takes --memory, --context and --concurrency")


def test_a_model_that_is_not_served(tmp_path):
    shape = dataclasses.replace(SHAPE, unsupported=("must have no ALiBi, but got alibi=True",))
    assert problems_of("auto", str(tmp_path), shape) == ("auto: model toy must have no ALiBi, but got alibi=True",)


def test_auto_needs_a_model():
    with pytest.raises(ProfileError, match="auto:4: profile must be looked for with a model"):
        load_profile("auto:4")
