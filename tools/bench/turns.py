"""Decode steps of engines that take turns, as ratios to the first setting's: for machines that others use as well.

All engines are up at once, each in a process of its own, with random weights and without compiled graphs. In every
round each of them decodes at every point once, in turn, so that what slows the machine for a while slows all of them.
A ratio is the median over rounds of a setting's step over the first setting's in the same round. With --clock cpu, a
step is the processor time of all threads of an engine, which others' work changes little. Take --threads 1 with it,
since threads that wait count as well.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtuner_tools.arguments import parse_memory
from kvtuner_tools.bench.points import Point
from kvtuner_tools.cache_setting import CacheSetting, profile_sha256
from kvtuner_tools.engines.turns import CLOCKS, TurnsJob, start, stop, turn
from kvtuner_tools.processes import OwnProcess
from kvtuner_tools.results import format_table, provenance, write_json

SCHEMA = "kvtuner-bench-turns/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner bench turns``."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder with config.json")
    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--setting",
        action="append",
        required=True,
        type=CacheSetting.parse,
        help="auto, or kvtuner:PROFILE; the others are compared with the first; repeat",
    )
    measured.add_argument(
        "--points", default="1x128,16x128,1x1024,16x1024", help="BATCHxCONTEXT,... (default: %(default)s)"
    )
    measured.add_argument(
        "--rounds", type=int, default=5, help="turns of each engine at each point (default: %(default)s)"
    )
    measured.add_argument("--steps", type=int, default=16, help="decode steps of a turn (default: %(default)s)")
    measured.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="of a turn (default: %(default)s)")
    measured.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--dtype", default="float32", help="of the models (default: %(default)s)")
    engine.add_argument("--threads", type=int, help="of OpenMP in each engine (default: vLLM's choice)")
    engine.add_argument(
        "--kv-cache-memory-bytes",
        type=parse_memory,
        default="1GiB",
        metavar="MEMORY",
        help="of each engine's KV cache (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner bench turns``."""
    points = tuple(Point.parse(text) for text in args.points.split(","))
    _check(args)
    seconds: dict[str, dict[str, list[float]]] = {
        setting.label: {str(point): [] for point in points} for setting in args.setting
    }
    result = {
        "schema": SCHEMA,
        **provenance(),
        "model": str(args.model),
        "dtype": args.dtype,
        "threads": args.threads,
        "clock": args.clock,
        "steps": args.steps,
        "profile_sha256": {setting.label: profile_sha256(setting) for setting in args.setting},
        "seconds": seconds,
    }
    processes = {setting: OwnProcess() for setting in args.setting}
    try:
        for setting, process in processes.items():
            memory = args.kv_cache_memory_bytes
            job = TurnsJob(args.model, setting, args.dtype, args.threads, points, args.steps, memory)
            process.run(start, job)
        for number in range(args.rounds + 1):
            for point in points:
                for setting, process in processes.items():
                    step = process.run(turn, point, args.steps, args.clock)
                    if number:  # the first round warms caches up, the prefix cache among them
                        seconds[setting.label][str(point)].append(step)
            print(f"round {number} of {args.rounds}", flush=True)
            # After every round, so that a run cut short keeps what it measured.
            if args.out and number:
                write_json(args.out, result)
        for process in processes.values():
            process.run(stop)
    finally:
        for process in processes.values():
            process.close()
    print(table(seconds))
    return 0


def table(seconds: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Milliseconds of the first setting's steps, and the others' ratios to it.

    Args:
        seconds: of a step, by setting, point and round.
    """
    (first, base), *others = seconds.items()
    columns = {"point": "point:", f"{first}, ms": "ms:.1f"}
    columns |= {label: f"{number}:.2f" for number, (label, _) in enumerate(others)}
    rows: list[dict[str, Any]] = []
    for point, steps in base.items():
        row: dict[str, Any] = {"point": point, "ms": 1e3 * statistics.median(steps)}
        for number, (_, theirs) in enumerate(others):
            row[str(number)] = statistics.median(ours / one for ours, one in zip(theirs[point], steps, strict=True))
        rows.append(row)
    return format_table(columns, rows)


def _check(args: argparse.Namespace) -> None:
    import torch

    if torch.cuda.is_available():
        raise ValueError("bench turns measures engines on a CPU; bench serve measures them on a GPU")
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, but got {getattr(args, name)}")
    if len({setting.label for setting in args.setting}) < len(args.setting):
        raise ValueError("--setting must name each setting once")
