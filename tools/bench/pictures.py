"""``kvtuner bench picture``: draws a benchmark's result.

Kernels: share of the measured read bandwidth by format, one panel per batch; or, of a result with several query tokens,
microseconds by query tokens. Engines: throughput by context, and milliseconds per decode step, one group of bars per
point.
"""

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtuner_tools.bench.axes import BAR_GROUP, COLORS, LABEL_SIZE, caption, frame, patch
from kvtuner_tools.bench.kernel_pictures import draw_kernels
from kvtuner_tools.bench.speculation import speculated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner bench picture``."""
    parser.add_argument("result", type=Path, help="JSON that bench kernel or bench serve wrote")
    parser.add_argument("picture", type=Path, help="file to draw, .png or .svg")


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner bench picture``."""
    check_picture(args.picture)
    draw(json.loads(args.result.read_text()), args.picture)
    print(args.picture)
    return 0


def check_picture(path: Path) -> None:
    """Refuse what could not be drawn, before anything is measured.

    Raises:
        ValueError: another suffix, a folder that is not there, or matplotlib missing.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a picture must end in {' or '.join(SUFFIXES)}, but got {path.suffix!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: a picture must be in a folder that exists, but got {str(path.parent)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("drawing needs matplotlib: pip install 'vllm-kvtuner[bench]'")


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a result of ``bench kernel`` or ``bench serve`` into ``path``.

    Raises:
        ValueError: a result of another kind, or one with nothing to draw.
    """
    # Without pyplot: no display, and no state between two pictures.
    from matplotlib.figure import Figure

    kind = str(result.get("schema")).partition("/")[0]
    painters = {"kvtuner-bench-kernel": draw_kernels, "kvtuner-bench-serve": _draw_serve}
    if kind not in painters:
        raise ValueError(f"a picture is drawn of a result of bench kernel or bench serve, but got {kind!r}")
    figure = Figure(layout="constrained")
    painters[kind](figure, result)
    # Written whole and then renamed, as all files here.
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format=path.suffix[1:], dpi=150)
    temporary.replace(path)


def _draw_serve(figure: Any, result: Mapping[str, Any]) -> None:
    settings = [entry for entry in result["settings"] if entry["points"] or entry["throughput"]]
    panels = []
    for title, group, form, key in (
        ("Closed loop at full memory: output tokens/s", "throughput", "{prompt}x{output}", "output_tok_s"),
        ("The same with cached prompts: output tokens/s", "throughput", "{prompt}x{output}", "repeat_tok_s"),
        ("Decoding alone at full memory: tokens/s", "throughput", "{prompt}x{output}", "decode_tok_s"),
        ("Decode: ms per step", "points", "{batch}x{context}", "decode_ms"),
    ):
        # Throughput from the shortest prompt on; points as they were asked for.
        rows = [
            {form.format(**point): point.get(key) for point in sorted(entry[group], key=lambda p: p.get("prompt", 0))}
            for entry in settings
        ]
        axis_name = "prompt x output tokens" if group == "throughput" else "batch x context"
        if any(value is not None for row in rows for value in row.values()):
            panels.append((f"{title}, by {axis_name}", rows))
    if not panels:
        raise ValueError("a picture needs a setting that was measured, but got none")
    widest = max(len(row) for _, rows in panels for row in rows)
    figure.set_size_inches(max(8.0, 0.7 * len(settings) * widest), 3.0 * len(panels) + 0.8)
    axes = figure.subplots(len(panels), 1, squeeze=False).flat
    for axis, (title, rows) in zip(axes, panels, strict=True):
        _draw_groups(axis, rows)
        axis.set_title(title, fontsize=10)
    colors = _setting_colors(len(settings))
    labels = [_setting_name(entry) for entry in settings]
    figure.legend(
        list(map(patch, colors)), labels, loc="outside lower center", ncols=min(len(labels), 2), frameon=False
    )
    figure.suptitle(f"{result['model']}, dummy weights{speculated(result)}\n{caption(result)}", fontsize=11)


def _draw_groups(axis: "Axes", rows: Sequence[Mapping[str, float | None]]) -> None:
    """One bar per row and key, the rows' bars of a key side by side."""
    ticks = list(dict.fromkeys(name for row in rows for name in row))
    width = BAR_GROUP / len(rows)
    for index, (row, color) in enumerate(zip(rows, _setting_colors(len(rows)), strict=True)):
        for position, name in enumerate(ticks):
            if (value := row.get(name)) is None:
                continue
            x = position + (index - (len(rows) - 1) / 2) * width
            axis.bar(x, value, 0.94 * width, color=color)
            label = f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
            axis.annotate(label, (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=LABEL_SIZE)
    axis.set_xticks(range(len(ticks)), ticks)
    frame(axis)


def _setting_colors(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _setting_name(entry: Mapping[str, Any]) -> str:
    if entry["nominal_bits"] is None:
        return entry["label"]
    return f"{entry['label']} ({entry['nominal_bits']:g} nominal, {entry['stored_bits']:g} stored bits)"
