"""Fixtures of the commands' tests."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch

from kvtuner_tools import cli
from kvtuner_tools.calibration import commands

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
}


@pytest.fixture(autouse=True)
def warm_processes(monkeypatch):
    """Calls to the process that imports vLLM for a calibration's first engine, which tests of refusals need not wait
    for."""
    calls = []

    def warm():
        calls.append("warm")
        return SimpleNamespace(submit=lambda *_: calls.append("submit"), close=lambda: calls.append("close"))

    monkeypatch.setattr(commands, "_warm_process", warm)
    return calls


@pytest.fixture
def make_model(tmp_path):
    """Makes a model folder with a config and, if given, weights in one or several files."""

    def make(*weights, **changes):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
        for index, tensors in enumerate(weights):
            safetensors.torch.save_file(tensors, folder / f"model-{index}.safetensors")
        return str(folder)

    return make


@pytest.fixture
def run_cli(capsys):
    """Runs a command: exit status, stdout, stderr."""

    def run(*arguments):
        status = cli.main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
