"""Attention kernels on one card: microseconds per call, stored bytes, share of read bandwidth, and error.

All implementations run in one process on the same batches, as replayed CUDA graphs, with more distinct cache bytes than
the L2 cache holds. A call is all that a layer launches per step, the combination of splits included. The result is
written after every case.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtuner_tools.bench.pictures import check_picture, draw
from kvtuner_tools.bench.points import IMPLEMENTATIONS, TRANSFORMS, AttentionShape, KernelPoint, presets
from kvtuner_tools.results import format_table, provenance, write_json
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, PrecisionPair

SCHEMA = "kvtuner-bench-kernel/3"
PARTS = ("decode", "layer", "store", "gather")
"""Attention over the cache; the same after the store of the queries' tokens, as a layer does both; store; gather."""
STORE_PAIRS = "K8V8,K4V4,K2V2"
"""Keys and values are stored and gathered apart, so pairs of equal bits show every width."""
_COMMON = {
    "implementation": "implementation:",
    "format": "format:",
    "transforms": "transforms:",
    "nominal bits": "nominal_bits:g",
    "stored bits": "stored_bits:g",
}
_TIMES = {"us": "us:.1f", "% of measured": "percent_measured:.1f", "% of given": "percent_given:.1f"}
_ERRORS = {
    "error / by rounding": "error_random:",
    "nearly uniform": "error_nearly_uniform:",
    "large keys": "error_large_keys:",
}
COLUMNS = {
    "decode": {"point": "place:", **_COMMON, "MB": "megabytes:.1f", **_TIMES, **_ERRORS},
    "layer": {"point": "place:", **_COMMON, "MB": "megabytes:.1f", **_TIMES},
    "store": {"tokens": "place:", **_COMMON, "MB": "megabytes:.1f", **_TIMES},
    "gather": {"tokens": "place:", **_COMMON, "MB": "megabytes:.1f", **_TIMES},
}


@dataclass(frozen=True)
class KernelRequest:
    """What to measure.

    Args:
        parts: of ``PARTS``.
        implementations: of ``IMPLEMENTATIONS``.
        transforms: of ``TRANSFORMS``.
        query_tokens: query tokens of every request.
        gather_tokens: cached tokens of the request that is gathered.
        bandwidth: a read bandwidth to report against beside the measured one, in bytes per second.
        samples: timed samples per case.
        sample_ms: least duration of a sample.
    """

    parts: tuple[str, ...]
    shapes: tuple[AttentionShape, ...]
    block_sizes: tuple[int, ...]
    points: tuple[KernelPoint, ...]
    pairs: tuple[PrecisionPair, ...]
    store_pairs: tuple[PrecisionPair, ...]
    implementations: tuple[str, ...]
    transforms: tuple[str, ...]
    query_tokens: int
    gather_tokens: int
    bandwidth: float | None
    samples: int
    sample_ms: float

    def head(self) -> dict[str, Any]:
        """The options as JSON."""
        return {
            "shapes": [str(shape) for shape in self.shapes],
            "block_sizes": list(self.block_sizes),
            "points": [str(point) for point in self.points],
            "query_tokens": self.query_tokens,
            "samples": self.samples,
            "sample_ms": self.sample_ms,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner bench kernel``."""
    parser.add_argument(
        "--shape",
        action="append",
        type=AttentionShape.parse,
        help=f"HEADS/KV_HEADS/HEAD_SIZE, or {', '.join(presets())}; repeat (default: llama31_8b)",
    )
    parser.add_argument(
        "--block-size", default="16", help="tokens per block; several with commas (default %(default)s)"
    )
    parser.add_argument(
        "--points",
        default="64x8192,8x32000,1x131072,mixed:64:256-16128",
        help="BATCHxCONTEXT or mixed:REQUESTS:LOW-HIGH, with commas (default %(default)s)",
    )
    pairs = ",".join(pair.name for pair in QUANTIZED_PAIRS)
    parser.add_argument("--pairs", default=pairs, help="precision pairs to decode (default: all nine)")
    parser.add_argument("--store-pairs", default=STORE_PAIRS, help="to store and gather (default %(default)s)")
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS), help="default %(default)s")
    parser.add_argument("--transforms", default="none", help=f"of {', '.join(TRANSFORMS)} (default %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (default %(default)s)")
    parser.add_argument("--query-tokens", type=int, default=1, help="per request, 1 to 16 (default %(default)s)")
    parser.add_argument("--gather-tokens", type=int, default=32768, help="cached prefix (default %(default)s)")
    parser.add_argument("--bandwidth", type=float, help="bytes/s to report against too, such as 4.37e12")
    parser.add_argument("--samples", type=int, default=5, help="timed samples per case (default %(default)s)")
    parser.add_argument("--sample-ms", type=float, default=5.0, help="least length of one (default %(default)s)")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that compile kernels and compare them with float64 (default %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--picture", type=Path, help="draw it here, .png or .svg (needs matplotlib)")


def parse_request(args: argparse.Namespace) -> KernelRequest:
    """The request that the arguments make.

    Raises:
        ValueError: an option with a value it does not take.
    """

    def words(option: str, known: Sequence[str]) -> tuple[str, ...]:
        given = tuple(word.strip() for word in getattr(args, option).split(","))
        if unknown := [word for word in given if word not in known]:
            raise ValueError(f"--{option} must be of {', '.join(known)}, but got {', '.join(unknown)}")
        return given

    def pairs(text: str) -> tuple[PrecisionPair, ...]:
        found = tuple(PrecisionPair.parse(word) for word in text.split(","))
        if unpacked := [pair.name for pair in found if not pair.is_quantized]:
            raise ValueError(f"pairs must be of {', '.join(map(str, QUANTIZED_PAIRS))}, but got {', '.join(unpacked)}")
        return found

    def sizes(text: str) -> tuple[int, ...]:
        if not all(word.strip().isdecimal() and int(word) and int(word) % 16 == 0 for word in text.split(",")):
            raise ValueError(f"--block-size must be multiples of 16, but got {text!r}")
        return tuple(map(int, text.split(",")))

    points = tuple(KernelPoint.parse(text) for text in args.points.split(","))
    if not 1 <= args.query_tokens <= 16 or args.query_tokens > min(min(point.lengths) for point in points):
        rule = "--query-tokens must be 1 to 16 and at most the shortest context"
        raise ValueError(f"{rule}, but got {args.query_tokens}")
    for option in ("gather_tokens", "samples", "sample_ms", "bandwidth", "jobs"):
        if (value := getattr(args, option)) is not None and value <= 0:
            raise ValueError(f"--{option.replace('_', '-')} must be positive, but got {value}")
    return KernelRequest(
        parts=words("parts", PARTS),
        shapes=tuple(args.shape or [AttentionShape.parse("llama31_8b")]),
        block_sizes=sizes(args.block_size),
        points=points,
        pairs=pairs(args.pairs),
        store_pairs=pairs(args.store_pairs),
        implementations=words("implementations", IMPLEMENTATIONS),
        transforms=words("transforms", TRANSFORMS),
        query_tokens=args.query_tokens,
        gather_tokens=args.gather_tokens,
        bandwidth=args.bandwidth,
        samples=args.samples,
        sample_ms=args.sample_ms,
    )


def table(result: dict[str, Any]) -> str:
    """All parts of a result as Markdown tables."""
    tables = []
    for part, columns in COLUMNS.items():
        rows = []
        for entry in result[part]:
            shape = "" if len(result["shapes"]) == 1 else f" {entry['shape']} block {entry['block_size']}"
            row = {**entry, "place": f"{entry.get('point') or format(entry['tokens'], ',')}{shape}"}
            row["megabytes"] = entry["bytes"] / 1e6 if entry.get("bytes") else None
            for kind in ("measured", "given"):
                fraction = entry.get(f"fraction_{kind}")
                row[f"percent_{kind}"] = None if fraction is None else 100 * fraction
            for name, error in entry.get("relative_errors", {}).items():
                row[f"error_{name}"] = f"{error:.1e} / {entry['rounding_errors'][name]:.1e}"
            rows.append(row)
        if rows:
            tables.append(f"{part}\n\n{format_table(columns, rows)}")
    return "\n\n".join(tables)


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner bench kernel``; 1 when a case failed, the others being measured all the same."""
    request = parse_request(args)
    if args.picture:
        check_picture(args.picture)
    import torch

    if not torch.cuda.is_available():
        raise ValueError("bench kernel must run on a GPU, but torch finds none")
    from tqdm import tqdm

    from kvtuner_tools.bench.kernel_measure import KernelMeter
    from kvtuner_tools.bench.read_bandwidth import measure_read_bandwidth

    begin = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    bandwidth = measure_read_bandwidth(device)
    meter = KernelMeter(request, device, l2_bytes, bandwidth)
    cases, skipped = meter.plan()
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **provenance(device=torch.cuda.get_device_name()),
        **request.head(),
        "bandwidth": {
            "measured_bytes_s": bandwidth,
            "given_bytes_s": request.bandwidth,
            "l2_bytes": l2_bytes,
        },
        "skipped": skipped,
        **{part: [] for part in PARTS},
    }
    with tqdm(total=0, desc="compile and compare", unit="kernel") as bar:

        def done(count: int, total: int) -> None:
            bar.total, bar.n = total, count
            bar.refresh()

        meter.compare(cases, args.jobs, done)
    with tqdm(cases, desc="measure", unit="case") as bar:
        for case in bar:
            bar.set_postfix_str(str(case))
            result[case.part].append(meter.measure(case))
            if args.out:
                write_json(args.out, result)
    result["seconds"] = round(time.monotonic() - begin, 1)
    if args.out:
        write_json(args.out, result)
    if args.picture:
        draw(result, args.picture)
    return report(result)


def report(result: dict[str, Any]) -> int:
    """Print the tables, and what was skipped or failed on stderr; the exit status."""
    print(
        f"{result['device']}: reads {result['bandwidth']['measured_bytes_s'] / 1e12:.2f} TB/s, "
        f"{', '.join(result['shapes'])} (heads/KV heads/head size), {result['seconds']:.0f} s"
    )
    print(table(result))
    for entry in result["skipped"]:
        print(f"skipped {entry['implementation']} ({entry['part']}): {entry['reason']}", file=sys.stderr)
    for entry in (entry for part in PARTS for entry in result[part] if entry["unsupported"]):
        print(f"unsupported {entry['implementation']} {entry['format']}: {entry['unsupported']}", file=sys.stderr)
    failed = [entry for part in PARTS for entry in result[part] if entry["failure"]]
    for entry in failed:
        place = entry.get("point") or f"{entry['tokens']} tokens"
        print(f"{entry['implementation']} {entry['format']} {place}: {entry['failure']}", file=sys.stderr)
    return 1 if failed else 0
