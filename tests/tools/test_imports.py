"""What the tools' modules import: no circles, and nothing heavy for light commands."""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

HEAVY = ("lm_eval", "optuna", "torch", "transformers", "vllm")
"""Packages that take seconds to import, or that are an extra."""


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions and those for type checkers included."""
    graph = grimp.build_graph("kvtuner_tools")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


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
