"""The ``kvtuner`` command: one subcommand per module, imported only when it is called."""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = (
    ("profile", "profile_commands", "show, check and list precision profiles"),
    ("doctor", "doctor", "say what would serve a model on this machine and why, and test the kernels"),
    ("statics", "bias_offset", "make a statics file from the bias of a model's k projection"),
    ("demo", "demo", "serve the demo model and show a chat completion"),
    ("evaluate", "evaluate", "measure a profile's loss against the unquantized cache"),
    (
        "calibrate",
        "calibration.commands:calibrate",
        "find the best precision profile of a model within a memory budget",
    ),
    ("capture", "calibration.commands:capture", "calibration's first stage: queries, keys and values of real text"),
    ("transforms", "calibration.commands:transforms", "choose each layer's transforms by measured error"),
    ("feedback", "calibration.commands:feedback", "make round feedback, and choose which layers have it"),
    ("sensitivity", "calibration.commands:sensitivity", "measure every pair's error in every layer"),
    ("prune", "calibration.commands:prune", "keep the pairs on each layer's Pareto front"),
    ("cluster", "calibration.commands:cluster", "group layers that share a decision"),
    ("search", "calibration.commands:search", "search settings within the budget, or join such a search"),
    ("export", "calibration.commands:export", "score the chosen setting on held-out text and write its profile"),
    ("report", "calibration.commands:report", "make a calibration's report.html again"),
    ("bench", "bench", "measure speed and capacity"),
)
"""Name, module (or ``module:attribute``) with ``add_arguments(parser)`` and ``run(args) -> int``, and help of each
subcommand."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit status; 1 with all problems on stderr where the user's input is wrong.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="kvtuner", description="Per-layer mixed-precision KV cache for vLLM.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    called = next((word for word in argv if not word.startswith("-")), None)
    for name, module_name, help_text in COMMANDS:
        subparser = subparsers.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        if name == called:
            path, _, attribute = module_name.partition(":")
            command = importlib.import_module(f".{path}", __package__)
            command = getattr(command, attribute) if attribute else command
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:  # a ProfileError is a ValueError
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
