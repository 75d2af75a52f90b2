"""What ``auto`` means for a model: where profiles are looked for, which is taken, and why the others are not."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_kvtuner.profile import auto, model_files, places
from vllm_kvtuner.profile.auto import is_auto
from vllm_kvtuner.profile.auto_request import AutoRequest, Need, parse_request
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_files import ModelFiles
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


def resolve_auto(spec, model, shape, memory=None):
    return auto.resolve_auto(spec, ModelFiles(model), shape, memory)


def problems_of(*arguments):
    with pytest.raises(ProfileError) as caught:
        resolve_auto(*arguments)
    return caught.value.problems


@pytest.mark.quick(1)
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
    assert "published/qwen25_7b_3.93bit" in names
    assert "published/llama31_3.25bit" not in names


def test_a_budget_that_needs_calibration(tmp_path):
    (line,) = problems_of("auto:3", str(tmp_path), SHAPE)
    assert line.startswith("auto:3: a budget without a profile of this model must be at least 3.25 stored bits")
    assert "needs calibration: kvtuner calibrate" in line


@pytest.mark.parametrize(
    ("spec", "request_of"),
    [
        ("auto", AutoRequest()),
        ("auto:3.5", AutoRequest(3.5)),
        ("auto:3.5,calibrate", AutoRequest(3.5, None, True)),
        ("auto:calibrate", AutoRequest(calibrate=True)),
        ("auto:fit=32768x64", AutoRequest(16, Need(32768, 64))),
        ("AUTO:FIT=32768X64,Calibrate", AutoRequest(16, Need(32768, 64), True)),
    ],
)
def test_specs(spec, request_of):
    assert is_auto(spec)
    assert parse_request(spec) == request_of


@pytest.mark.parametrize(
    "spec",
    ["", "0", "17", "x", "-1", "1e1", "fit=0x4", "fit=4x0", "fit=4", "3.5,", ",calibrate", "3.5,calibrated"],
)
def test_wrong_budgets(spec):
    spec = f"auto:{spec}"
    assert is_auto(spec)
    with pytest.raises(ProfileError) as caught:
        parse_request(spec)
    (line,) = caught.value.problems
    assert line.startswith(f"{spec}: a budget must be at most 16 stored bits, such as auto:3.5, or a need, such as")


GIB = 1 << 30


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("memory", "chosen"),
    [(64 * 32768 * 2112 + 1, "K8V8"), (64 * 32768 * 2112 - 1, "K8V4"), (64 * (32768 * 832 + 4 * 68 * 1024), "K4V2")],
)
def test_a_budget_by_need_takes_the_most_bits_that_fit(memory, chosen, tmp_path):
    # 4 layers of 2 heads of 128: 8.25 stored bits are 2,112 bytes a token, 3.25 are 832; windows hold 68 tokens.
    found = resolve_auto("auto:fit=32768x64", str(tmp_path), SHAPE, memory)
    assert found.chosen.spec == chosen
    assert found.budget == f"64 requests of 32,768 tokens in {memory:,} bytes"


@pytest.mark.slow
def test_a_need_that_does_not_fit_is_told_what_does(tmp_path):
    (line,) = problems_of("auto:fit=32768x64", str(tmp_path), SHAPE, GIB // 2)
    assert line.endswith("of it fit 19 requests of 32,768 tokens, or 64 of 9,744")  # two bits would not do either
    (line,) = problems_of("auto:fit=32768x64", str(tmp_path), SHAPE, 3 * GIB // 2)
    assert line.startswith(
        "auto:fit=32768x64: 64 requests of 32,768 tokens must fit in 1,610,612,736 bytes, but got 1,762,656,256 of "
        "K4V2 (3.25 stored bits); of it fit 58 requests of 32,768 tokens, or 64 of 29,904; fewer bits need "
        "calibration: "
    )
    assert "--memory 1610612736 --context 32768 --concurrency 64" in line


def test_a_need_needs_memory(tmp_path):
    (line,) = problems_of("auto:fit=32768x64", str(tmp_path), SHAPE)
    assert line.endswith("must be given with the memory of keys and values (--memory), but got none")


def test_nothing_is_calibrated_here(tmp_path):
    (line,) = problems_of("auto:3.5,calibrate", str(tmp_path), SHAPE)
    assert f"kvtuner calibrate {tmp_path} --quick --max-bits 3.5 --out" in line


@pytest.mark.slow
def test_half_a_bit_more_is_better_than_calibration(model):
    folder = model(a="layers: K4V2", b="layers: {0-1: K4V4, 2-3: K4V2}")
    found = resolve_auto("auto:4.25", folder, SHAPE)
    assert found.chosen.spec == f"{folder}/kvtuner/b.yaml"  # 3.75 bits, where K4V4 has 4.25
    found = resolve_auto("auto:6.25", folder, SHAPE)
    assert found.chosen.spec == "K8V4"
    reasons = [each.rejected for each in found.rejected if each.source == "the model's folder"]
    better = "where K8V4 holds 6.25 within the budget"
    assert reasons == [f"holds {bits} stored bits, {better}" for bits in (3.25, 3.75)]


@pytest.fixture
def weighted(model, monkeypatch, tmp_path):
    """A model's folder with weights, and the digest of these."""
    monkeypatch.setenv("KVTUNER_PROFILE_FOLDER", str(tmp_path / "mine"))

    def make(**profiles):
        folder = model(**profiles)
        save_file({"k_proj": np.arange(12.0)}, f"{folder}/model.safetensors")
        return folder, ModelFiles(folder).weights

    return make


@pytest.mark.slow
def test_profiles_of_the_user_are_found_by_weights(weighted, tmp_path):
    folder, weights = weighted()
    for name, digest in (("right", weights), ("wrong", "0" * 16)):
        (tmp_path / "mine" / digest).mkdir(parents=True)
        text = f"version: 1\nlayers: K4V2\nprovenance: {{name: {name}}}\n"
        (tmp_path / "mine" / digest / "3.25bit.yaml").write_text(text)
    found = resolve_auto("auto:3.5", folder, SHAPE)
    assert found.chosen.source == "the user's folder"
    assert load_profile(found.chosen.spec).provenance == {"name": "right"}
    save_file({"k_proj": np.arange(12.0) + 1}, f"{folder}/model.safetensors")
    assert resolve_auto("auto:3.5", folder, SHAPE).chosen.spec == "K4V2"


def test_weights_are_not_read_for_nothing(weighted, monkeypatch):
    folder, _ = weighted()
    monkeypatch.setattr(model_files, "weights_digest", lambda _: pytest.fail("weights were read"))
    assert resolve_auto("auto:3.5", folder, SHAPE).chosen.spec == "K4V2"


def test_the_users_folder_says_that_weights_are_missing(model, monkeypatch, tmp_path):
    monkeypatch.setenv("KVTUNER_PROFILE_FOLDER", str(tmp_path / "mine"))
    (tmp_path / "mine" / "ab").mkdir(parents=True)
    (tmp_path / "mine" / "ab" / "a.yaml").write_text("version: 1\nlayers: K4V2\n")
    (first, *_) = resolve_auto("auto:3.5", model(), SHAPE).rejected
    assert first.rejected == "needs the model's weights, which are not on this machine yet"


MODEL = "model: {name: toy, architecture: ToyForCausalLM, num_layers: 4, num_kv_heads: 2, head_size: 128, weights: %s}"


@pytest.mark.slow
def test_a_profile_of_other_weights_is_not_taken(weighted):
    folder, weights = weighted(
        a=f"layers: K4V4\n{MODEL % repr('0' * 16)}", b=f"layers: K4V2\n{MODEL % 'any'}", c="layers: K2V2"
    )
    found = resolve_auto("auto:4.25", folder, SHAPE)
    assert found.rejected[0].rejected == (
        f"model.weights must be those of the model, {weights}, or any, but got 0000000000000000"
    )
    assert resolve_auto("auto:3.5", folder, SHAPE).chosen.spec.endswith("b.yaml")


@pytest.mark.parametrize("value", ["1234567890123456", "[ab]", "ABCDEF0123456789", "'short'"])
def test_wrong_digests(value, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(f"version: 1\nlayers: K4V4\n{MODEL % value}\n")
    with pytest.raises(ProfileError, match=r"model\.weights must be 16 hexadecimal digits, in quotes, or any, but got"):
        load_profile(str(path))


def test_shipped_profiles_of_these_weights_are_taken(weighted, monkeypatch, tmp_path):
    folder, weights = weighted()
    path = tmp_path / "toy.yaml"
    path.write_text(f"version: 1\nlayers: K4V2\n{MODEL % repr(weights)}\n")
    monkeypatch.setattr(places, "shipped_profiles", lambda: {str(path): path})
    found = resolve_auto("auto:3.5", folder, SHAPE)
    assert (found.chosen.spec, found.chosen.source) == (str(path), "shipped")
    save_file({"k_proj": np.zeros(12)}, f"{folder}/model.safetensors")
    found = resolve_auto("auto:3.5", folder, SHAPE)
    assert found.chosen.spec == "K4V2"
    assert "model.weights must be those of the model" in found.rejected[0].rejected


def test_a_model_that_is_not_served(tmp_path):
    shape = dataclasses.replace(SHAPE, unsupported=("must have no ALiBi, but got alibi=True",))
    assert problems_of("auto", str(tmp_path), shape) == ("auto: model toy must have no ALiBi, but got alibi=True",)


def test_auto_needs_a_model():
    with pytest.raises(ProfileError, match="auto:4: profile must be looked for with a model"):
        load_profile("auto:4")
