"""Sentences of the bundled novel, of which texts for needles and quotes are made."""

import re
from functools import cache
from pathlib import Path

NOVEL = Path(__file__).parents[1] / "calibration" / "data" / "novel.txt"
_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["']))\s+(?=["'A-Z])""")
_TITLE = re.compile(r"\b(Mr|Mrs|Dr|St|Esq)\.$")


@cache
def sentences() -> tuple[str, ...]:
    """All sentences in the order of the novel, chapter headings left out."""
    found: list[str] = []
    for paragraph in NOVEL.read_text(encoding="utf-8").split("\n\n"):
        text = " ".join(paragraph.split())
        if not text or text.startswith("CHAPTER"):
            continue
        parts: list[str] = []
        for part in _END.split(text):
            if parts and _TITLE.search(parts[-1]):
                parts[-1] += f" {part}"
            else:
                parts.append(part)
        found += parts
    return tuple(found)


def sentences_from(start: int, count: int) -> list[str]:
    """So many sentences from a place on; behind the novel's end comes its beginning."""
    novel = sentences()
    return [novel[(start + index) % len(novel)] for index in range(count)]
