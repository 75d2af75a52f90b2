"""Attention kernels on one card: microseconds per call, stored bytes, share of read bandwidth, and error.

All implementations run in one process on the same batches, as replayed CUDA graphs, with more distinct cache bytes than
the L2 cache holds. A call is all that a layer launches per step, the combination of splits included. The result is
written after every case.
"""

# What needs torch is imported by run(): the help of kvtuner bench does without.

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from kvtuner_tools.bench.kernel_request import PARTS, KernelRequest, parse_request
from kvtuner_tools.bench.pictures import check_picture, draw
from kvtuner_tools.bench.points import IMPLEMENTATIONS, TRANSFORMS
from kvtuner_tools.bench.presets import presets
from kvtuner_tools.results import format_table, provenance, stdout_to_stderr, write_json
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS

SCHEMA = "kvtuner-bench-kernel/4"
STORE_PAIRS = "K8V8,K4V4,K2V2"
"""Keys and values are stored and gathered apart, so pairs of equal bits show every width."""
_ROWS = {"query tokens": "query_tokens:", "rows": "rows_per_kv_head:"}
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
    "decode": {"point": "place:", **_ROWS, **_COMMON, "MB": "megabytes:.1f", **_TIMES, **_ERRORS},
    "layer": {"point": "place:", **_ROWS, **_COMMON, "MB": "megabytes:.1f", **_TIMES},
    "store": {"tokens": "place:", **_COMMON, "MB": "megabytes:.1f", **_TIMES},
    "gather": {"tokens": "place:", **_COMMON, "MB": "megabytes:.1f", **_TIMES},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner bench kernel``."""
    batches = parser.add_argument_group("layers and batches")
    batches.add_argument(
        "--shape",
        action="append",
        help=f"HEADS/KV_HEADS/HEAD_SIZE, or {', '.join(presets())}, or a rank's share of one under tensor parallelism "
        "such as llama33_70b:tp8; repeat (default: llama31_8b)",
    )
    batches.add_argument(
        "--block-size", default="16", metavar="TOKENS", help="of a block; several with commas (default: %(default)s)"
    )
    batches.add_argument(
        "--points",
        default="64x8192,8x32000,1x131072,mixed:64:256-16128",
        help="BATCHxCONTEXT or mixed:REQUESTS:LOW-HIGH, with commas (default: %(default)s)",
    )
    batches.add_argument(
        "--query-tokens",
        default="1",
        metavar="TOKENS",
        help=f"of a request, 1 to {MAX_DECODE_QUERY_LEN}; several with commas; 1+4: requests bring 1 and 4 in turn "
        "(default: %(default)s)",
    )
    batches.add_argument(
        "--gather-tokens", type=int, default=32768, metavar="TOKENS", help="of the cached prefix (default: %(default)s)"
    )
    kernels = parser.add_argument_group("kernels")
    pairs = ",".join(pair.name for pair in QUANTIZED_PAIRS)
    kernels.add_argument("--parts", default=",".join(PARTS), help="what to measure (default: %(default)s)")
    kernels.add_argument("--pairs", default=pairs, help="precision pairs to decode (default: all)")
    kernels.add_argument(
        "--store-pairs", default=STORE_PAIRS, metavar="PAIRS", help="to store and gather (default: %(default)s)"
    )
    kernels.add_argument(
        "--implementations",
        default=",".join(IMPLEMENTATIONS),
        metavar="NAMES",
        help="with commas (default: %(default)s)",
    )
    kernels.add_argument("--transforms", default="none", help=f"of {', '.join(TRANSFORMS)} (default: %(default)s)")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--samples", type=int, default=5, help="timed samples per case (default: %(default)s)")
    timing.add_argument(
        "--sample-ms", type=float, default=5.0, metavar="MS", help="least length of one (default: %(default)s)"
    )
    timing.add_argument("--bandwidth", type=float, metavar="BYTES_PER_S", help="to report against too, such as 4.37e12")
    timing.add_argument(
        "--jobs",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that compile kernels and compare them with float64 (default: %(default)s)",
    )
    result = parser.add_argument_group("result")
    result.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    result.add_argument("--json", action="store_true", help="print the same JSON instead of tables")
    result.add_argument("--picture", type=Path, metavar="FILE", help="draw it, .png or .svg (needs matplotlib)")


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
    with stdout_to_stderr(args.json):
        result = _measured(request, args)
    return report(result, args.json)


def _measured(request: KernelRequest, args: argparse.Namespace) -> dict[str, Any]:
    """The result, which is also written and drawn."""
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
    return result


def report(result: dict[str, Any], as_json: bool) -> int:
    """Print the tables or JSON, and what was skipped or failed on stderr; the exit status."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _print_tables(result)
    for entry in result["skipped"]:
        print(f"skipped {entry['implementation']} ({entry['part']}): {entry['reason']}", file=sys.stderr)
    for entry in (entry for part in PARTS for entry in result[part] if entry["unsupported"]):
        print(f"unsupported {entry['implementation']} {entry['format']}: {entry['unsupported']}", file=sys.stderr)
    failed = [entry for part in PARTS for entry in result[part] if entry["failure"]]
    for entry in failed:
        if "point" in entry:
            place = f"{entry['shape']} {entry['point']} with {entry['query_tokens']} query tokens"
        else:
            place = f"{entry['shape']} {entry['tokens']} tokens"
        print(f"{entry['implementation']} {entry['format']} {place}: {entry['failure']}", file=sys.stderr)
    return 1 if failed else 0


def _print_tables(result: dict[str, Any]) -> None:
    names = {shape: [name for name, its in result["presets"].items() if its == shape] for shape in result["shapes"]}
    shapes = (f"{shape} {', '.join(found)}" if found else shape for shape, found in names.items())
    print(
        f"{result['device']}: reads {result['bandwidth']['measured_bytes_s'] / 1e12:.2f} TB/s, "
        f"{', '.join(shapes)} (heads/KV heads/head size), {result['seconds']:.0f} s"
    )
    print(table(result))
