"""Simulated caches in an engine (tests/tools/test_evaluate.py starts one): texts, scores, and what is refused."""

import numpy as np
import pytest
import torch

from kvtuner_tools.divergence import TokenScores
from kvtuner_tools.engines.simulate import _Simulation
from kvtuner_tools.simulation.cache import Layer, Storage
from kvtuner_tools.simulation.kivi import Kivi
from kvtuner_tools.simulation.rows import SimulationRequest, Simulations, block_means, mean_bits, profile_bits_at
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape

SHAPE = ModelShape("test", "LlamaForCausalLM", (LayerShape(2, 64),) * 2)


def test_a_text_runs_in_one_step() -> None:
    layer = Layer(0, 2, 1, 32, 0.25)
    simulation = _Simulation({0: layer}, Kivi(2, 32), {0: None})
    simulation.begin(40, 0)
    rows = torch.randn(3, 40, 64)
    output = simulation.take(0, rows[0], rows[1][:, :32], rows[2][:, :32])
    assert output is not None and output.shape == (40, 2, 32)
    simulation.end()
    assert simulation.take(0, rows[0], rows[1][:, :32], rows[2][:, :32]) is None
    simulation.begin(41, 0)
    with pytest.raises(RuntimeError, match="a text of 41 tokens must run in one step, but got a step of 40"):
        simulation.take(0, rows[0], rows[1][:, :32], rows[2][:, :32])
    simulation.begin(40, 0)
    with pytest.raises(RuntimeError, match=r"layers \[0\] did not"):
        simulation.end()


def test_blocks_and_bits() -> None:
    numbers = np.arange(140, dtype=np.float32)
    scores = TokenScores(numbers, numbers, numbers, numbers > 4)
    assert block_means(scores, [70, 70]) == [15.5, 47.5, 85.5, 117.5]
    storages = (Storage(2.0, 64, beside=True), Storage(4.0))
    assert mean_bits(storages) == 3.0
    assert mean_bits(storages, 1024) == 3.0 + 0.5
    resolved = load_profile("K4V4").resolve(SHAPE)
    assert profile_bits_at(resolved, 8192) == pytest.approx(resolved.stored_bits + 16 * 68 / 8192)


def test_all_that_is_missing_is_said_at_once() -> None:
    request = SimulationRequest(("snapkv:0.2", "think:0.4"))
    with pytest.raises(ValueError, match="--simulate runs on one rank") as refused:
        Simulations(request, SHAPE, None, 1024, {"tensor_parallel_size": ["--tensor-parallel-size", "2"]})
    assert str(refused.value).splitlines() == [
        "--simulate runs on one rank, but got tensor_parallel_size",
        "snapkv:0.2 compresses a prompt once: give --prompt-tokens",
        "think:0.4 compresses a prompt once: give --prompt-tokens",
    ]
    with pytest.raises(ValueError, match="--prompt-tokens must be below the 1024 of a window, but got 1024"):
        Simulations(SimulationRequest(("kivi",), prompt_tokens=1024), SHAPE, None, 1024, {})


def test_padding_is_left_alone() -> None:
    """A step may have more rows than the text."""
    layer = Layer(0, 1, 1, 32, 0.2)
    rows = torch.randn(3, 48, 32)
    simulation = _Simulation({0: layer}, Kivi(2, 32), {0: None})
    simulation.begin(40, 0)
    output = simulation.take(0, *rows)
    assert output is not None and output.shape[0] == 40
