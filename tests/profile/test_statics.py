"""Statics files: round trip, and everything that can be wrong with one."""

import numpy as np
import pytest
import safetensors.numpy

from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.statics import LayerStatics, load_statics, rope_pairs, save_statics

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
