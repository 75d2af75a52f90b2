"""What the commands' options have in common: sizes, spellings of earlier versions, and how help looks."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

USAGE_ERROR = 2
"""Exit status of arguments that a command does not take, as argparse has it."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
CLOSED_PIPE = 141
"""Exit status after a reader has closed the pipe that stdout is, as shells have it."""

_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B|[KMGT])?", re.IGNORECASE)
_UNITS = {
    unit: base**power
    for base, names in ((1000, ("b", "kb", "mb", "gb", "tb")), (1024, ("b", "kib", "mib", "gib", "tib")))
    for power, unit in enumerate(names)
}
_EXAMPLE = "example:\n"


def parse_memory(text: str) -> int:
    """Bytes of ``20GiB``, ``512 MB``, ``1g`` or a plain number of bytes.

    A single letter means what it does to vLLM: ``k``, ``m``, ``g``, ``t`` are powers of 1,000, capitals of 1,024.

    Raises:
        argparse.ArgumentTypeError: not of that form.
    """
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"memory must be a number with a unit such as 20GiB, but got {text!r}")
    unit = match[2] or "B"
    if len(unit) == 1 and unit not in "bB":
        unit += "iB" if unit.isupper() else "B"
    return round(float(match[1]) * _UNITS[unit.lower()])


def memory_text(size: int) -> str:
    """Bytes as :func:`parse_memory` reads them, in the largest binary unit that divides them."""
    power = next(power for power in range(4, -1, -1) if size % 1024**power == 0)
    return f"{size // 1024**power}{('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def refuse_old(parser: argparse.ArgumentParser, spellings: Mapping[str, str]) -> None:
    """Answer an option of an earlier version with what is written instead, and nothing else.

    Args:
        parser: of the command.
        spellings: the old option, and the end of ``--old is now ...``.
    """
    for old, new in spellings.items():
        parser.add_argument(old, action=_Renamed, new=new)


class _Renamed(argparse.Action):
    """An option that is no more."""

    def __init__(self, option_strings: list[str], dest: str, new: str) -> None:
        super().__init__(
            option_strings, argparse.SUPPRESS, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        self._new = new

    def __call__(self, parser: argparse.ArgumentParser, _: Any, __: Any, option_string: str | None = None) -> None:
        parser.exit(USAGE_ERROR, f"{parser.prog}: error: {option_string} is now {self._new}\n")


class HelpFormatter(argparse.HelpFormatter):
    """argparse's, which leaves the lines of an example as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLE):
            return text
        return super()._fill_text(text, width, indent)


def set_example(parser: argparse.ArgumentParser, command: str) -> None:
    """Let a command's help end with an example."""
    parser.formatter_class = HelpFormatter
    parser.epilog = f"{_EXAMPLE}  {command}"


def example(parser: argparse.ArgumentParser) -> str | None:
    """What :func:`set_example` was given."""
    return (parser.epilog or "").removeprefix(_EXAMPLE).strip() or None
