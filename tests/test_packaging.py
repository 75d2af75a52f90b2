"""The wheel: every module and shipped profile is in it, and its entry points lead somewhere."""

import configparser
import importlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtuner_tools.calibration.calibration_text import BUNDLED_FILES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # A copy, because setuptools leaves build/ and *.egg-info in the tree it builds from.
    for name in ("LICENSE", "README.md", "pyproject.toml", "precision_profiles", "tools", "vllm_kvtuner"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as opened:
        yield opened


def test_wheel_holds_every_module(wheel):
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in (("vllm_kvtuner", "vllm_kvtuner"), ("tools", "kvtuner_tools"))
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_wheel_holds_every_cuda_source(wheel):
    sources = {
        str(path.relative_to(ROOT)) for suffix in ("cu", "cuh") for path in (ROOT / "vllm_kvtuner").rglob(f"*.{suffix}")
    }
    assert "vllm_kvtuner/kernels/cuda/src/paged_attention.cu" in sources
    assert sources == {name for name in wheel.namelist() if name.endswith((".cu", ".cuh"))}


def test_wheel_holds_every_shipped_profile_and_benchmark_shape(wheel):
    profiles = {
        f"vllm_kvtuner/precision_profiles/{path.name}"
        for suffix in ("yaml", "safetensors")
        for path in (ROOT / "precision_profiles").glob(f"*.{suffix}")
    }
    shapes = {
        f"kvtuner_tools/{path.relative_to(ROOT / 'tools')}"
        for folder, suffix in (("shapes", "json"), ("profiles", "yaml"))
        for path in (ROOT / "tools" / "bench" / folder).rglob(f"*.{suffix}")
    }
    assert "vllm_kvtuner/precision_profiles/llama31_3.25bit.yaml" in profiles
    assert profiles | shapes == {name for name in wheel.namelist() if name.endswith((".yaml", ".safetensors", ".json"))}


def test_wheel_holds_the_calibration_text(wheel):
    names = {*BUNDLED_FILES, "README.md", "LICENSE.python.txt"}
    assert {f"kvtuner_tools/calibration/data/{name}" for name in names} <= set(wheel.namelist())


def test_profiles_are_found_in_an_installed_wheel(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "from vllm_kvtuner.profile.load import load_profile; print(load_profile('llama31_3.25bit').source)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in result.stdout


def test_entry_points_lead_to_functions(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert set(entry_points) == {"DEFAULT", "console_scripts", "vllm.general_plugins"}
    for group in ("console_scripts", "vllm.general_plugins"):
        module, _, function = entry_points[group]["kvtuner"].partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_importing_the_plugin_package_imports_no_vllm_and_no_torch():
    code = "import sys, vllm_kvtuner, vllm_kvtuner.plugin; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
