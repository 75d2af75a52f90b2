"""The generated page of the command line is up to date, and commands that pages show can be typed."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtuner_tools import cli_reference
from kvtuner_tools.engine_arguments import REFUSED, split_engine_words, takes_engine_arguments
from tests.helpers import markdown

PARSERS = dict(cli_reference.commands())
_COMMAND = re.compile(r"^\s*(?:\S*/)?(kvtuner [a-z][^#|;]*)")


def test_page_is_up_to_date():
    committed = markdown.GENERATED.read_text(encoding="utf-8")
    assert cli_reference.page() == committed, "run python -m kvtuner_tools.cli_reference"


def test_page_does_not_depend_on_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert cli_reference.page() == markdown.GENERATED.read_text(encoding="utf-8")


def commands(text: str) -> Iterator[str]:
    """Commands of ``kvtuner`` in a page's code, one line each."""
    code = [block.replace("\\\n", " ") for block in markdown.fences(text)]
    for line in [*markdown.inline_code(text), *(line for block in code for line in block.splitlines())]:
        if match := _COMMAND.match(line):
            yield " ".join(match[1].split())


def problem(command: str) -> str | None:
    """Why a command cannot be typed, or None."""
    known = [prog for prog in PARSERS if f"{command} ".startswith(f"{prog} ")]
    if not known:
        return "no such subcommand"
    parser = PARSERS[max(known, key=len)]
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    options = {option for action in shown for option in action.option_strings}
    words = command.split()
    if takes_engine_arguments(parser):
        words, engine = split_engine_words(words, parser)
        if not engine.keys().isdisjoint(REFUSED):
            return f"{', '.join(engine)} cannot all be given"
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in options]
    return f"no option {', '.join(unknown)}" if unknown else None


@pytest.mark.parametrize("page", markdown.pages(), ids=markdown.name)
def test_commands_of_pages_exist(page: Path):
    wrong = {each: why for each in commands(page.read_text(encoding="utf-8")) if (why := problem(each))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("kvtuner profile show X --memory 1GiB", None),
        ("kvtuner profile list --memory 1GiB", "no option --memory"),
        ("kvtuner profiles", "no such subcommand"),
        ("kvtuner evaluate MODEL --lm-eval gsm8k", "no option --lm-eval"),
        ("kvtuner evaluate MODEL --data X -tp 2 --trust-remote-code", None),
        ("kvtuner evaluate MODEL --max-num-seqs 2", "max_num_seqs cannot all be given"),
    ],
)
def test_wrong_commands_are_found(command, expected):
    assert problem(command) == expected
