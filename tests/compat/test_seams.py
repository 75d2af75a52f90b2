"""Every seam against the installed vLLM: which one a version breaks, in seconds and without an engine."""

import ast
import inspect
from pathlib import Path

import pytest
from vllm.v1.worker.gpu_worker import Worker
from vllm.version import __version__ as installed

import vllm_kvtuner
from vllm_kvtuner import compat
from vllm_kvtuner.compat.inspection import Seam, release
from vllm_kvtuner.compat.seams import SEAMS, broken_seams, seams_of
from vllm_kvtuner.compat.versions import SERVED_VERSIONS

PACKAGE = Path(vllm_kvtuner.__file__).parent
WAKE_UP = Seam(
    "waking up", "vllm.v1.worker.gpu_worker:Worker.wake_up", "compat.worker.wake_kernels_up", ("tags",), True
)


@pytest.mark.quick(1)
@pytest.mark.parametrize("seam", seams_of(installed), ids=lambda seam: seam.target)
def test_the_installed_vllm_has(seam):
    problem = seam.problem()
    assert problem is None, problem


@pytest.mark.parametrize("used_by", sorted({seam.used_by for seam in SEAMS}))
def test_a_seam_says_where_it_is_described(used_by):
    """Read, not imported: a broken seam may keep modules from being imported, and is to fail as itself alone."""
    module, _, name = used_by.rpartition(".")
    body = ast.parse((PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text()).body
    (found,) = [node for node in body if getattr(node, "name", "") == name]
    assert ast.get_docstring(found)


@pytest.mark.parametrize("version", [version for versions in SERVED_VERSIONS.values() for version in versions])
def test_every_served_version_has_a_shape_of_every_seam(version):
    assert {seam.used_by for seam in seams_of(version)} == {seam.used_by for seam in SEAMS}


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if seam.since or seam.before], ids=lambda seam: seam.target)
def test_shapes_of_versions_that_are_not_served_are_gone(seam):
    served = [version for versions in SERVED_VERSIONS.values() for version in versions]
    oldest = min(served, key=release)
    assert seam.before == "" or release(seam.before) > release(oldest), "goes with the versions before it"


def test_versions_are_told_apart():
    changed = [Seam("a", "a:b", "c"), Seam("a", "a:b", "c", since="0.33"), Seam("a", "a:b", "c", before="0.33")]
    for version, expected in (("0.32.0+cpu", [1, 0, 1]), ("0.33.0", [1, 1, 0]), ("0.34.0.dev1", [1, 1, 0])):
        assert [seam.is_in(version) for seam in changed] == expected


@pytest.mark.slow
def test_a_name_that_is_gone(monkeypatch):
    monkeypatch.delattr(Worker, "wake_up")
    assert WAKE_UP.problem() == (
        "seam 'waking up' is broken: vllm.v1.worker.gpu_worker:Worker.wake_up: AttributeError: wake_up "
        "(see vllm_kvtuner.compat.worker.wake_kernels_up)"
    )
    assert [line for line in broken_seams(installed) if "Worker.wake_up" in line] == [WAKE_UP.problem()]


def test_a_module_that_is_gone():
    problem = Seam("a seam", "vllm.v1.worker.moved:Worker", "compat.worker.wake_kernels_up").problem()
    assert "ModuleNotFoundError: No module named 'vllm.v1.worker.moved'" in problem


@pytest.mark.parametrize(
    ("replacement", "problem"),
    [
        pytest.param(lambda self, tags=None: None, None, id="as it was"),
        pytest.param(lambda self, names=None: None, "must take (tags) alone, but takes (names)", id="another name"),
        pytest.param(lambda self: None, "must take (tags) alone, but takes ()", id="taken away"),
        pytest.param(lambda self, tags, level: None, "must take (tags) alone, but takes (tags, level)", id="one more"),
        pytest.param(3, "is no function, but a int", id="no function"),
    ],
)
def test_parameters_that_changed(replacement, problem, monkeypatch):
    monkeypatch.setattr(Worker, "wake_up", replacement)
    found = WAKE_UP.problem()
    assert found is None if problem is None else f"Worker.wake_up: {problem} (see " in found


def test_parameters_in_another_order_and_without_further_keywords():
    def target(first, second=None):
        """Where the seams below look."""

    test_parameters_in_another_order_and_without_further_keywords.target = target

    def problem(*parameters):
        place = f"{__name__}:test_parameters_in_another_order_and_without_further_keywords.target"
        return Seam("order", place, "compat.apply", parameters).problem()

    assert problem("first") is problem("first", "second") is None
    assert "must take (second, first), but takes (first, second)" in problem("second", "first")
    assert "takes no further keywords" in problem("first", "**")


def test_attributes_are_members_fields_and_what_methods_assign():
    seam = Seam("parts", "vllm.v1.worker.gpu_worker:Worker", "compat.apply", attributes=("vllm_config", "load_model"))
    assert seam.problem() is None
    missing = Seam("parts", seam.target, "compat.apply", attributes=("vllm_config", "no_such", "neither")).problem()
    assert "Worker: must have no_such, neither (see vllm_kvtuner.compat.apply)" in missing


def test_every_step_of_apply_is_a_seam():
    """A patch that is added has to be listed."""
    calls = [node.func for node in ast.walk(ast.parse(inspect.getsource(compat.apply))) if isinstance(node, ast.Call)]
    steps = {f"compat.{call.value.id}.{call.attr}" for call in calls}
    assert len(steps) == 23
    assert steps <= {seam.used_by for seam in SEAMS}


def test_every_private_name_of_vllms_is_a_seam():
    """Private names that the package uses and does not define itself."""
    used, defined = set(), set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                is_own = isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self"
                (defined if is_own else used).add(node.attr)
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                defined.add(node.id)
    private = {name for name in used - defined if name.startswith("_") and not name.startswith("__")}
    private -= {"_asdict", "_fields", "_replace"}  # those of a NamedTuple, which are public
    listed = {part for seam in SEAMS for part in (*seam.target.replace(":", ".").split("."), *seam.attributes)}
    assert private and private <= listed
