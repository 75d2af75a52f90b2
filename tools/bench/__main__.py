"""``python -m kvtuner_tools.bench``: the same as ``kvtuner bench``."""

import argparse
import sys

from kvtuner_tools.bench import add_arguments, run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="kvtuner bench")
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
