"""What light commands import: nothing heavy. tests/test_structure.py looks for circles."""

import subprocess
import sys

import pytest

from kvtuner_tools.calibration.options import CalibrationOptions
from tests.helpers.calibration import sensitivity_table
from tests.helpers.tiny_model import make_tiny_model

PROGRAM = """
import sys
from kvtuner_tools.cli import main
try:
    main({words})
except SystemExit:
    pass
print("heavy:", *(name for name in {heavy} if name in sys.modules))
"""
HEAVY = ("lm_eval", "optuna", "torch", "transformers", "vllm")
"""Packages that take seconds to import, or that are an extra."""


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "words",
    [["--help"], ["profile", "list"], ["statics", "--help"], ["demo", "--help"], ["bench", "--help"]],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(words):
    assert run(words, HEAVY) == ["heavy:"]


@pytest.mark.slow
def test_stages_that_read_tables_import_neither_torch_nor_vllm(tmp_path):
    model = make_tiny_model(tmp_path / "model")
    table = sensitivity_table(4)
    table.write(tmp_path / "sensitivity.json")
    CalibrationOptions(model=str(model)).write(tmp_path)
    for stage, written in (("prune", "candidates.json"), ("cluster", "clusters.json")):
        assert run([stage, str(tmp_path)], set(HEAVY) - {"optuna"}) == ["heavy:"]
        assert (tmp_path / written).exists()


def run(words, heavy):
    """The last line that a command prints with the packages it has imported."""
    program = PROGRAM.format(words=words, heavy=heavy)
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return output.splitlines()[-1].split()
