"""``kvtuner bench``: speed and capacity, one module per benchmark."""

import argparse
import importlib

BENCHMARKS = (
    ("kernel", "kernel", "attention, store and gather kernels against vLLM's on one card"),
    ("serve", "serve", "decode and prefill speed, throughput and KV capacity of whole engines"),
    ("turns", "turns", "decode steps of engines on a CPU that take turns, as ratios"),
    ("picture", "pictures", "draw a result of kernel or serve"),
)
"""Name, module with ``add_arguments(parser)`` and ``run(args) -> int``, and help of each benchmark."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per benchmark."""
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module_name, help_text in BENCHMARKS:
        module = importlib.import_module(f".{module_name}", __package__)
        subparser = subparsers.add_parser(name, help=help_text, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run_benchmark=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark and return its exit status."""
    return args.run_benchmark(args)
