"""What a pair alone means: the treatment that needs no data, and what of it a model does not allow."""

import pytest

from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.pair import is_pair
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import FROM_WEIGHTS, RecentWindow

SHAPE = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 4)
NO_DATA = ("key_offset", "key_hadamard", "value_hadamard", "range_search", "key_round_feedback")


def test_a_pair_has_the_treatment_that_needs_no_data():
    profile = load_profile("k4v2")
    assert (profile.name, profile.source, profile.statics) == ("K4V2", None, None)
    for layer in profile.resolve(SHAPE).layers:
        assert layer.pair == PrecisionPair(4, 2)
        assert layer.transforms.names == NO_DATA
        assert layer.transforms.key_offset == layer.transforms.key_round_feedback == FROM_WEIGHTS
        assert layer.transforms.needs_model
        assert not layer.transforms.needs_statics
        assert layer.recent == RecentWindow(64, 16, 4)


@pytest.mark.parametrize("spec", ["K4V2:plain", "k4v2:PLAIN"])
def test_plain_is_the_bare_format(spec):
    profile = load_profile(spec)
    assert profile.name == "K4V2:plain"
    (layer, *_) = profile.resolve(SHAPE).layers
    assert (layer.transforms.names, layer.recent) == ((), None)


def test_eight_bits_need_no_window():
    (layer, *_) = load_profile("K8V8").resolve(SHAPE).layers
    assert layer.recent is None
    assert layer.transforms.names == NO_DATA[:3]


def test_16_bits_have_no_treatment():
    (layer, *_) = load_profile("K16V16").resolve(SHAPE).layers
    assert (layer.transforms.names, layer.recent) == ((), None)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("K5V4", "K5V4: k_bits must be one of (2, 4, 8, 16), but got 5"),
        ("K4V4:bare", "K4V4:bare: a pair must be followed by nothing or by :plain, but got 'bare'"),
        ("K4V4:", "K4V4:: a pair must be followed by nothing or by :plain, but got ''"),
    ],
)
def test_wrong_pairs(spec, problem):
    assert is_pair(spec)
    with pytest.raises(ProfileError) as caught:
        load_profile(spec)
    assert caught.value.problems == (problem,)


def test_a_pair_gives_windows_to_the_layers_of_the_commonest_shape():
    shape = ModelShape("toy", "ToyForCausalLM", (*SHAPE.layers, LayerShape(1, 128)))
    resolved = load_profile("K4V4").resolve(shape)
    assert [layer.recent is not None for layer in resolved.layers] == [True] * 4 + [False]
    assert resolved.profile.left_out == ("the recent window of layers 4, whose shape is another",)


def test_an_offset_from_weights_in_a_file(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "version: 1\nlayers: K4V4\ntransforms: {key_offset: from_weights, overrides: {1: {key_offset: false}}}\n"
    )
    layers = load_profile(str(path)).resolve(SHAPE).layers
    assert [layer.transforms.key_offset for layer in layers] == [FROM_WEIGHTS, False, FROM_WEIGHTS, FROM_WEIGHTS]


def test_keys_of_8_bits_have_no_feedback():
    (layer, *_) = load_profile("K8V4").resolve(SHAPE).layers
    assert layer.transforms.names == NO_DATA[:4]


def test_feedback_from_weights_in_a_file(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(
        "version: 1\nlayers: {0-1: K4V4, 2-3: K8V4}\n"
        "transforms:\n  key_hadamard: true\n  key_round_feedback: from_weights\n"
        "  overrides: {1: {key_round_feedback: false}}\n"
    )
    layers = load_profile(str(path)).resolve(SHAPE).layers
    assert [layer.transforms.key_round_feedback for layer in layers] == [FROM_WEIGHTS, False, False, False]
    assert [layer.transforms.needs_model for layer in layers] == [True, False, False, False]
    assert not any(layer.transforms.needs_statics for layer in layers)


def test_feedback_from_weights_needs_the_rotation(tmp_path):
    """Without it its metric is diagonal, which is nearest rounding in a range that nobody searches."""
    path = tmp_path / "p.yaml"
    path.write_text(
        "version: 1\nlayers: K4V4\ntransforms: {key_round_feedback: from_weights, overrides: {"
        "1: {key_hadamard: true}, 2: {key_hadamard: false}, 3: {value_hadamard: true}}}\n"
    )
    with pytest.raises(ProfileError) as caught:
        load_profile(str(path))
    rule = "must be true or false without key_hadamard, by which the channels that weights weigh come together"
    assert caught.value.problems == tuple(
        f"{path}: transforms{where}.key_round_feedback {rule}, but got from_weights" for where in ("", ".overrides.2")
    )


def test_what_cannot_follow_weights_is_refused(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\nlayers: K4V4\ntransforms: {key_offset: weights, key_equalization: from_weights}\n")
    with pytest.raises(ProfileError) as caught:
        load_profile(str(path))
    assert caught.value.problems[:2] == (
        f"{path}: transforms.key_offset must be true, false or from_weights, but got 'weights'",
        f"{path}: transforms.key_equalization must be true or false, but got 'from_weights'",
    )
