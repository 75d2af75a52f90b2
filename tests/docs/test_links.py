"""Every relative link and anchor leads somewhere, without a network; every page can be found from the index."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.helpers import markdown
from tests.helpers.markdown import DOCS, ROOT

_EXTERNAL = re.compile(r"[a-z]+:")
_PATH = re.compile(r"(?:docker|docs|precision_profiles|tests|tools|vllm_kvtuner)/[\w./-]+")


def targets(page: Path) -> list[tuple[Path, str]]:
    """File and anchor of each relative link."""
    found = []
    for link in markdown.links(page.read_text(encoding="utf-8")):
        if not _EXTERNAL.match(link):
            path, _, anchor = link.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def tells_history(page: Path) -> bool:
    """Measurements and findings name what was there when they were made."""
    return page.is_relative_to(DOCS / "benchmarks") or page.is_relative_to(DOCS / "notes")


@pytest.mark.parametrize("page", markdown.pages(), ids=markdown.name)
def test_links_and_anchors_lead_somewhere(page):
    for path, anchor in targets(page):
        assert path.exists(), f"{page}: link to {path}, which is not there"
        if anchor:
            assert anchor in markdown.anchors(path.read_text(encoding="utf-8")), f"{page}: no heading {path}#{anchor}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=markdown.name)
def test_links_of_the_docs_stay_within_them(page):
    """The site holds nothing else."""
    assert [path for path, _ in targets(page) if not path.is_relative_to(DOCS)] == []


@pytest.mark.parametrize("page", [page for page in markdown.pages() if not tells_history(page)], ids=markdown.name)
def test_paths_that_pages_name_are_there(page):
    """Inline code that begins with a folder of the repository; a trailing slash names a folder."""
    for code in markdown.inline_code(page.read_text(encoding="utf-8")):
        if _PATH.fullmatch(code):
            assert (ROOT / code).exists(), f"{page}: {code} is not there"


def test_every_page_is_reachable_from_the_index():
    seen, queue = set(), [DOCS / "index.md"]
    while queue:
        page = queue.pop()
        if page in seen or page.suffix != ".md" or not page.is_relative_to(DOCS):
            continue
        seen.add(page)
        queue += [path for path, _ in targets(page)]
    assert set(DOCS.rglob("*.md")) - seen == set()


def test_navigation_holds_every_page():
    """Benchmarks and notes are found from their index pages."""

    def files(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [file for part in (entry.values() if isinstance(entry, dict) else entry) for file in files(part)]

    navigation = files(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"])
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    indexed = {page for page in pages if page.startswith(("benchmarks/", "notes/")) and not page.endswith("index.md")}
    assert set(navigation) - indexed == pages - indexed
    assert len(navigation) == len(set(navigation))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# One\n## One\n", {"one", "one-1"}),
        ("## `kvtuner bench`: what, and [how](x.md)?\n", {"kvtuner-bench-what-and-how"}),
        ("```\n# no heading\n```\n## recent_window\n", {"recent_window"}),
    ],
)
def test_anchors_follow_githubs_rule(text, expected):
    assert markdown.anchors(text) == expected


def test_links_are_found_in_pictures_and_not_in_code():
    text = "[a](x.md) `[b](y.md)` [![c](z.png)](w.md#d)\n```\n[e](v.md)\n```\n"
    assert sorted(markdown.links(text)) == ["w.md#d", "x.md", "z.png"]
