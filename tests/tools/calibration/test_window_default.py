"""The recent window that a calibration has without being told one, and what is refused of one that it is told."""

import json
from pathlib import Path

import pytest

from kvtuner_tools.calibration import window_default
from kvtuner_tools.calibration.options import CalibrationOptions
from vllm_kvtuner.profile.model_shape import ModelShape

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_size": 256,
    "max_position_embeddings": 8192,
}
OTHER_SHAPES = {"num_key_value_heads": [2, 2, 4, 4]}
NARROW = {"sliding_window": 48}


@pytest.fixture
def model(tmp_path):
    def make(**config):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
        return str(tmp_path)

    return make


def shape_of(model):
    """By the configuration's values: vLLM does not read a Llama whose layers differ."""
    return ModelShape.from_hf_config(json.loads((Path(model) / "config.json").read_text()), model)


def fill(model, **options):
    return window_default.fill(CalibrationOptions(model=model, **options), shape_of(model))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (64, 4)),
        ({"recent_window": 128}, (128, 4)),
        ({"sink_tokens": 0}, (64, 0)),
        ({"recent_window": 0}, (0, 0)),
        ({"recent_window": 0, "sink_tokens": 0}, (0, 0)),
    ],
)
def test_window_and_sinks_are_on_unless_turned_off(model, asked, expected):
    options, left_out = fill(model(), **asked)
    assert (options.recent_window, options.sink_tokens) == expected
    assert left_out is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (OTHER_SHAPES, "must only be given to layers of one shape, but got layers of 2 shapes (0-1, 2-3)"),
        (NARROW, "must be less than the layers' own sliding window of 48 tokens, but got 64"),
    ],
)
def test_where_a_window_is_not_served_it_is_left_out_and_one_line_says_so(model, config, reason):
    options, left_out = fill(model(**config))
    assert (options.recent_window, options.sink_tokens) == (0, 0)
    assert left_out == f"no recent window and no sink tokens: the window {reason}"


def test_layers_that_stay_unquantized_have_no_window(model):
    assert fill(model(**OTHER_SHAPES), unquantized="2,3")[0].recent_window == 64


@pytest.mark.parametrize("config", [OTHER_SHAPES, NARROW])
def test_a_window_that_was_asked_for_is_refused_there(model, config):
    options = CalibrationOptions(model=model(**config), recent_window=64)
    (problem,) = window_default.refuse(options, shape_of(options.model))
    assert problem.startswith("--recent-window must ")
    assert not list(window_default.refuse(CalibrationOptions(model=options.model), shape_of(options.model)))


@pytest.mark.parametrize(("on_gpu", "problems"), [(False, 0), (True, 1)])
def test_a_window_of_8_bits_is_refused_on_a_gpu(model, monkeypatch, on_gpu, problems):
    monkeypatch.setattr(window_default, "_is_on_gpu", lambda: on_gpu)
    options = CalibrationOptions(model=model(), recent_window_bits=8)
    found = list(window_default.refuse(options, shape_of(options.model)))
    assert len(found) == problems and all(each.endswith("but got 8") for each in found)


@pytest.mark.parametrize(("positions", "window"), [(4096, 2048), (2048, 2047), (512, 511)])
def test_windows_of_text_are_no_longer_than_the_models_positions(model, positions, window):
    assert fill(model(max_position_embeddings=positions))[0].window == window
    assert fill(model(max_position_embeddings=positions), window=300)[0].window == 300


def test_what_window_and_sinks_hold(model):
    assert window_default.held_tokens(CalibrationOptions()) == 68
    assert window_default.held_tokens(CalibrationOptions(recent_window=0)) == 0
    assert window_default.held_tokens(CalibrationOptions(recent_window=128, sink_tokens=0)) == 128
