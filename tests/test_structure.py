"""Rules of the source's shape: rooms without upward arrows and circles, narrow functions, imports at the top.

Lists of exceptions give a reason each, and fail when they name what is not there any more.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kvtuner_tools.structure import read_structure
from kvtuner_tools.structure_picture import draw

ROOT = Path(__file__).parents[1]
OWN_PACKAGES = ("kvtuner_tools", "vllm_kvtuner")
MAX_ROOMS = 10
MAX_PARAMETERS = 8
"""Of a function, without ``self`` and ``cls``. Kernels that Triton compiles have as many as their launch has."""

WIDE = {
    "vllm_kvtuner/attention/impl.py KVTunerImpl.__init__": "vLLM's AttentionImpl",
    "vllm_kvtuner/attention/impl.py KVTunerImpl.forward": "vLLM's AttentionImpl",
    "vllm_kvtuner/blocks/window_manager.py RecentManager.find_longest_cache_hit": "vLLM's SingleTypeKVCacheManager",
}
"""Functions with more parameters, whose signatures others dictate."""

WITHOUT_VLLM = "the module is imported where neither torch nor vLLM may be installed"
EXTRAS = "what it imports needs an extra, which whoever asks for help or results alone may lack"
COMPILERS = "needs cuda-core or Triton, which a machine without a GPU may lack"
LATE_IMPORTS = {
    "vllm_kvtuner/plugin.py register": "vLLM imports the module in every process, wanted or not",
    "vllm_kvtuner/compat/__init__.py apply": WITHOUT_VLLM,
    "vllm_kvtuner/kernels/choice.py choose_decode.unsupported": COMPILERS,
    "vllm_kvtuner/kernels/gpu.py _cuda_decodes": COMPILERS,
    "vllm_kvtuner/kernels/gpu.py _cuda_workspace": COMPILERS,
    "vllm_kvtuner/kernels/gpu.py _decode_module": COMPILERS,
    "vllm_kvtuner/kernels/gpu.py _row_kernels": COMPILERS,
    "vllm_kvtuner/kernels/gpu.py _triton_workspace": COMPILERS,
    "vllm_kvtuner/kernels/gpu.py _window_attention": COMPILERS,
    "vllm_kvtuner/kernels/gpu.py compile_cuda": COMPILERS,
    "vllm_kvtuner/kernels/gpu.py flash_attention_in_triton": COMPILERS,
    "tools/bench/kernel.py _measured": WITHOUT_VLLM,
    "tools/calibration/commands.py _run": EXTRAS,
    "tools/calibration/commands.py _search": EXTRAS,
    "tools/doctor.py _case": WITHOUT_VLLM,
    "tools/doctor.py _choices": WITHOUT_VLLM,
    "tools/doctor.py _prove": WITHOUT_VLLM,
    "tools/doctor.py _self_test": WITHOUT_VLLM,
    "tools/doctor.py _serving": WITHOUT_VLLM,
    "tools/engines/evaluate.py MeasuringEngine.switch": "an engine with vLLM's own cache does without the plugin",
}
"""Functions that import modules of ours, each with its reason."""

structure = cache(read_structure)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    """Every function of the product, by file and qualified name."""
    for folder in ("tools", "vllm_kvtuner"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield from _inside(ast.parse(path.read_text()), f"{path.relative_to(ROOT)} ")


def _inside(node: ast.AST, name: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, (*Function.__args__, ast.ClassDef)):
            inner = f"{name}{'' if name.endswith(' ') else '.'}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield inner, child
        yield from _inside(child, inner)


def parameters(function: Function) -> int:
    arguments = function.args
    named = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"])) + bool(arguments.vararg) + bool(arguments.kwarg)


def is_jit(function: Function) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def imports_ours(function: Function) -> bool:
    """Whether a function itself, not one inside of it, imports a module of ours."""
    pending: list[ast.AST] = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(OWN_PACKAGES):
            return True
        if isinstance(node, ast.Import) and any(each.name.startswith(OWN_PACKAGES) for each in node.names):
            return True
        if not isinstance(node, Function):
            pending += ast.iter_child_nodes(node)
    return False


def test_no_function_is_wide():
    found = {name for name, each in functions() if parameters(each) > MAX_PARAMETERS and not is_jit(each)}
    assert found == set(WIDE), "name what dictates the signature, or make a record of the parameters"


def test_modules_of_ours_are_imported_at_the_top():
    found = {name for name, each in functions() if imports_ours(each)}
    assert found == set(LATE_IMPORTS), "move the import to the top of the file, or give a reason"


def test_sinks_are_vllms_tensor_of_logits():
    """The first tokens of a request are ``sink_tokens``."""
    sinks = {
        (name, ast.unparse(each.annotation) if each.annotation else None)
        for name, function in functions()
        for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if each.arg == "sinks"
    }
    assert {annotation for _, annotation in sinks} <= {"torch.Tensor", "torch.Tensor | None"}, sinks


def test_rooms_know_only_what_lies_below():
    found = structure()
    assert len(found.files) <= MAX_ROOMS
    assert found.upward == []


def test_no_module_imports_itself_by_others():
    assert structure().circles == ()


def test_the_picture_of_the_rooms_is_the_newest():
    found = structure()
    picture = draw(found.floors, found.files, found.summaries, found.arrows)
    path = ROOT / "docs" / "design" / "rooms.svg"
    assert path.read_text() == picture, f"draw it again: python -m kvtuner_tools.structure --picture {path}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param("def f(a, b, c, d, e, f, g, h): pass", 8, id="as many as may be"),
        pytest.param("def f(a, b, c, d, e, f, *, g, h, i): pass", 9, id="keywords count"),
        pytest.param("def f(a, /, *rest, **others): pass", 3, id="and so does the rest"),
        pytest.param("def f(self, a): pass", 1, id="the object does not"),
    ],
)
def test_parameters_are_counted(source, expected):
    assert parameters(ast.parse(source).body[0]) == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("from vllm_kvtuner import envs", True),
        ("if a:\n        import kvtuner_tools.cli", True),
        ("import torch", False),
        ("def inner():\n        from vllm_kvtuner import envs", False),
    ],
)
def test_late_imports_are_seen(body, expected):
    assert imports_ours(ast.parse(f"def f():\n    {body}").body[0]) == expected
