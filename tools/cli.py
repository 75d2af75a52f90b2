"""The ``kvtuner`` command: one subcommand per module, imported only when it is called."""

import argparse
import importlib
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from kvtuner_tools.arguments import CLOSED_PIPE, INTERRUPTED, USAGE_ERROR, set_example
from kvtuner_tools.engine_arguments import split_engine_words, takes_engine_arguments
from vllm_kvtuner import __version__


class Entry(NamedTuple):
    """A subcommand.

    Args:
        name: as it is typed.
        module: in this package, or ``module:attribute``; has ``add_arguments(parser)`` and ``run(args) -> int``.
        help: a line without a capital and a full stop.
        example: a command that can be typed; subcommands of a subcommand have their own.
        extra: of the distribution, whose packages the module needs.
    """

    name: str
    module: str
    help: str
    example: str | None = None
    extra: str | None = None


def _stage(name: str, help_text: str, example: str) -> Entry:
    return Entry(name, f"calibration.commands:{name}", help_text, example, "calibration")


COMMANDS = (
    Entry("profile", "profile_commands", "show, check and list precision profiles"),
    Entry(
        "doctor",
        "doctor",
        "say what would serve a model on this machine and why, and test the kernels",
        "kvtuner doctor Qwen/Qwen3-8B --profile K8V4",
    ),
    Entry(
        "statics",
        "bias_offset",
        "make a statics file from the bias of a model's k projection",
        "kvtuner statics Qwen/Qwen2.5-7B-Instruct --out qwen.safetensors",
    ),
    Entry("demo", "demo", "serve the demo model and show a chat completion", "kvtuner demo --once", "demo"),
    Entry(
        "evaluate",
        "evaluate",
        "measure a profile's loss against the unquantized cache",
        "kvtuner evaluate Qwen/Qwen3-8B --profile K8V4 --kv-cache-dtype fp8 --out scores.json",
    ),
    _stage(
        "calibrate",
        "find the best precision profile of a model within a memory budget",
        "kvtuner calibrate Qwen/Qwen3-8B --max-bits 4.25 --out calibration/",
    ),
    _stage(
        "capture",
        "calibration's first stage: queries, keys and values of real text",
        "kvtuner capture Qwen/Qwen3-8B --out calibration/",
    ),
    _stage("transforms", "choose each layer's transforms by measured error", "kvtuner transforms calibration/"),
    _stage("feedback", "make round feedback, and choose which layers have it", "kvtuner feedback calibration/"),
    _stage("sensitivity", "measure every pair's error in every layer", "kvtuner sensitivity calibration/"),
    _stage("prune", "keep the pairs on each layer's Pareto front", "kvtuner prune calibration/ --unquantized 0,31"),
    _stage("cluster", "group layers that share a decision", "kvtuner cluster calibration/ --cluster-factor 1"),
    _stage(
        "search",
        "search settings within the budget, or join such a search",
        "kvtuner search calibration/ --max-bits 4.25 --trials 128",
    ),
    _stage("export", "score the chosen setting on held-out text and write its profile", "kvtuner export calibration/"),
    _stage("report", "make a calibration's report.html again", "kvtuner report calibration/"),
    Entry("bench", "bench", "measure speed and capacity"),
)


def configure(parser: argparse.ArgumentParser, entry: Entry) -> Any:
    """Give a subcommand's parser its arguments and its example.

    Returns:
        The module or object that runs it.

    Raises:
        ModuleNotFoundError: a package of its extra is not installed.
    """
    path, _, attribute = entry.module.partition(":")
    module = importlib.import_module(f".{path}", __package__)
    command = getattr(module, attribute) if attribute else module
    command.add_arguments(parser)
    if entry.example:
        set_example(parser, entry.example)
    return command


def description(entry: Entry) -> str:
    return f"{entry.help[0].upper()}{entry.help[1:]}."


def _json_file(words: Sequence[str]) -> bool:
    """Whether ``--json`` is given a file."""
    followed = any(word == "--json" and after.endswith(".json") for word, after in itertools.pairwise(words))
    return followed or any(word.startswith("--json=") for word in words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit status; 1 with all problems on stderr where the user's input is wrong, 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="kvtuner", description="Per-layer mixed-precision KV cache for vLLM.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    engine_words: dict[str, list[str]] = {}
    for entry in COMMANDS:
        subparser = subparsers.add_parser(entry.name, help=entry.help, description=description(entry))
        if entry.name == called:
            try:
                subparser.set_defaults(run=configure(subparser, entry).run)
                if takes_engine_arguments(subparser):
                    behind = argv.index(entry.name) + 1
                    argv[behind:], engine_words = split_engine_words(argv[behind:], subparser)
            except ModuleNotFoundError as error:
                if entry.extra is None or (error.name or "").startswith(("kvtuner_tools", "vllm_kvtuner")):
                    raise
                install = f"pip install 'vllm-kvtuner[{entry.extra}]'"
                print(f"kvtuner {entry.name} needs the package {error.name}: {install}", file=sys.stderr)
                return 1
    if called == "evaluate" and _json_file(argv):
        # --json was the file's name once.
        parser.exit(USAGE_ERROR, "kvtuner evaluate: error: --json prints to stdout; a file is written by --out\n")
    args = parser.parse_args(argv)
    if engine_words:
        args.engine = engine_words
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough, such as head; Python would say so again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (ValueError, OSError) as error:  # a ProfileError is a ValueError
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"kvtuner {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
