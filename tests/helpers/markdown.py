"""The project's Markdown pages, and what tests read in them: links, anchors, code and prose."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
GENERATED = DOCS / "reference" / "cli.md"
"""Made from the parsers' own texts."""

_FENCE = re.compile(r"^( *)(`{3,}).*?^\1\2 *$\n?", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_LINK = re.compile(r"\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
_ITEM = re.compile(r" *(?:[-*]|[0-9]+\.) +")


def pages() -> list[Path]:
    """Every page that people read."""
    return [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]


def name(page: Path) -> str:
    """Of a page in a test's id."""
    return str(page.relative_to(ROOT))


def without_fences(text: str) -> str:
    return _FENCE.sub("\n", text)


def fences(text: str) -> Iterator[str]:
    """What stands in fenced code."""
    for match in _FENCE.finditer(text):
        yield "\n".join(match[0].splitlines()[1:-1])


def inline_code(text: str) -> Iterator[str]:
    """What stands between backticks, tables included."""
    for match in _CODE.finditer(without_fences(text)):
        yield " ".join(match[1].split())


def links(text: str) -> Iterator[str]:
    """Targets of links and pictures."""
    plain = _CODE.sub("code", without_fences(text))
    for match in _LINK.finditer(plain):
        yield match[2]
        yield from links(match[1])


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, by GitHub's rule."""
    seen: Counter[str] = Counter()
    found = set()
    for match in _HEADING.finditer(without_fences(text)):
        title = _LINK.sub(r"\1", match[1]).replace("`", "").lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def sentences(text: str) -> Iterator[str]:
    """Sentences of a page's prose: no headings, tables, fenced code and pictures; inline code counts as one word."""
    for block in _blocks(_COMMENT.sub("", without_fences(text))):
        plain = _CODE.sub("CODE", block)
        plain = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", plain)
        plain = _LINK.sub(r"\1", plain)
        for sentence in re.split(r"(?<=[.!?:])[)\"]?\s+", plain):
            if sentence.strip():
                yield " ".join(sentence.split())


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs and list items."""
    block: list[str] = []
    for line in [*text.splitlines(), ""]:
        ends = not line.strip() or line.startswith(("#", "|", "<", "!["))
        if (ends or _ITEM.match(line)) and block:
            yield " ".join(block)
            block = []
        if not ends:
            block.append(_ITEM.sub("", line, count=1) if _ITEM.match(line) else line.strip())
