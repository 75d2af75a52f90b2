"""Reading precision profiles and matching them with models; no model and no torch."""

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError, format_layers, parse_layers
from vllm_kvtuner.profile.profile import RecentWindow

MODEL = "model: {name: toy, architecture: ToyForCausalLM, num_layers: 4, num_kv_heads: 2, head_size: 64}\n"
SHAPE = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),) * 4)


@pytest.fixture
def write(tmp_path):
    def write(text, name="p.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return write


def problems_of(call, *arguments):
    with pytest.raises(ProfileError) as caught:
        call(*arguments)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def names(profile, count=4):
    return [str(profile.pair_of(layer)) for layer in range(count)]


# What a profile says


def test_full_profile(write, tmp_path):
    (tmp_path / "s.safetensors").touch()
    profile = load_profile(
        write(
            "version: 1\n"
            + MODEL
            + """\
layers:
  0: K8V4
  1-2: k4v2
  "3": K16V16
transforms:
  key_offset: true
  key_hadamard: true
  overrides:
    0, 3: {key_hadamard: false, range_search: true}
statics: s.safetensors
attend_cached_prefill: true
provenance: {method: by hand, made: 2024-05-01, scores: {kl: 0.01, tasks: [a, b]}}
"""
        )
    )
    assert names(profile) == ["K8V4", "K4V2", "K4V2", "K16V16"]
    assert profile.transforms.names == ("key_offset", "key_hadamard")
    assert profile.transforms_of(0).names == ("key_offset", "range_search")
    assert profile.transforms_of(1) == profile.transforms
    assert profile.attend_cached_prefill
    assert profile.statics == tmp_path / "s.safetensors"
    assert profile.provenance["scores"] == {"kl": 0.01, "tasks": ["a", "b"]}
    assert profile.provenance["made"] == "2024-05-01"
    assert (profile.name, profile.schema_version) == ("p", 1)

    resolved = profile.resolve(SHAPE)
    assert [layer.index for layer in resolved.layers] == [0, 1, 2, 3]
    assert resolved.layers[0].shape == LayerShape(2, 64)
    assert resolved.layers[3].transforms.names == (), "K16V16 layers transform nothing"
    assert resolved.nominal_bits == (6 + 3 + 3 + 16) / 4
    assert resolved.bytes_per_token == 2 * (104 + 56 + 56 + 256)
    assert resolved.bf16_bytes_per_token == 4 * 2 * 256
    assert resolved.stored_bits == 16 * resolved.bytes_per_token / resolved.bf16_bytes_per_token
    assert resolved.attend_cached_prefill


def test_recent_windows(write):
    profile = load_profile(
        write(
            "version: 1\nlayers: {0: K16V16, 1-3: K4V2}\nrecent_window: 64\nrecent_window_bits: 8\n"
            "recent_window_overrides: {2: 0, 3: 128}\n"
        )
    )
    resolved = profile.resolve(SHAPE)
    windows = [layer.recent for layer in resolved.layers]
    assert windows == [None, RecentWindow(64, 8), None, RecentWindow(128, 8)], "K16V16 layers have none"
    assert resolved.recent_windows == {RecentWindow(64, 8): (1,), RecentWindow(128, 8): (3,)}
    assert resolved.recent_bytes_per_request == (64 + 128) * 2 * (2 * 64 + 8)
    assert resolved.bytes_per_token == 2 * (256 + 3 * 56), "what every token takes does not change"
    sixteen = load_profile(write("version: 1\nlayers: K4V2\nrecent_window: 64\n")).resolve(SHAPE)
    assert sixteen.recent_bytes_per_request == 4 * 64 * 2 * 256


def test_sink_tokens(write):
    """Of every layer with a window, in its bits, and counted with it."""
    text = "version: 1\nlayers: {0: K16V16, 1-3: K4V2}\nrecent_window_overrides: {2: 64}\nrecent_window_bits: 8\n"
    resolved = load_profile(write(text + "sink_tokens: 4\n")).resolve(SHAPE)
    assert [layer.recent for layer in resolved.layers] == [None, None, RecentWindow(64, 8, 4), None]
    assert str(resolved.layers[2].recent) == "64 tokens and the first 4 in 8 bits"
    assert resolved.recent_bytes_per_request == (64 + 4) * 2 * (2 * 64 + 8)


def test_recent_windows_of_one_length_need_layers_of_one_shape(write):
    """vLLM spreads the layers of a sliding window over groups only if their pages are equal."""
    shape = dataclasses.replace(SHAPE, layers=(*SHAPE.layers[:3], LayerShape(1, 128)))
    profile = load_profile(write("version: 1\nlayers: K4V4\nrecent_window: 32\n"))
    (line,) = problems_of(profile.resolve, shape)
    assert "recent_window must only give layers of one shape a window of 32 tokens in 16 bits" in line
    assert line.endswith("but got layers of 2 shapes (0-2, 3)")


def test_uniform_pair_fits_any_model():
    profile = load_profile("k8V4:PLAIN")
    assert (profile.name, profile.source, profile.model) == ("K8V4:plain", None, None)
    resolved = profile.resolve(SHAPE)
    assert [layer.pair for layer in resolved.layers] == [PrecisionPair(8, 4)] * 4
    assert resolved.layers[0].transforms.names == ()
    assert not resolved.attend_cached_prefill


def test_uniform_pair_in_a_file_can_have_transforms(write):
    profile = load_profile(write("version: 1\nlayers: K4V2\ntransforms: {value_hadamard: true}\n"))
    assert profile.resolve(SHAPE).layers[3].transforms.names == ("value_hadamard",)


@pytest.mark.parametrize("key", ["0", "'0'"])
def test_reference_preset_loads(write, key):
    text = f"{key}: {{nbits_key: 8, nbits_value: 4}}\n"
    text += "".join(f"{i}:\n  nbits_key: 4\n  nbits_value: 2\n" for i in (3, 2, 1))
    profile = load_profile(write(text))
    assert names(profile) == ["K8V4", "K4V2", "K4V2", "K4V2"]
    assert profile.resolve(SHAPE).nominal_bits == 3.75


def test_wrong_reference_preset(write):
    path = write(
        "0: {nbits_key: 5, nbits_value: 4}\n1: {nbits_key: 4, bits_value: 2}\n3: {nbits_key: 16, nbits_value: 4}\n"
    )
    assert problems_of(load_profile, path) == (
        f"{path}: layers.0.nbits_key must be one of (2, 4, 8, 16), but got 5",
        f"{path}: layers.1 must only have the keys nbits_key, nbits_value, but got 'bits_value'"
        " (did you mean 'nbits_value'?)",
        f"{path}: layers.1.nbits_value must be one of (2, 4, 8, 16), but got none",
        f"{path}: layers.3: 16 bits must be given to keys and values together (K16V16), but got K16V4",
        f"{path}: layers must give every layer a pair, but got none for 2",
    )


# Layer ranges


def test_layer_ranges():
    assert parse_layers("4, 8,12-14", 32) == [4, 8, 12, 13, 14]
    assert parse_layers(0, None) == [0]
    assert format_layers([0, 1, 2, 3, 7, 9, 10]) == "0-3, 7, 9-10"
    assert parse_layers(format_layers([0, 1, 2, 7]), 8) == [0, 1, 2, 7]


@pytest.mark.parametrize(
    ("key", "rule"),
    [
        ("31-1", "from its lower to its upper layer, but got 31-1"),
        ("30-40", "within layers 0-31, but got 30-40"),
        (32, "within layers 0-31, but got 32"),
        ("-1", "a layer, a range or a list"),
        ("1-", "a layer, a range or a list"),
        ("1,,2", "a layer, a range or a list"),
        ("1, 0-2", "name a layer once, but got 1 again"),
        (True, "a layer, a range or a list"),
        (1.5, "a layer, a range or a list"),
        ("0-999999999999", "a layer, a range or a list"),
    ],
)
def test_layer_ranges_that_are_wrong(key, rule):
    with pytest.raises(ValueError, match=rule):
        parse_layers(key, 32)


def test_overlaps_gaps_and_layers_out_of_range_are_named(write):
    path = write("version: 1\n" + MODEL + "layers: {0-1: K8V8, '1, 2': K4V4, 4-5: K4V2}\n")
    assert problems_of(load_profile, path) == (
        f"{path}: layers.1, 2 must only name layers that no other key names, but got 1 (also in layers.0-1)",
        f"{path}: layers.4-5 must lie within layers 0-3, but got 4-5",
        f"{path}: layers must give every layer a pair, but got none for 3",
    )


# Errors of a file


def test_all_problems_at_once(write):
    path = write(
        """\
        version: 2
        model: {name: toy, architecture: "", num_layers: 4, num_kv_heads: [2, 2], head_sise: 64}
        layers: {0: K5V4, 1-2: K16V4, 3: 8}
        transforms: {key_hadamrd: true, value_hadamard: 1, key_offset: true, overrides: {7: {range_search: yes please}}}
        attend_cached_prefill: maybe
        provenance: text
        stattics: x
        recent_window: -1
        recent_window_bits: 4
        recent_window_overrides: {1: true, 2-9: 32}
        sink_tokens: 17
        """
    )
    problems = problems_of(load_profile, path)
    assert all(line.startswith(f"{path}: ") and ", but got " in line for line in problems)
    expected = [
        "statics, attend_cached_prefill, provenance, but got 'stattics' (did you mean 'statics'?)",
        "version must be 1, but got 2",
        "model must only have the keys name, architecture, num_layers, num_kv_heads, head_size, weights, but got "
        "'head_sise' (did you mean 'head_size'?)",
        "model.architecture must be the first architecture in the model's config, but got ''",
        "model.num_kv_heads must be a positive integer up to 1024, or a list of 4 (0 where a layer caches nothing),"
        " but got [2, 2]",
        "model.head_size must be given, but got none",
        "layers.0: k_bits must be one of (2, 4, 8, 16), but got 5",
        "layers.1-2: 16 bits must be given to keys and values together (K16V16), but got K16V4",
        "layers.3: a precision pair is written like K8V4, but got 8",
        "(did you mean 'key_hadamard'?)",
        "transforms.value_hadamard must be true or false, but got 1",
        "transforms.overrides.7.range_search must be true or false, but got 'yes please'",
        "transforms.overrides.7 must lie within layers 0-3, but got 7",
        "recent_window must be an integer of 0-4096 tokens, but got -1",
        "recent_window_bits must be one of (8, 16), but got 4",
        "recent_window_overrides.1 must be an integer of 0-4096 tokens, but got True",
        "recent_window_overrides.2-9 must lie within layers 0-3, but got 2-9",
        "sink_tokens must be an integer of 0-16 tokens, but got 17",
        "attend_cached_prefill must be true or false, but got 'maybe'",
        "provenance must be a mapping, but got 'text'",
    ]
    for each in expected:
        assert sum(each in line for line in problems) == 1, each
    assert len(problems) == len(expected)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("layers: K8V4\n", "version must be 1, but got none"),
        ("version: 1\n", "layers must be a pair such as K8V4 or a mapping from layers to pairs such as 1-31: K4V2"),
        ("version: 1\nlayers: []\n", "layers must be a pair"),
        ("version: 1\nlayers: K3V4\n", "layers: k_bits must be one of (2, 4, 8, 16), but got 3"),
        ("version: 1\nlayers: K4V2S8\n", "layers: a precision pair is written like K8V4, but got 'K4V2S8'"),
        ("version: 1\nlayers: K4V2\nscale_bits: 8\n", "attend_cached_prefill, provenance, but got 'scale_bits'"),
        ("version: 1\nlayers: K8V4\nmodel: toy\n", "model must be a mapping with keys of name, architecture"),
        ("version: 1\nlayers: K8V4\ntransforms: all\n", "transforms must be a mapping"),
        ("version: 1\nlayers: K8V4\ntransforms: {overrides: 3}\n", "overrides must be a mapping from layers"),
        ("version: 1\nlayers: K8V4\nrecent_window_overrides: 3\n", "must be a mapping from layers to tokens"),
        ("version: 1\nlayers: K8V4\nsink_tokens: 4\n", "sink_tokens must be 0 without a recent_window, whose cache"),
        ("version: 1\nlayers: K8V4\nsink_tokens: 4\nrecent_window_overrides: {0: 0}\n", "must be 0 without a recent"),
        ("version: 1\nlayers: K8V4\nstatics: gone.safetensors\n", "statics must name a file (relative to the profile)"),
        ("version: 1\nlayers: K8V4\nstatics: [1]\n", "statics must name a safetensors file, but got [1]"),
        ("version: 1\nlayers: {0-1: K8V4, 3: K4V4}\n", "every layer a pair, but got none for 2"),
        ("- 1\n", "the file must hold a mapping, but got [1]"),
        ("", "the file must hold a mapping, but got None"),
        ("a: [", "the file must be plain YAML"),
        ("a: 1\na: 2\n", "the key 'a' a second time in line 2"),
        ("version: 1\nlayers:\n  1: K8V4\n  '1': K4V4\n", "the key '1' a second time in line 4"),
        ("version: 1\nlayers: {010: K8V4}\n", "the key '010', no plain decimal number, in line 2"),
        ("? [1, 2]\n: 3\n", "a key that is a list or a mapping in line 1"),
        ("a: &x 1\n", "anchor 'x' in line 1"),
        ("a: &x [*x]\n", "anchor 'x' in line 1"),
        ("a: *x\n", "anchor 'x' in line 1"),
        ("a: !!binary aGk=\n", "tag 'tag:yaml.org,2002:binary' in line 1"),
        ("[" * 100_000, "the file must be plain YAML"),
    ],
)
def test_one_problem(write, text, problem):
    path = write(text)
    (line,) = problems_of(load_profile, path)
    assert line.startswith(f"{path}: ")
    assert problem in line


@pytest.mark.parametrize(
    ("transforms", "layers"),
    [
        ("{key_offset: true}", "layers 0, 2"),
        ("{key_equalization: true, overrides: {0: {key_equalization: false}}}", "layers 2"),
        ("{overrides: {1-2: {key_offset: true}}}", "layers 2"),
    ],
)
def test_statics_are_required_where_quantized_layers_use_them(write, transforms, layers):
    text = f"version: 1\nlayers: {{0: K8V8, 1: K16V16, 2: K4V4}}\ntransforms: {transforms}\n"
    path = write(text)
    assert problems_of(load_profile, path) == (
        f"{path}: statics must name a safetensors file where key_offset, key_equalization, "
        "key_round_feedback or value_round_feedback is true,"
        f" but got none, needed for {layers}",
    )


def test_round_feedback_is_for_few_bits(write):
    """8-bit sides round to nearest codes, and need no statics for it."""
    switches = "{key_hadamard: true, key_round_feedback: true, value_round_feedback: true}"
    load_profile(write(f"version: 1\nlayers: {{0-2: K8V8, 3: K16V16}}\ntransforms: {switches}\n"))
    text = f"version: 1\nlayers: {{0: K8V2, 1: K4V8, 2: K8V8, 3: K16V16}}\ntransforms: {switches}\n"
    path = write(text)
    assert problems_of(load_profile, path) == (
        f"{path}: statics must name a safetensors file where key_offset, key_equalization, key_round_feedback or "
        "value_round_feedback is true, but got none, needed for layers 0-1",
    )
    Path(path).with_name("s.safetensors").touch()
    resolved = load_profile(write(f"{text}statics: s.safetensors\n")).resolve(SHAPE)
    assert [layer.transforms.names for layer in resolved.layers] == [
        ("key_hadamard", "value_round_feedback"),
        ("key_hadamard", "key_round_feedback"),
        ("key_hadamard",),
        (),
    ]
    assert [layer.transforms.needs_statics for layer in resolved.layers] == [True, True, False, False]


def test_statics_are_not_required_where_nothing_is_quantized(write):
    load_profile(write("version: 1\nlayers: K16V16\ntransforms: {key_offset: true}\n"))


def test_file_that_is_no_text(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(b"version: 1\nlayers: \xff\xfe\n")
    (line,) = problems_of(load_profile, str(path))
    assert line == f"{path}: the file must be UTF-8 text, but got byte 0xff at offset 19"


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_nothing_is_executed(write, tmp_path, tag):
    marker = tmp_path / "executed"
    path = write(f"version: 1\nlayers: K8V4\nprovenance: !!{tag} ['touch {marker}']\n")
    (line,) = problems_of(load_profile, path)
    assert "must be plain YAML" in line
    assert tag in line
    assert not marker.exists()


# Finding a profile


def test_shipped_name_with_and_without_suffix():
    assert load_profile("llama31_3.25bit") == load_profile("llama31_3.25bit.yaml")


def test_a_file_goes_before_a_shipped_name(write, tmp_path, monkeypatch):
    write("version: 1\nlayers: K2V2\n", name="llama31_3.25bit.yaml")
    monkeypatch.chdir(tmp_path)
    assert names(load_profile("llama31_3.25bit.yaml")) == ["K2V2"] * 4
    assert load_profile("llama31_3.25bit").model is not None, "without suffix only the shipped one has that name"


def test_unknown_name_says_where_names_are_listed():
    (line,) = problems_of(load_profile, "lama31_3.25bit")
    assert line.startswith("lama31_3.25bit: profile must be a file, a pair such as K8V4, or the name of a shipped")
    assert "kvtuner profile list" in line
    assert line.endswith("but got no such file (did you mean 'llama31_3.25bit'?)")


@pytest.mark.parametrize("spec", ["", ".", "no/such/file.yaml"])
def test_specs_that_name_no_file(spec):
    (line,) = problems_of(load_profile, spec)
    assert "but got a folder" in line or "but got no such file" in line


def test_pair_outside_the_set():
    assert problems_of(load_profile, "K3V4") == ("K3V4: k_bits must be one of (2, 4, 8, 16), but got 3",)


# Meeting a model


def test_identity_must_be_the_models(write):
    profile = load_profile(write("version: 1\n" + MODEL + "layers: K8V4\n"))
    other = ModelShape(
        "m", "OtherForCausalLM", (LayerShape(1, 64), LayerShape(2, 64), LayerShape(2, 64), LayerShape(2, 32))
    )
    source = profile.source
    assert problems_of(profile.resolve, other) == (
        f"{source}: model.architecture must be OtherForCausalLM, that of m, but got ToyForCausalLM",
        f"{source}: model.num_kv_heads must be [1, 2, 2, 2], that of m, but got 2",
        f"{source}: model.head_size must be [64, 64, 64, 32], that of m, but got 64",
    )
    longer = ModelShape("m", "ToyForCausalLM", (LayerShape(2, 64),) * 5)
    assert problems_of(profile.resolve, longer) == (f"{source}: model.num_layers must be 5, that of m, but got 4",)


def test_layers_without_identity_meet_the_model(write):
    profile = load_profile(
        write("version: 1\nlayers: {0-5: K8V4}\ntransforms: {overrides: {8: {range_search: true}}}\n")
    )
    assert problems_of(profile.resolve, SHAPE) == (
        f"{profile.source}: layers must lie within the layers 0-3 of toy, but got 4-5",
        f"{profile.source}: transforms.overrides must lie within the layers 0-3 of toy, but got 8",
    )
    longer = ModelShape("toy", "T", (LayerShape(2, 64),) * 8)
    assert f"{profile.source}: layers must give every layer of toy a pair, but got none for 6-7" in problems_of(
        profile.resolve, longer
    )


def test_head_sizes_that_do_not_pack(write):
    profile = load_profile(write("version: 1\nlayers: {0: K4V4, 1-2: K4V2, 3: K16V16}\n"))
    shape = ModelShape("toy", "T", (LayerShape(2, 72),) * 4)
    (line,) = problems_of(profile.resolve, shape)
    assert line.endswith(
        "layers.1-2 head_size * 2 bits must fill a multiple of 4 bytes, but got head_size 72 with K4V2"
    )
    big = ModelShape("toy", "T", (LayerShape(2, 64), LayerShape(2, 384), LayerShape(2, 512), LayerShape(2, 384)))
    (line,) = problems_of(profile.resolve, big)
    assert line.endswith("layers.1 head_size must be between 1 and 256, or 512, but got head_size 384 with K4V2")


def test_a_layer_with_kv_heads_has_a_head_size(write):
    """Also one that stays unquantized, whose head size nothing has to pack."""
    model = MODEL.replace("num_kv_heads: 2, head_size: 64", "num_kv_heads: [2, 0, 2, 2], head_size: [64, 0, 0, 0]")
    path = write(f"version: 1\n{model}layers: {{0-3: K16V16}}\n")
    (line,) = problems_of(load_profile, path)
    assert line == f"{path}: model.head_size must be positive where a layer has KV heads, but got 0 for 2-3"


def test_layers_without_keys_and_values_are_left_out(write):
    shape = ModelShape(
        "toy", "ToyForCausalLM", (LayerShape(0, 0), LayerShape(2, 64), LayerShape(0, 0), LayerShape(1, 64))
    )
    for layers in ("{1: K8V4, 3: K4V4}", "{0-1: K8V4, 2-3: K4V4}"):
        model = MODEL.replace("num_kv_heads: 2", "num_kv_heads: [0, 2, 0, 1]")
        resolved = load_profile(write(f"version: 1\n{model}layers: {layers}\n")).resolve(shape)
        assert [(layer.index, layer.pair.name) for layer in resolved.layers] == [(1, "K8V4"), (3, "K4V4")]
        assert resolved.bytes_per_token == 2 * 104 + 72


def test_profile_imports_no_torch_and_no_vllm():
    modules = "vllm_kvtuner.profile.load, vllm_kvtuner.profile.statics, vllm_kvtuner.pages.layout"
    script = f"import sys, {modules}; print({{'torch', 'vllm'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
