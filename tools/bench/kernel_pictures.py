"""Pictures of ``bench kernel``: bandwidth by format, or microseconds by query tokens where a result has several."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from kvtuner_tools.bench.axes import BAR_GROUP, COLORS, LABEL_SIZE, caption, frame, patch
from kvtuner_tools.bench.kernel_entries import query_tokens_of, rows_of
from kvtuner_tools.bench.points import IMPLEMENTATIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = Mapping[str, Any]
OURS = ("triton", "cuda")
_PLACE = ("shape", "block_size", "transforms", "point")
"""What the panels of a picture differ in."""
_MARKERS = dict(zip(IMPLEMENTATIONS, "osD^vPX", strict=True))


def draw_kernels(figure: Any, result: Mapping[str, Any]) -> None:
    """Draw the decode cases of a result.

    Raises:
        ValueError: none was measured.
    """
    entries = [entry for entry in result["decode"] if entry.get("us")]
    if not entries:
        raise ValueError("a picture needs a decode case that was measured, but got none")
    if len({query_tokens_of(entry) for entry in entries}) > 1:
        _draw_rows(figure, result, entries)
    else:
        _draw_bandwidth(figure, result, entries)


def _panels(figure: Any, entries: Sequence[Entry], same_scale: bool) -> list[tuple["Axes", list[Entry]]]:
    """Axes with a title each, and the entries that belong there; ``same_scale``: heights compare between panels."""
    # Kernels that know no transforms stand beside ours with any.
    ours = [entry for entry in entries if entry["implementation"] in OURS]
    places = list(dict.fromkeys(tuple(entry[key] for key in _PLACE) for entry in ours or entries))
    columns = min(2, len(places))
    lines = -(-len(places) // columns)
    figure.set_size_inches(8.5 * columns, 3.4 * lines + 0.8)
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=same_scale).flat)
    panels = []
    for axis, (shape, block_size, transforms, point) in zip(axes, places, strict=False):
        here = [
            entry
            for entry in entries
            if (entry["shape"], entry["block_size"], entry["point"]) == (shape, block_size, point)
            and (entry["transforms"] == transforms or entry["implementation"] not in OURS)
        ]
        title = f"{point}, heads {shape}, block {block_size}"
        axis.set_title(title + ("" if transforms == "none" else f", transforms: {transforms}"), fontsize=10)
        panels.append((axis, here))
    for axis in axes[len(places) :]:
        axis.set_visible(False)
    return panels


def _draw_bandwidth(figure: Any, result: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Bars by format, a colour per implementation."""
    present = {entry["implementation"] for entry in entries}
    colors = {name: color for name, color in zip(IMPLEMENTATIONS, COLORS, strict=False) if name in present}
    for axis, here in _panels(figure, entries, same_scale=True):
        _draw_panel(axis, here, colors)
        if (tokens := query_tokens_of(here[0])) != "1":
            axis.set_title(f"{axis.get_title()}, {tokens} query tokens, {rows_of(here[0])} rows", fontsize=10)
    handles = [patch(color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside lower center", ncols=len(colors), frameon=False)
    bandwidth = result["bandwidth"]["measured_bytes_s"] / 1e12
    figure.suptitle(
        f"Decode attention: stored bytes over time, % of the {bandwidth:.2f} TB/s that the card reads\n"
        f"above the bars: microseconds; below: nominal / stored bits\n{caption(result)}",
        fontsize=11,
    )


def _draw_panel(axis: "Axes", entries: Sequence[Entry], colors: Mapping[str, str]) -> None:
    formats = list(dict.fromkeys(entry["format"] for entry in entries))
    for position, name in enumerate(formats):
        bars = [entry for entry in entries if entry["format"] == name]
        width = BAR_GROUP / max(2, len(bars))
        for index, entry in enumerate(bars):
            x = position + (index - (len(bars) - 1) / 2) * width
            height = 100 * entry["fraction_measured"]
            axis.bar(x, height, 0.94 * width, color=colors[entry["implementation"]])
            label = f"{entry['us']:.0f}"
            axis.annotate(label, (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=LABEL_SIZE)
    bits = {entry["format"]: f"{entry['nominal_bits']:g} / {entry['stored_bits']:g}" for entry in entries}
    labels = [f"{name}\n{bits[name]}" for name in formats]
    axis.set_xticks(range(len(formats)), labels, fontsize=LABEL_SIZE + 1)
    axis.set_xlim(-0.6, len(formats) - 0.4)
    axis.set_ylabel("% of read bandwidth")
    axis.tick_params(labelleft=True)
    frame(axis)


def _draw_rows(figure: Any, result: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Lines over the query tokens: a colour per format, a marker per implementation."""
    colors = dict(zip(dict.fromkeys(entry["format"] for entry in entries), cycle(COLORS)))
    lines: dict[str, Any] = {}
    for axis, here in _panels(figure, entries, same_scale=False):
        rows = {query_tokens_of(entry): rows_of(entry) for entry in here}
        ticks = sorted(rows, key=lambda tokens: (rows[tokens], len(tokens)))
        for implementation, name in dict.fromkeys((entry["implementation"], entry["format"]) for entry in here):
            line = {
                query_tokens_of(entry): entry["us"]
                for entry in here
                if (entry["implementation"], entry["format"]) == (implementation, name)
            }
            places = [index for index, tokens in enumerate(ticks) if tokens in line]
            (lines[f"{implementation} {name}"],) = axis.plot(
                places,
                [line[ticks[index]] for index in places],
                color=colors[name],
                marker=_MARKERS[implementation],
                linestyle="-" if implementation in OURS else "--",
            )
        axis.set_xticks(range(len(ticks)), [f"{tokens}\n{rows[tokens]} rows" for tokens in ticks])
        axis.set_xlim(-0.4, len(ticks) - 0.6)
        axis.set_ylabel("microseconds")
        frame(axis)
    figure.legend(
        list(lines.values()), list(lines), loc="outside lower center", ncols=min(6, len(lines)), frameon=False
    )
    figure.suptitle(
        "Decode attention: microseconds by query tokens of a request\n"
        f"below them: rows of a KV head, which are query heads times query tokens\n{caption(result)}",
        fontsize=11,
    )
