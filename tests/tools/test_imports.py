"""What light commands import: nothing heavy. tests/test_structure.py looks for circles."""

import subprocess
import sys

import pytest

HEAVY = ("lm_eval", "optuna", "torch", "transformers", "vllm")
"""Packages that take seconds to import, or that are an extra."""


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "words",
    [["--help"], ["profile", "list"], ["statics", "--help"], ["demo", "--help"], ["bench", "--help"]],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(words):
    program = f"""
import sys
from kvtuner_tools.cli import main
try:
    main({words})
except SystemExit:
    pass
print("heavy:", *(name for name in {HEAVY} if name in sys.modules))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1].split() == ["heavy:"]
