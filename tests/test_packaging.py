"""The wheel: every module and shipped profile is in it, its entry points lead somewhere, an index can show it."""

import configparser
import importlib
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path

import pytest

from kvtuner_tools.calibration.calibration_text import BUNDLED_FILES, HELDOUT_FILES
from kvtuner_tools.calibration.generated_text import PROMPTS
from kvtuner_tools.evaluation.generate import QUESTIONS
from vllm_kvtuner import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    # A copy, because setuptools leaves build/ and *.egg-info in the tree it builds from.
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py", "precision_profiles", "tools", "vllm_kvtuner"):
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
        f"vllm_kvtuner/{path.relative_to(ROOT)}"
        for suffix in ("yaml", "safetensors")
        for path in (ROOT / "precision_profiles").rglob(f"*.{suffix}")
    }
    shapes = {
        f"kvtuner_tools/{path.relative_to(ROOT / 'tools')}"
        for folder, suffix in (("shapes", "json"), ("profiles", "yaml"))
        for path in (ROOT / "tools" / "bench" / folder).rglob(f"*.{suffix}")
    }
    shapes.add("kvtuner_tools/bench/step_times.json")
    assert "vllm_kvtuner/precision_profiles/published/llama31_3.25bit.yaml" in profiles
    assert profiles | shapes == {name for name in wheel.namelist() if name.endswith((".yaml", ".safetensors", ".json"))}


def test_wheel_holds_the_calibration_text_and_the_questions(wheel):
    names = {*BUNDLED_FILES, *HELDOUT_FILES, "README.md", "LICENSE.python.txt", PROMPTS.name}
    assert {f"kvtuner_tools/calibration/data/{name}" for name in names} <= set(wheel.namelist())
    assert f"kvtuner_tools/evaluation/data/{QUESTIONS.name}" in wheel.namelist()


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


@pytest.fixture(scope="module")
def metadata(wheel) -> EmailMessage:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name), policy=policy.default.clone(utf8=True))


def test_version_licence_and_changelog_agree(wheel, metadata):
    assert metadata["Version"] == __version__
    (heading, *_) = re.findall("^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(__version__)}(, unreleased| - \d{{4}}-\d\d-\d\d)", heading)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["License-Expression"] == project["license"]
    for path in project["license-files"]:
        (name,) = (name for name in wheel.namelist() if name.endswith(f"/licenses/{path}"))
        assert wheel.read(name) == (ROOT / path).read_bytes()


def test_classifiers_name_the_pythons_that_are_served(metadata):
    classifiers = metadata.get_all("Classifier")
    minors = [int(minor) for minor in re.findall(r":: 3\.(\d+)\n", "\n".join(classifiers) + "\n")]
    assert metadata["Requires-Python"] in (
        f">=3.{min(minors)},<3.{max(minors) + 1}",
        f"<3.{max(minors) + 1},>=3.{min(minors)}",
    )
    # An index refuses unknown ones, and those of a licence beside an expression.
    assert not [classifier for classifier in classifiers if classifier.startswith("License ::")]
    assert "Development Status :: 4 - Beta" in classifiers


def test_addresses_are_real(metadata):
    """None is stated yet; whichever is must be the project's own, and no stand-in."""
    urls = [line.split(", ")[1] for line in metadata.get_all("Project-URL") or ()]
    assert not [
        url for url in urls if re.search(r"example\.|localhost|\.invalid", url) or not url.startswith("https://")
    ]


def test_long_description_leads_nowhere_that_an_index_does_not_have(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert text.startswith("# vllm-kvtuner")
    assert "pip install" in text and "KVTuner" in text
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets and all(target.startswith(("https://", "#")) for target in targets)
    assert "<!--" not in text


def test_long_description_of_a_published_project_has_absolute_links():
    make = runpy.run_path(str(ROOT / "setup.py"))["long_description"]
    readme = "<!-- generated -->\n[a](docs/a.md#b) [c](https://c) [d](#d)\n\n![e](docs/e.png)\n"
    assert make(readme, None, "v1") == "a [c](https://c) [d](#d)\n"
    source = "https://host/org/name"
    assert make(readme, source, "v1") == (
        f"[a]({source}/blob/v1/docs/a.md#b) [c](https://c) [d](#d)\n\n![e]({source}/raw/v1/docs/e.png)\n"
    )


def test_metadata_is_complete(metadata):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("Summary", "Keywords", "Requires-Python", "License-Expression"):
        assert metadata[name], name
    assert set(metadata.get_all("Provides-Extra")) == set(project["optional-dependencies"])
