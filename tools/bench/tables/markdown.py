"""Markers in Markdown: what stands between them, or before them, is generated.

A block is everything from a line ``<!-- generated: NAME -->`` to the line ``<!-- end -->``. A figure in prose is a
number with its claim behind it: ``2.2<!-- claim: cached-vs-fp8 -->``.
"""

import re
from pathlib import Path

from . import quality, rows, served, simulated, speed
from .claims import CLAIMS
from .published import Published

BLOCKS = speed.BLOCKS | rows.BLOCKS | quality.BLOCKS | served.BLOCKS | simulated.BLOCKS
"""Functions ``(published, page) -> Markdown`` by the blocks' names."""
NUMBER = r"\d[\d,]*(?:\.\d+)?"
_BLOCK = re.compile(r"^<!-- generated: (?P<name>\S+) -->\n.*?^<!-- end -->$", re.DOTALL | re.MULTILINE)
_CLAIM = re.compile(rf"(?P<number>{NUMBER})(?P<marker><!-- claim: (?P<name>\S+) -->)")
_CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_UNCLAIMED = re.compile(
    rf"(?<![\w.,])(?:{NUMBER}(?:%|\s(?:times|percent|us|ms|tokens/s|points)\b)|0\.\d{{3,}}(?![\d<]))"
)


def pages(root: Path) -> list[Path]:
    """All pages that may hold markers: README and everything under docs."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rewrite(text: str, published: Published, page: Path) -> str:
    """A page's text with its blocks and figures as the data give them.

    Args:
        text: the page's text.
        published: the data.
        page: the page's path, from which links go out.

    Raises:
        ValueError: a marker with an unknown name, or a block that does not end.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"{page}: a block must be one of {', '.join(sorted(BLOCKS))}, but got {name!r}")
        return f"<!-- generated: {name} -->\n\n{BLOCKS[name](published, page)}\n\n<!-- end -->"

    def claim(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in CLAIMS:
            raise ValueError(f"{page}: a claim must be one of {', '.join(sorted(CLAIMS))}, but got {name!r}")
        return CLAIMS[name](published) + match["marker"]

    whole = len(_BLOCK.findall(text))
    if (begun := len(re.findall(r"^<!-- generated: ", text, re.MULTILINE))) != whole:
        raise ValueError(f"{page}: every block must end with <!-- end -->, but got {begun} beginnings and {whole} ends")
    text = _CLAIM.sub(claim, _BLOCK.sub(block, text))
    if (markers := text.count("<!-- claim:")) != (filled := len(_CLAIM.findall(text))):
        raise ValueError(f"{page}: a number must stand before every claim, but got {filled} for {markers} claims")
    return text


def unclaimed(text: str) -> list[str]:
    """Figures in prose that no claim stands behind: multiples, percentages, times, rates, losses and accuracies.

    Blocks, code, tables and headings' own lines are not looked at.
    """
    prose = _CODE.sub("", _BLOCK.sub("", text))
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "#")))
    return [match[0] for match in _UNCLAIMED.finditer(prose)]
