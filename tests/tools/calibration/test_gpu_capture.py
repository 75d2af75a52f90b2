"""Capture and choice on the GPU, with whichever model runner vLLM takes there."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtuner_tools.calibration.calibration_text import load_text
from kvtuner_tools.calibration.capture import CaptureRequest, run_capture
from kvtuner_tools.calibration.sensitivity import measure_sensitivity
from kvtuner_tools.calibration.transform_choice import choose_transforms
from tests.helpers.tiny_model import make_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

TOKENS, CONTEXT = 600, 256
BF16_ERROR = 0.02
"""Relative error that two layers in bf16 may add up to."""


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_it_captures_and_chooses_as_on_the_cpu(tmp_path, kind):
    model = make_tiny_model(tmp_path / "model", kind, num_layers=2)
    text = load_text(None, AutoTokenizer.from_pretrained(model), tokens=TOKENS, context=CONTEXT, seed=0)
    capture = run_capture(CaptureRequest(str(model), text, queries=32), tmp_path)
    assert capture.dtype == "bfloat16"
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for window, ids in enumerate(text.windows):
        with torch.no_grad():
            cached = reference(torch.tensor([ids]), use_cache=True).past_key_values
        for layer in capture.layers:
            got, seen = capture.load_layer(layer)[window], cached.layers[layer.index]
            count = seen.keys.shape[2]
            assert distance(got.key[-count:], seen.keys[0].transpose(0, 1)) < BF16_ERROR
            assert distance(got.value[-count:], seen.values[0].transpose(0, 1)) < BF16_ERROR

    on_gpu, on_cpu = (choose_transforms(capture, make(tmp_path / name), device=name) for name in ("cuda", "cpu"))
    assert [layer.transforms for layer in on_gpu.layers] == [layer.transforms for layer in on_cpu.layers]
    for layer, other in zip(on_gpu.layers, on_cpu.layers, strict=True):
        assert layer.errors["chosen"]["far"] == pytest.approx(other.errors["chosen"]["far"], rel=0.02)
    table = measure_sensitivity(capture, on_gpu, tmp_path / "cuda")
    assert all(layer.output_error["K8V8"] < layer.output_error["K2V2"] for layer in table.layers)


def make(folder):
    folder.mkdir()
    return folder
