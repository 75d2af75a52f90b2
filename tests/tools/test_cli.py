"""What all commands share: version, help, exit statuses, old spellings, and JSON alone on stdout."""

import argparse
import json
import shlex
import subprocess
import sys

import pytest

from kvtuner_tools import cli, cli_reference
from kvtuner_tools.arguments import example
from kvtuner_tools.results import stdout_to_stderr
from vllm_kvtuner import __version__

PARSERS = dict(cli_reference.commands())
LEAVES = {
    prog: parser
    for prog, parser in PARSERS.items()
    if not any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)
}
MANY_OPTIONS = 9


def usage_error(capsys, *words):
    """What a command that is not run prints on stderr."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (2, "")
    return captured.err


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word():
    command = [sys.executable, "-m", "kvtuner_tools.cli", "profile", "list", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"kvtuner {__version__}\n")


@pytest.mark.parametrize(
    ("command", "new"),
    [
        ("evaluate MODEL --kv-memory 1", "--kv-cache-memory-bytes"),
        ("evaluate MODEL --context=300", "--sequence-length"),
        ("evaluate MODEL --task gsm8k.jsonl", "--tasks"),
        ("evaluate MODEL --lm-eval gsm8k", "--tasks"),
        ("evaluate MODEL --task-limit 2", "--limit"),
        ("evaluate MODEL --task-shots 2", "--num-fewshot"),
        ("evaluate MODEL --task-tokens 2", "--max-tokens"),
        ("bench serve --model MODEL --setting auto", "the first argument, MODEL"),
        ("bench serve --shape llama31_8b --memory 0.9", "--gpu-memory-utilization"),
        ("bench serve --shape llama31_8b --kv-memory 1", "--kv-cache-memory-bytes"),
        ("bench serve --shape llama31_8b --window 8", "--seconds"),
        ("calibrate MODEL --out calibration --window 512", "--sequence-length"),
        ("capture MODEL --out calibration --window 512", "--sequence-length"),
        ("search calibration --kv-memory 1GiB", "--kv-cache-memory-bytes"),
        ("demo --model-dir MODEL", "the first argument, MODEL"),
    ],
)
def test_spellings_of_earlier_versions_are_refused_by_the_new(capsys, command, new):
    error = usage_error(capsys, *command.split())
    option = next(
        word for word in command.split() if word.startswith("--") and word not in ("--shape", "--out")
    ).partition("=")[0]
    assert f"error: {option} is now {new}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["evaluate", "MODEL", "--json=out.json"], ["evaluate", "MODEL", "--json", "out.json"]]
)
def test_json_to_a_file_is_refused_by_out(capsys, words):
    error = usage_error(capsys, *words)
    assert "--json prints to stdout; a file is written by --out" in error and error.count("\n") == 1


@pytest.mark.parametrize("prog", LEAVES)
def test_help_has_an_example_that_can_be_typed(prog):
    parser = LEAVES[prog]
    words = shlex.split(example(parser) or "")
    assert " ".join(words).startswith(f"{prog} ")
    parser.parse_args(words[len(prog.split()) :])
    assert parser.format_help().endswith(f"example:\n  {example(parser)}\n")


@pytest.mark.parametrize("prog", LEAVES)
def test_help_shows_every_default(prog):
    for action in LEAVES[prog]._actions:
        if action.default not in (None, False, argparse.SUPPRESS) and action.default not in ([], ()):
            assert "default" in (action.help or ""), f"{prog} {action.dest}"


@pytest.mark.parametrize("prog", LEAVES)
def test_help_of_many_options_is_in_groups(prog):
    parser = LEAVES[prog]
    shown = [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]
    groups = [group for group in parser._action_groups[2:] if group._group_actions]
    assert len(shown) < MANY_OPTIONS or len(groups) >= 2, prog
    for group in groups:
        assert group.title


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvtuner_tools.profile_commands.run", interrupt)
    assert cli.main(["profile", "list"]) == 130
    assert capsys.readouterr().err == "kvtuner profile: interrupted\n"


def test_an_extra_that_is_not_installed_is_one_line():
    program = "import sys; sys.modules['optuna'] = None; from kvtuner_tools import cli; sys.exit(cli.main())"
    done = subprocess.run([sys.executable, "-c", program, "calibrate", "--help"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "kvtuner calibrate needs the package optuna: pip install 'vllm-kvtuner[calibration]'\n"


def test_what_engines_print_is_kept_out_of_json(capfd):
    with stdout_to_stderr():
        print("a line of ours")
        subprocess.run([sys.executable, "-c", "print('a line of an engine')"], check=True)
    print(json.dumps({}))
    captured = capfd.readouterr()
    assert captured.out == "{}\n"
    assert captured.err == "a line of ours\na line of an engine\n"
