"""A small layer and requests of the kernel benchmark."""

import argparse

from kvtuner_tools import bench
from kvtuner_tools.bench.kernel_request import KernelRequest, parse_request
from kvtuner_tools.bench.points import LayerHeads

HEADS = LayerHeads(4, 2, 64)


def request_of(*words: str) -> KernelRequest:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parse_request(parser.parse_args(["kernel", *words]))
