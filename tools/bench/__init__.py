"""``kvtuner bench``: speed and capacity, one module per benchmark."""

import argparse
import importlib

from kvtuner_tools.arguments import set_example

BENCHMARKS = (
    (
        "kernel",
        "kernel",
        "attention, store and gather kernels against vLLM's on one card",
        "kvtuner bench kernel --shape llama31_8b --points 64x8192 --out kernel.json",
    ),
    (
        "serve",
        "serve",
        "decode and prefill speed, throughput and KV capacity of whole engines",
        "kvtuner bench serve --shape llama31_8b --setting auto --setting kvtuner:K4V4 --out serve.json",
    ),
    (
        "turns",
        "turns",
        "decode steps of engines on a CPU that take turns, as ratios",
        "kvtuner bench turns MODEL --setting auto --setting kvtuner:K4V4",
    ),
    (
        "transfer",
        "transfer",
        "bytes of cached tokens on a wire and in tiers, and time to the first token from there",
        "kvtuner bench transfer MODEL --setting auto --setting kvtuner:K4V4 --out transfer.json",
    ),
    ("picture", "pictures", "draw a result of kernel or serve", "kvtuner bench picture serve.json serve.png"),
)
"""Name, module with ``add_arguments(parser)`` and ``run(args) -> int``, help and example of each benchmark."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per benchmark."""
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, module_name, help_text, example in BENCHMARKS:
        module = importlib.import_module(f".{module_name}", __package__)
        subparser = subparsers.add_parser(name, help=help_text, description=module.__doc__)
        module.add_arguments(subparser)
        set_example(subparser, example)
        subparser.set_defaults(run_benchmark=module.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark and return its exit status."""
    return args.run_benchmark(args)
