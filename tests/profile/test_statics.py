"""Statics files: round trip, and everything that can be wrong with one."""

import numpy as np
import pytest
import safetensors.numpy

from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.statics import FeedbackStatics, LayerStatics, load_statics, rope_pairs, save_statics

SHAPE = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 3)
PROFILE = """\
version: 1
layers: {0-1: K4V4, 2: K16V16}
transforms:
  key_offset: true
  overrides: {1: {key_equalization: true}}
statics: s.safetensors
"""
NAMES = " or ".join(
    f"layers.<layer>.{name}"
    for name in (
        "key_offset",
        "key_equalization",
        "key_round_feedback",
        "value_round_feedback",
        "key_round_feedback_ranges_2bit",
        "key_round_feedback_ranges_4bit",
        "value_round_feedback_ranges_2bit",
        "value_round_feedback_ranges_4bit",
    )
)


@pytest.fixture
def resolved(tmp_path):
    (tmp_path / "s.safetensors").touch()
    (tmp_path / "p.yaml").write_text(PROFILE)
    return load_profile(str(tmp_path / "p.yaml")).resolve(SHAPE)


@pytest.fixture
def path(resolved):
    return resolved.profile.statics


def offsets(seed=0):
    return np.random.default_rng(seed).standard_normal((2, 64)).astype(np.float32)


def factors(style="neox", rotary_dim=64):
    tensor = np.random.default_rng(1).uniform(0.5, 2, (2, 64)).astype(np.float32)
    first, second = rope_pairs(64, rotary_dim, style)
    tensor[:, second] = tensor[:, first]
    return tensor


def good_tensors():
    return {
        "layers.0.key_offset": offsets(0),
        "layers.1.key_offset": offsets(1),
        "layers.1.key_equalization": factors(),
    }


def problems_of(path, resolved):
    with pytest.raises(ProfileError) as caught:
        load_statics(path, resolved)
    assert all(line.startswith(f"{path}: ") for line in caught.value.problems)
    return [line.removeprefix(f"{path}: ") for line in caught.value.problems]


def test_round_trip(path, resolved):
    statics = {0: LayerStatics(key_offset=offsets(0)), 1: LayerStatics(offsets(1), factors())}
    save_statics(path, statics, {"model": "toy"})
    loaded = load_statics(path, resolved)
    assert set(loaded) == {0, 1}, "a K16V16 layer uses no statics"
    np.testing.assert_array_equal(loaded[0].key_offset, offsets(0))
    assert loaded[0].key_equalization is None
    np.testing.assert_array_equal(loaded[1].key_offset, offsets(1))
    np.testing.assert_array_equal(loaded[1].key_equalization, factors())
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"model": "toy"}
    assert [each.name for each in path.parent.glob("*.safetensors*")] == ["s.safetensors"]


def test_tensors_of_transforms_that_are_off_are_not_read(path, resolved):
    extra = {"layers.0.key_equalization": -np.ones((7, 7), np.float32)}
    safetensors.numpy.save_file(good_tensors() | extra, path)
    assert load_statics(path, resolved)[0].key_equalization is None


def test_all_problems_at_once(path, resolved):
    bad = good_tensors() | {"layers.0.key_offset": np.zeros((2, 32), np.float16), "layer.0.key_offset": offsets()}
    del bad["layers.1.key_offset"]
    bad["layers.1.key_equalization"][1, 5] = -1
    safetensors.numpy.save_file(bad, path)
    assert problems_of(path, resolved) == [
        f"tensors must be named {NAMES}, but got ['layer.0.key_offset']",
        "layers.0.key_offset must have the shape (2, 64) (num_kv_heads, head_size), but got (2, 32)",
        "layers.0.key_offset must be F32, but got F16",
        "layers.1.key_offset must be there, since the profile uses it, but got none",
        "layers.1.key_equalization must be positive, but got -1 in channel 5 of head 1",
        "layers.1.key_equalization must be equal within a RoPE pair (neox, rotary_dim 64),"
        + f" but got -1 and {factors()[1, 5]:g} in channels 5 and 37 of head 1",
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_must_be_finite(path, resolved, value):
    tensors = good_tensors()
    tensors["layers.1.key_offset"][1, 63] = value
    safetensors.numpy.save_file(tensors, path)
    (problem,) = problems_of(path, resolved)
    assert problem == f"layers.1.key_offset must be finite, but got {value:g} in channel 63 of head 1"


def test_factors_must_be_positive_zero_included(path, resolved):
    tensors = good_tensors()
    tensors["layers.1.key_equalization"][0, [3, 35]] = 0
    safetensors.numpy.save_file(tensors, path)
    (problem,) = problems_of(path, resolved)
    assert problem == "layers.1.key_equalization must be positive, but got 0 in channel 3 of head 0"


@pytest.mark.parametrize(
    ("style", "rotary_dim"), [("neox", 64), ("neox", 32), ("interleaved", 64), ("interleaved", 16)]
)
def test_pairs_are_those_of_the_models_rotation(path, resolved, style, rotary_dim):
    tensors = good_tensors() | {"layers.1.key_equalization": factors(style, rotary_dim)}
    metadata = {"rope_style": style, "rotary_dim": str(rotary_dim)}
    safetensors.numpy.save_file(tensors, path, metadata)
    load_statics(path, resolved)

    first, second = rope_pairs(64, rotary_dim, style)
    tensors["layers.1.key_equalization"][1, second[-1]] *= 2
    safetensors.numpy.save_file(tensors, path, metadata)
    (problem,) = problems_of(path, resolved)
    assert problem.endswith(f"in channels {first[-1]} and {second[-1]} of head 1")


def test_rope_pairs_by_hand():
    assert [list(side) for side in rope_pairs(8, 8, "neox")] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(side) for side in rope_pairs(8, 4, "neox")] == [[0, 1], [2, 3]]
    assert [list(side) for side in rope_pairs(8, 8, "interleaved")] == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"rotary_dim": "66"}, "metadata.rotary_dim must be an even number up to head_size 64, but got '66'"),
        ({"rotary_dim": "33"}, "metadata.rotary_dim must be an even number up to head_size 64, but got '33'"),
        ({"rotary_dim": "all"}, "metadata.rotary_dim must be an even number up to head_size 64, but got 'all'"),
        ({"rope_style": "gptj"}, "metadata.rope_style must be one of neox, interleaved, but got 'gptj'"),
    ],
)
def test_metadata(path, resolved, metadata, problem):
    safetensors.numpy.save_file(good_tensors(), path, metadata)
    assert problems_of(path, resolved) == [problem]


def test_garbage_and_truncated_files(path, resolved):
    safetensors.numpy.save_file(good_tensors(), path)
    whole = path.read_bytes()
    for content in (b"", b"garbage, not a header", whole[: len(whole) // 2], whole[:20]):
        path.write_bytes(content)
        (problem,) = problems_of(path, resolved)
        assert problem.startswith("the file must be a complete safetensors file, but got ")


def test_missing_file(path, resolved):
    path.unlink()
    (problem,) = problems_of(path, resolved)
    assert problem.startswith("the file must be readable, but got ")


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    save_statics(path, {0: LayerStatics(offsets())}, {})
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        save_statics(path, {0: LayerStatics(offsets(9))}, {})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []


@pytest.mark.parametrize("tensor", [np.full((2, 64), np.nan), np.zeros(64)])
def test_what_cannot_be_read_is_not_written(path, tensor):
    with pytest.raises(ValueError, match=r"layers.0.key_offset must be finite and \[num_kv_heads, head_size\]"):
        save_statics(path, {0: LayerStatics(tensor)}, {})


FEEDBACK_PROFILE = """\
version: 1
layers: {0: K2V4, 1: K8V2, 2: K16V16}
transforms:
  key_hadamard: true
  key_round_feedback: true
  value_round_feedback: true
  overrides: {1: {key_equalization: true, value_hadamard: true}}
statics: s.safetensors
"""


@pytest.fixture
def with_feedback(tmp_path):
    (tmp_path / "s.safetensors").touch()
    (tmp_path / "p.yaml").write_text(FEEDBACK_PROFILE)
    return load_profile(str(tmp_path / "p.yaml")).resolve(SHAPE)


def feedback_of(seed, ranges, transforms=()):
    upper = np.triu(np.random.default_rng(seed).standard_normal((2, 64, 64)), 1)
    return FeedbackStatics((upper + np.eye(64)).astype(np.float16), ranges, transforms)


def good_feedback():
    keys = feedback_of(0, {2: (0.75, 0.875, 1.0), 4: (1.0,)}, ("key_hadamard",))
    return {
        0: LayerStatics(key_round_feedback=keys, value_round_feedback=feedback_of(1, {4: (0.875, 1.125)})),
        1: LayerStatics(
            key_equalization=factors(), value_round_feedback=feedback_of(2, {2: (0.625,)}, ("value_hadamard",))
        ),
    }


def test_round_trip_of_feedback(path, with_feedback):
    """A layer gets the ranges of its pair; those of other bits are for a search over pairs."""
    statics = good_feedback()
    save_statics(path, statics, {"model": "toy"})
    loaded = load_statics(path, with_feedback)
    assert set(loaded) == {0, 1}
    for layer, kind, bits in (
        (0, "key_round_feedback", 2),
        (0, "value_round_feedback", 4),
        (1, "value_round_feedback", 2),
    ):
        got, wanted = getattr(loaded[layer], kind), getattr(statics[layer], kind)
        assert got.factors.dtype == np.float16
        np.testing.assert_array_equal(got.factors, wanted.factors)
        assert got.ranges == {bits: wanted.ranges[bits]}
        assert got.transforms == wanted.transforms
    assert loaded[1].key_round_feedback is None, "8-bit keys are rounded to their nearest codes"
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {
            "model": "toy",
            "layers.0.key_round_feedback": "key_hadamard",
            "layers.0.value_round_feedback": "none",
            "layers.1.value_round_feedback": "value_hadamard",
        }
        assert "layers.0.key_round_feedback_ranges_2bit" in file.keys()  # noqa: SIM118 (no container)


NAME = "layers.0.key_round_feedback"
SQUARE = (2, 64, 64)


def below_diagonal(tensors):
    tensors[NAME][1, 7, 3] = 0.5


def zero_diagonal(tensors):
    tensors[NAME][0, 9, 9] = 0


def negative_diagonal(tensors):
    tensors[NAME][1, 63, 63] = -2


def infinite(tensors):
    tensors[NAME][0, 1, 2] = np.inf


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (below_diagonal, [f"{NAME} must be 0 below the diagonal, but got 0.5 in row 7, column 3 of head 1"]),
        (zero_diagonal, [f"{NAME} must be positive on the diagonal, but got 0 in channel 9 of head 0"]),
        (negative_diagonal, [f"{NAME} must be positive on the diagonal, but got -2 in channel 63 of head 1"]),
        (infinite, [f"{NAME} must be finite, but got inf in row 1, column 2 of head 0"]),
        (
            {NAME: np.ones((2, 64), np.float32)},
            [
                f"{NAME} must have the shape {SQUARE} (num_kv_heads, head_size, head_size), but got (2, 64)",
                f"{NAME} must be F16, but got F32",
            ],
        ),
        ({NAME: None}, [f"{NAME} must be there, since the profile uses it, but got none"]),
        (
            {f"{NAME}_ranges_2bit": None},
            [f"{NAME}_ranges_2bit must be there, since the profile uses it, but got none"],
        ),
        (
            {f"{NAME}_ranges_2bit": np.ones(4, np.float32)},
            [f"{NAME}_ranges_2bit must have the shape (1,) or (2,) or (3,) (ranges), but got (4,)"],
        ),
        (
            {f"{NAME}_ranges_2bit": np.array([np.nan], np.float32)},
            [f"{NAME}_ranges_2bit must be finite, but got nan in range 0"],
        ),
        *(
            (
                {f"{NAME}_ranges_2bit": np.array(ranges, np.float32)},
                [f"{NAME}_ranges_2bit must be positive, rise and be at most 2, but got {got}"],
            )
            for ranges, got in (
                ([0.0], "0"),
                ([-1.0, 1.0], "-1, 1"),
                ([1.0, 0.75], "1, 0.75"),
                ([1.0, 1.0], "1, 1"),
                ([1.0, 2.5], "1, 2.5"),
            )
        ),
    ],
)
def test_feedback_that_cannot_be_rounded_with(path, with_feedback, change, problems):
    save_statics(path, good_feedback(), {})
    tensors, metadata = safetensors.numpy.load_file(path), stored_metadata(path)
    if callable(change):
        change(tensors)
    else:
        tensors = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    safetensors.numpy.save_file(tensors, path, metadata)
    assert problems_of(path, with_feedback) == problems


def stored_metadata(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({NAME: "none"}, f"metadata.{NAME} must be 'key_hadamard', the layer's transforms, but got 'none'"),
        ({NAME: None}, f"metadata.{NAME} must be 'key_hadamard', the layer's transforms, but got None"),
        (
            {"layers.1.value_round_feedback": "none"},
            "metadata.layers.1.value_round_feedback must be 'value_hadamard', the layer's transforms, but got 'none'",
        ),
    ],
)
def test_feedback_of_other_transforms(path, with_feedback, metadata, problem):
    save_statics(path, good_feedback(), {})
    changed = {key: value for key, value in (stored_metadata(path) | metadata).items() if value is not None}
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, changed)
    assert problems_of(path, with_feedback) == [problem]


def test_feedback_beyond_fp16_is_not_written(path):
    statics = FeedbackStatics(np.full((2, 64, 64), 1e5, np.float32), {2: (1.0,)}, ())
    with (
        pytest.raises(
            ValueError, match=r"layers.0.value_round_feedback must be finite and \[num_kv_heads, head_size, h"
        ),
        np.errstate(over="ignore"),
    ):
        save_statics(path, {0: LayerStatics(value_round_feedback=statics)}, {})
