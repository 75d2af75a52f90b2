"""The choice of transforms by measured error, its statics, and the sensitivity that follows."""

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from kvtuner_tools.calibration import transform_choice
from kvtuner_tools.calibration.artifacts import SensitivityTable
from kvtuner_tools.calibration.sensitivity import measure_sensitivity
from kvtuner_tools.calibration.table_stages import SENSITIVITY_FILE
from kvtuner_tools.calibration.transform_choice import TRANSFORMS_FILE, TransformChoice, choose_transforms
from tests.helpers.capture import (  # noqa: F401 (a fixture)
    HEAD_SIZE,
    LAYER,
    NUM_KV_HEADS,
    make_capture,
    one_thread,
)
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import RecentWindow, TransformSettings
from vllm_kvtuner.profile.statics import LayerStatics, load_statics

DATA_FREE = TransformSettings(key_hadamard=True, value_hadamard=True, range_search=True)
OUTLIERS = torch.zeros(NUM_KV_HEADS, HEAD_SIZE)
OUTLIERS[:, [5, 20, 60]] = torch.tensor([40.0, -30.0, 25.0])
SHAPE = ModelShape("numbers", "NumbersForCausalLM", (LayerShape(NUM_KV_HEADS, HEAD_SIZE),))

pytestmark = pytest.mark.usefixtures("one_thread", "without_bias")


@pytest.fixture
def without_bias(monkeypatch):
    def refuse(model):
        raise ProfileError([f"{model}: no bias"])

    monkeypatch.setattr(transform_choice, "key_offsets", refuse)


@pytest.fixture
def with_bias(monkeypatch, without_bias):
    """A k projection whose bias is half of the planted offset."""
    statics = {0: LayerStatics(key_offset=(OUTLIERS / 2).numpy())}
    monkeypatch.setattr(transform_choice, "key_offsets", lambda model: statics)


def choose(capture, folder):
    (layer,) = choose_transforms(capture, folder, device="cpu").layers
    return layer


def resolve(folder, layer):
    document = {
        "version": 1,
        "layers": {0: "K4V4"},
        "transforms": asdict(layer.transforms),
        "statics": "statics.safetensors",
    }
    (folder / "p.yaml").write_text(yaml.safe_dump(document))
    return load_profile(str(folder / "p.yaml")).resolve(SHAPE)


@pytest.mark.slow
def test_plain_keys_keep_the_data_free_choice(tmp_path):
    layer = choose(make_capture(tmp_path / "capture"), tmp_path)
    assert (layer.transforms, layer.offset, layer.equalization) == (DATA_FREE, "none", "none")
    assert layer.errors["chosen"] == layer.errors["data-free"]
    assert layer.errors["chosen"]["near"]["K2V2"] < 0.8 * layer.errors["none"]["near"]["K2V2"]
    assert not (tmp_path / "statics.safetensors").exists()


@pytest.mark.slow
def test_planted_outlier_channels_make_it_pick_their_mean(tmp_path):
    layer = choose(make_capture(tmp_path / "capture", offset=OUTLIERS), tmp_path)
    assert layer.offset == "mean" and layer.transforms.key_offset
    for positions in ("near", "far"):
        errors = {setting: pairs[positions]["K4V4"] for setting, pairs in layer.errors.items()}
        assert errors["chosen"] < 0.5 * errors["data-free"]
    assert layer.far_position == 16384 - 192
    # Of the mean's pairs, those with the planted channels are kept, and what a multiple of eight leaves room for.
    assert layer.offset_pairs == 8
    offset = load_file(tmp_path / "statics.safetensors")["layers.0.key_offset"]
    pairs = offset.unflatten(1, (2, -1)).ne(0).any(1)
    assert pairs.sum(1).tolist() == [8] * NUM_KV_HEADS
    assert pairs[:, [channel % (HEAD_SIZE // 2) for channel in (5, 20, 60)]].all()


@pytest.mark.slow
def test_an_offset_that_needs_all_of_its_pairs_keeps_them(tmp_path):
    spread = 20 * (-1.0) ** torch.arange(HEAD_SIZE).expand(NUM_KV_HEADS, -1)
    layer = choose(make_capture(tmp_path / "capture", offset=spread), tmp_path)
    assert (layer.offset, layer.offset_pairs) == ("mean", None)


@pytest.mark.slow
def test_far_positions_do_not_lose(tmp_path):
    layer = choose(make_capture(tmp_path / "capture", offset=OUTLIERS), tmp_path)
    near, far = layer.errors["chosen"]["near"], layer.errors["chosen"]["far"]
    for pair, error in near.items():
        assert far[pair] == pytest.approx(error, rel=0.1)


@pytest.mark.slow
def test_a_bias_is_the_baseline_and_a_better_mean_replaces_it(tmp_path, with_bias):
    layer = choose(make_capture(tmp_path / "half", offset=OUTLIERS), tmp_path / "half")
    assert layer.offset == "mean"
    # Where the bias is the whole offset, its mean gains nothing and the choice needs no data.
    layer = choose(make_capture(tmp_path / "whole", offset=OUTLIERS / 2), tmp_path / "whole")
    assert layer.offset == "bias"
    resolved = resolve(tmp_path / "whole", layer)
    np.testing.assert_array_equal(load_statics(resolved.profile.statics, resolved)[0].key_offset, OUTLIERS / 2)


@pytest.mark.slow
def test_uneven_pairs_are_equalized_by_keys_and_queries(tmp_path):
    spread = torch.logspace(-0.7, 0.7, HEAD_SIZE // 2).repeat(2)
    layer = choose(make_capture(tmp_path / "capture", spread=spread, query_spread=1 / spread), tmp_path)
    assert layer.equalization == "keys and queries"
    assert layer.errors["chosen"]["far"]["K4V8"] < 0.8 * layer.errors["data-free"]["far"]["K4V8"]
    resolved = resolve(tmp_path, layer)
    factors = torch.from_numpy(load_statics(resolved.profile.statics, resolved)[0].key_equalization)
    torch.testing.assert_close(factors, (spread / spread.log().mean().exp()).expand_as(factors), rtol=0.2, atol=0)


@pytest.mark.slow
def test_values_of_few_levels_are_not_rotated(tmp_path):
    capture = make_capture(tmp_path / "capture")
    for window in range(3):
        path = capture.folder / f"window-{window:04d}" / "layer-000.safetensors"
        tensors = load_file(path)
        tensors["value"] = (tensors["value"] > 0).float()  # exact at any bits, and no longer so once rotated
        tensors["value"][..., 0], tensors["value"][..., 1] = 0.1, 0.0
        save_file(tensors, path)
    layer = choose(capture, tmp_path)
    assert not layer.transforms.value_hadamard and layer.transforms.key_hadamard


def test_where_keys_before_rope_cannot_be_had_the_choice_is_data_free_and_says_so(tmp_path):
    reason = "positions are not one number per token (M-RoPE, mrope_section=[16, 24, 24])"
    layer = replace(LAYER, rotary=None, offset_unsupported=reason)
    chosen = choose(make_capture(tmp_path / "capture", offset=OUTLIERS, layer=layer), tmp_path)
    assert not chosen.transforms.needs_statics
    assert chosen.note == reason and chosen.far_position is None
    assert set(chosen.errors["chosen"]) == {"near"}


@pytest.mark.slow
def test_the_choice_is_read_again_and_made_again_from_another_capture(tmp_path, monkeypatch):
    capture = make_capture(tmp_path / "capture", offset=OUTLIERS)
    first = choose_transforms(capture, tmp_path, device="cpu")
    assert TransformChoice.read(tmp_path) == first
    with monkeypatch.context() as patch:
        patch.setattr(transform_choice, "TransformCandidates", None)
        assert choose_transforms(capture, tmp_path, device="cpu") == first
    other = choose_transforms(replace(capture, inputs="other"), tmp_path, device="cpu")
    assert other.inputs != first.inputs and other.layers == first.layers
    (tmp_path / "statics.safetensors").unlink()
    choose_transforms(replace(capture, inputs="other"), tmp_path, device="cpu")
    assert (tmp_path / "statics.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("other", [RecentWindow(48), RecentWindow(32, sink_tokens=4)])
def test_the_choice_is_made_again_for_another_window_or_other_sinks(tmp_path, other):
    """By errors that are theirs, near and far, which the sensitivity equals."""
    capture = make_capture(tmp_path / "capture", offset=OUTLIERS)
    first = choose_transforms(capture, tmp_path, recent_window=RecentWindow(32), device="cpu")
    again = choose_transforms(capture, tmp_path, recent_window=other, device="cpu")
    assert TransformChoice.read(tmp_path) == again and again.inputs != first.inputs
    for setting, positions in itertools.product(("none", "chosen"), ("near", "far")):
        errors = [choice.layers[0].errors[setting][positions] for choice in (first, again)]
        assert errors[0] != pytest.approx(errors[1], rel=1e-3)
    (layer,) = measure_sensitivity(capture, again, tmp_path, recent_window=other, device="cpu").layers
    assert layer.output_error == pytest.approx(again.layers[0].errors["chosen"]["near"], rel=1e-4)


def test_a_floor_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="floor must be at least 0 and below 1, but got 1"):
        choose_transforms(make_capture(tmp_path / "capture"), tmp_path, floor=1)


@pytest.mark.slow
def test_sensitivity_is_the_chosen_error_per_pair_and_head(tmp_path):
    capture = make_capture(tmp_path / "capture", offset=OUTLIERS)
    choice = choose_transforms(capture, tmp_path, device="cpu")
    table = measure_sensitivity(capture, choice, tmp_path, device="cpu")
    assert SensitivityTable.read(tmp_path / SENSITIVITY_FILE) == table
    (layer,) = table.layers
    assert layer.transforms == choice.layers[0].transforms
    assert layer.output_error == pytest.approx(choice.layers[0].errors["chosen"]["near"], rel=1e-4)
    assert layer.score_error["K8"] < layer.score_error["K4"] < layer.score_error["K2"]
    for pair, heads in layer.output_error_per_head.items():
        assert min(heads) <= layer.output_error[pair] <= max(heads)


@pytest.mark.slow
def test_sensitivity_without_transforms(tmp_path):
    capture = make_capture(tmp_path / "capture", offset=OUTLIERS)
    choice = choose_transforms(capture, tmp_path, device="cpu")
    (layer,) = measure_sensitivity(capture, None, tmp_path, device="cpu").layers
    assert layer.transforms == TransformSettings()
    assert layer.output_error == pytest.approx(choice.layers[0].errors["none"]["near"], rel=1e-4)
    assert layer.output_error["K4V4"] > 3 * choice.layers[0].errors["chosen"]["near"]["K4V4"]


@pytest.mark.slow
def test_a_damaged_choice_is_made_again(tmp_path):
    capture = make_capture(tmp_path / "capture")
    choice = choose_transforms(capture, tmp_path, device="cpu")
    (tmp_path / TRANSFORMS_FILE).write_text("{")
    with pytest.raises(ProfileError, match="must be JSON"):
        TransformChoice.read(tmp_path)
    assert choose_transforms(capture, tmp_path, device="cpu") == choice
