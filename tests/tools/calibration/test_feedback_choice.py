"""The choice of round feedback by measured error, its statics, and the sensitivity that follows."""

from dataclasses import replace

import pytest
import torch
import yaml
from safetensors import safe_open

from kvtuner_tools.calibration import feedback_choice, key_statics, transform_choice
from kvtuner_tools.calibration.feedback_choice import (
    FEEDBACK_FILE,
    FEEDBACK_STATICS_FILE,
    HELDOUT_EVERY,
    RANGES,
    FeedbackChoice,
    choose_feedback,
)
from kvtuner_tools.calibration.sensitivity import measure_sensitivity
from kvtuner_tools.calibration.transform_choice import TransformChoice, choose_transforms, layer_transforms
from tests.helpers.capture import (  # noqa: F401 (a fixture)
    HEAD_SIZE,
    LAYER,
    NUM_HEADS,
    NUM_KV_HEADS,
    make_capture,
    one_thread,
)
from vllm_kvtuner.pages.codes import code_format
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import RecentWindow
from vllm_kvtuner.profile.statics import load_statics

GROUP = NUM_HEADS // NUM_KV_HEADS
OFFSET = torch.zeros(NUM_KV_HEADS, HEAD_SIZE)
OFFSET[:, [5, 60]] = torch.tensor([30.0, 25.0])
FEW = torch.full((HEAD_SIZE,), 0.1)
"""Spread of queries that ask in a few slow RoPE pairs: an error in those costs hundreds of times one in the others."""
FEW[28:32] = FEW[60:64] = 4.0
SHAPE = ModelShape("numbers", "NumbersForCausalLM", (LayerShape(NUM_KV_HEADS, HEAD_SIZE),))

pytestmark = pytest.mark.usefixtures("one_thread", "without_bias")


@pytest.fixture
def without_bias(monkeypatch):
    def refuse(model):
        raise ProfileError([f"{model}: no bias"])

    monkeypatch.setattr(transform_choice, "key_offsets", refuse)


def flat_gram():
    """Every number of an output counts alike, and alone."""
    return torch.eye(GROUP * HEAD_SIZE).view(GROUP, HEAD_SIZE, GROUP, HEAD_SIZE).expand(NUM_KV_HEADS, -1, -1, -1, -1)


def low_gram(rank=8):
    """Only a few directions of an output are read."""
    root = torch.randn(NUM_KV_HEADS, rank, GROUP * HEAD_SIZE, generator=torch.Generator().manual_seed(1))
    gram = root.mT @ root + 1e-3 * torch.eye(GROUP * HEAD_SIZE)
    return gram.view(NUM_KV_HEADS, GROUP, HEAD_SIZE, GROUP, HEAD_SIZE)


def capture_of(folder, gram, **options):
    defaults = {"offset": OFFSET, "query_spread": FEW, "num_windows": 4, "output_gram": gram.contiguous()}
    return make_capture(folder / "capture", **{**defaults, **options})


def choose(capture, folder, **options):
    choice = choose_transforms(capture, folder, device="cpu", **options)
    return choose_feedback(capture, choice, folder, device="cpu", **options)


def loaded(folder, layer, pair):
    """The layer's statics as an engine loads them for a pair."""
    transforms = dict.fromkeys(layer.transforms.names, True)
    document = {"version": 1, "layers": {0: pair}, "statics": FEEDBACK_STATICS_FILE, "transforms": transforms}
    path = folder / f"{pair}.yaml"
    path.write_text(yaml.safe_dump(document))
    resolved = load_profile(str(path)).resolve(SHAPE)
    return load_statics(resolved.profile.statics, resolved)[0]


@pytest.mark.slow
@pytest.mark.parametrize("recent_window", [None, RecentWindow(32, sink_tokens=4)], ids=["no window", "window"])
def test_feedback_is_chosen_where_few_directions_count(tmp_path, recent_window):
    capture = capture_of(tmp_path, low_gram())
    choice = choose(capture, tmp_path, recent_window=recent_window)
    (layer,) = choice.layers
    assert layer.transforms.key_round_feedback and layer.transforms.value_round_feedback and layer.note is None
    before = choose_transforms(capture, tmp_path, recent_window=recent_window, device="cpu").transforms[0]
    assert layer.transforms == replace(before, key_round_feedback=True, value_round_feedback=True)
    assert layer.keys.ratio < 0.7 and layer.values.ratio < 0.8
    for side in (layer.keys, layer.values):
        assert side.is_on and side.errors["feedback"]["4"] < side.errors["feedback"]["2"]
        for bits, ranges in side.ranges.items():
            assert ranges in RANGES[int(bits)] or any(ranges == each[1:2] for each in RANGES[int(bits)])
    for pair in ("K2V4", "K4V2"):
        static = loaded(tmp_path, layer, pair)
        assert static.key_offset is not None
        assert static.key_round_feedback.ranges == {int(pair[1]): pytest.approx(layer.keys.ranges[pair[1]])}
        assert static.value_round_feedback.ranges == {int(pair[3]): pytest.approx(layer.values.ranges[pair[3]])}
    with safe_open(tmp_path / FEEDBACK_STATICS_FILE, framework="numpy") as file:
        assert file.metadata()["rotary_dim"] == str(HEAD_SIZE) and file.metadata()["method"] == "calibration"


@pytest.mark.slow
def test_keys_with_feedback_are_equalized_for_it(tmp_path, monkeypatch):
    """Channels of unlike keys and queries that balance them: nearest codes need no factors, feedback does."""
    spread = torch.logspace(-1, 1, HEAD_SIZE // 2).repeat(2)
    capture = capture_of(tmp_path, low_gram(), offset=None, spread=spread, query_spread=2 * spread)
    (layer,) = choose(capture, tmp_path).layers
    assert layer.equalization in key_statics.WHITENING and layer.transforms.key_equalization
    factors = torch.from_numpy(loaded(tmp_path, layer, "K2V2").key_equalization)
    wanted = spread ** key_statics.WHITENING[layer.equalization]
    assert torch.allclose(factors, wanted / wanted.log().mean().exp(), rtol=0.25)
    monkeypatch.setattr(key_statics, "WHITENING", {})
    (plain,) = choose(capture, tmp_path / "plain").layers
    assert plain.equalization is None and not plain.transforms.key_equalization
    assert layer.keys.ratio < 0.95 * plain.keys.ratio


@pytest.mark.slow
def test_nearest_codes_are_kept_where_all_errors_count_alike(tmp_path):
    capture = capture_of(tmp_path, flat_gram(), query_spread=torch.ones(HEAD_SIZE))
    (layer,) = choose(capture, tmp_path).layers
    assert not layer.transforms.value_round_feedback and not layer.values.is_on
    assert 1 <= layer.values.ratio < 1.1
    assert loaded(tmp_path, layer, "K4V2").value_round_feedback is None


@pytest.mark.slow
def test_the_windows_that_choose_do_not_make_the_factors(tmp_path, monkeypatch):
    seen = []
    real = feedback_choice.round_metrics

    def spy(layer, windows, *others):
        windows = list(windows)
        seen.append(len(windows))
        return real(layer, windows, *others)

    monkeypatch.setattr(feedback_choice, "round_metrics", spy)
    capture = capture_of(tmp_path, low_gram(), num_windows=2 * HELDOUT_EVERY + 1, num_tokens=64)
    choose(capture, tmp_path)
    assert seen == [2 * HELDOUT_EVERY - 1, 2]


@pytest.mark.slow
def test_sensitivity_counts_errors_as_what_reads_them(tmp_path):
    capture = capture_of(tmp_path, low_gram())
    choice = choose(capture, tmp_path)
    (layer,) = measure_sensitivity(capture, choice, tmp_path, device="cpu").layers
    assert layer.transforms == choice.layers[0].transforms
    nearest = choose_transforms(capture, tmp_path, device="cpu")
    (before,) = measure_sensitivity(capture, nearest, tmp_path, device="cpu").layers
    off = replace(layer.transforms, key_round_feedback=False, value_round_feedback=False)
    without = replace(choice, layers=(replace(choice.layers[0], transforms=off),))
    (weighted,) = measure_sensitivity(capture, without, tmp_path, device="cpu").layers
    assert layer.output_error["K2V2"] < 0.8 * weighted.output_error["K2V2"]
    assert weighted.output_error["K2V2"] != pytest.approx(before.output_error["K2V2"], rel=1e-3)
    assert layer.output_error["K8V8"] == pytest.approx(weighted.output_error["K8V8"]), "8 bits are nearest codes"
    for pair, heads in layer.output_error_per_head.items():
        assert min(heads) <= layer.output_error[pair] <= max(heads)


@pytest.mark.slow
def test_the_layers_transforms_round_as_the_statics_say(tmp_path):
    capture = capture_of(tmp_path, low_gram())
    choice = choose(capture, tmp_path)
    built = layer_transforms(choice.transforms, tmp_path / choice.statics)[0]
    static = loaded(tmp_path, choice.layers[0], "K2V2")
    assert torch.equal(built.key_feedback.factors, torch.from_numpy(static.key_round_feedback.factors))
    rows = torch.randn(50, NUM_KV_HEADS, HEAD_SIZE)
    got = code_format(2).round_trip(rows, True, built.key_feedback)
    assert not torch.equal(got, code_format(2).round_trip(rows, True))


@pytest.mark.slow
def test_the_choice_is_read_again_and_made_again_from_other_inputs(tmp_path, monkeypatch):
    capture = capture_of(tmp_path, low_gram(), num_tokens=64)
    first = choose(capture, tmp_path)
    assert FeedbackChoice.read(tmp_path) == first
    with monkeypatch.context() as patch:
        patch.setattr(feedback_choice, "round_metrics", None)
        assert choose(capture, tmp_path) == first
    transforms = TransformChoice.read(tmp_path)
    for inputs in ((replace(capture, inputs="other"), transforms), (capture, replace(transforms, inputs="other"))):
        other = choose_feedback(*inputs, tmp_path, device="cpu")
        assert other.inputs != first.inputs and other.layers == first.layers
    assert choose_feedback(capture, transforms, tmp_path, recent_window=RecentWindow(16), device="cpu") != first
    (tmp_path / FEEDBACK_STATICS_FILE).unlink()
    choose(capture, tmp_path)
    assert (tmp_path / FEEDBACK_STATICS_FILE).exists()
    (tmp_path / FEEDBACK_FILE).write_text("{")
    assert choose(capture, tmp_path) == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "note", "has_values"),
    [
        ({"gram": None}, "nothing reads these numbers", False),
        ({"num_windows": 1}, "text must have at least two windows, one of them to measure on", False),
        ({"layer": replace(LAYER, rotary=None, offset_unsupported="M-RoPE")}, "M-RoPE", True),
    ],
    ids=["no gram", "one window", "no keys before RoPE"],
)
def test_where_it_cannot_be_had_the_choice_says_why(tmp_path, options, note, has_values):
    options = dict(options)
    gram = options.pop("gram", low_gram())
    capture = make_capture(tmp_path / "capture", **{"output_gram": gram, "num_windows": 2, **options})
    choice = choose(capture, tmp_path)
    (layer,) = choice.layers
    assert layer.note == note and layer.keys is None and not layer.transforms.key_round_feedback
    assert (layer.values is not None) == layer.transforms.value_round_feedback == has_values
    measure_sensitivity(capture, choice, tmp_path, device="cpu")
