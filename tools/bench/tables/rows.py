"""Tables of many query rows: kernels by rows of a KV head, and engines that verify drafted tokens.

Both are of every result whose name begins as ``KERNELS`` and ``ENGINES`` say, however many there are: a file more in
the data folder is a few lines more in its table.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtuner_tools.bench.kernel_entries import query_tokens_of, rows_of
from kvtuner_tools.bench.speculation import Speculation

from .published import Published, fixed, table
from .speed import FEW_PAIRS, point_name

KERNELS, ENGINES = "kernel_rows", "serve_speculation"
COLUMNS = {
    "FA3 bf16": ("fa3_bf16", "bf16"),
    "FA3 fp8": ("fa3_fp8", "fp8"),
    "XQA bf16": ("xqa_bf16", "bf16"),
    "XQA fp8": ("xqa_fp8", "fp8"),
    **{pair: ("cuda", pair) for pair in FEW_PAIRS},
}
"""Implementation and format of the kernels' columns."""
UNPUBLISHED = "No result is published yet. The command below makes one."

Line = tuple[str, str, str]
"""Shape, point and query tokens."""


def kernels(published: Published, page: Path) -> str:
    """Times by query rows of a KV head, a line per layer, point and number of query tokens, few rows first.

    A case that a kernel does not serve, that failed, or that was not asked for is a dash.

    Raises:
        ValueError: a case twice, or a line in two results, whose runs must not be compared.
    """
    names = _names(published, KERNELS)
    if not names:
        return UNPUBLISHED
    files: dict[Line, str] = {}
    counts: dict[Line, int] = {}
    cells: dict[Line, dict[tuple[str, str], str]] = {}
    for name in names:
        for entry in published.result(name)["decode"]:
            line = (entry["shape"], entry["point"], query_tokens_of(entry))
            if (other := files.setdefault(line, name)) != name:
                raise ValueError(f"a line must be of one result, but got {' / '.join(line)} in {other} and {name}")
            counts[line] = rows_of(entry)
            kernel = (entry["implementation"], entry["format"])
            if kernel in cells.setdefault(line, {}):
                raise ValueError(f"{name}: data must have this exactly once, but got it twice: {line}, {kernel}")
            cells[line][kernel] = _time(entry)
    rows = [
        [line[0].replace("/", " / "), point_name(line[1]), line[2], fixed(counts[line])]
        + [cells[line].get(kernel, "-") for kernel in COLUMNS.values()]
        for line in sorted(cells, key=lambda line: counts[line])
    ]
    heads = ["query / KV heads / head size", "requests x tokens", "query tokens", "rows", *COLUMNS]
    return table(heads, rows) + "\n\n" + published.source(page, *names)


def engines(published: Published, page: Path) -> str:
    """Steps of engines that verify drafts, at points and in closed loops while all requests decode."""
    names = _names(published, ENGINES)
    if not names:
        return UNPUBLISHED
    rows = []
    for name in names:
        result = published.result(name)
        model, drafted = result["model"], str(Speculation.parse(result["speculate"]).drafted)
        for group in _groups(result):
            fp8 = [rate for setting, _, rate in _rates(group) if setting["kv_cache_dtype"].startswith("fp8")]
            for setting, point, rate in _rates(group):
                rows.append([
                    model, drafted, _requests(point), _setting_name(setting), fixed(point["decode_ms"], 2),
                    fixed(point["tokens_per_step"], 2), fixed(rate), fixed(rate / max(fp8), 2) if fp8 else "-",
                ])  # fmt: skip
    heads = ["model", "drafted tokens", "requests x tokens", "setting", "step, ms", "tokens a request gets",
             "tokens/s", "times fp8's best"]  # fmt: skip
    return table(heads, rows) + "\n\n" + published.source(page, *names)


BLOCKS = {"rows": kernels, "speculation": engines}
"""Blocks by name."""

_Measured = list[tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Settings, each with a point of its own."""


def _names(published: Published, prefix: str) -> list[str]:
    return [name for name in published.names() if name.startswith(prefix)]


def _time(entry: Mapping[str, Any]) -> str:
    """Microseconds, and percent of the bandwidth that the run was given."""
    if entry.get("us") is None:
        return "-"
    if entry["fraction_given"] is None:
        raise ValueError("results with query rows must be measured with --bandwidth, but got one without")
    return f"{fixed(entry['us'], 1)} ({fixed(100 * entry['fraction_given'], 1)})"


def _groups(result: Mapping[str, Any]) -> list[_Measured]:
    """What all settings measured alike: each point, and each closed loop."""
    groups: dict[tuple[Any, ...], _Measured] = {}
    for kind, keys in (("points", ("batch", "context")), ("throughput", ("prompt", "output"))):
        for setting in result["settings"]:
            for point in setting[kind]:
                groups.setdefault((kind, *(point[key] for key in keys)), []).append((setting, point))
    return list(groups.values())


def _rates(group: _Measured) -> list[tuple[Mapping[str, Any], Mapping[str, Any], float]]:
    """Settings and points that decoded, with output tokens a second."""
    return [(setting, point, point["decode_tok_s"]) for setting, point in group if point["decode_tok_s"] is not None]


def _requests(point: Mapping[str, Any]) -> str:
    if "batch" in point:
        return f"{fixed(point['batch'])} x {fixed(point['context'])}"
    return f"{fixed(point['concurrency'])} x ({fixed(point['prompt'])} + {fixed(point['output'])})"


def _setting_name(setting: Mapping[str, Any]) -> str:
    """Its label, and of a profile's file the name alone."""
    profile = setting["profile"]
    return setting["label"] if profile is None else f"kvtuner, {Path(profile).name.removesuffix('.yaml')}"
