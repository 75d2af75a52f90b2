"""The pictures of the documentation, each with the hashes of the data that it shows.

A picture is drawn again when those hashes no longer match, not by its bytes, which depend on matplotlib's version.
"""

import functools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import front
from .published import AUTO, FP8, KVTUNER, Published, fixed
from .speed import PAIRS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = {
    "serve_throughput.png": ("serve_steps_h200", "serve_throughput_h200"),
    "kernel_bandwidth.png": ("kernel_h200",),
    "quality_front.png": (front.SOURCE,),
}
"""Files in ``docs/benchmarks`` and the results that they show."""
KEYWORD = "Data"
"""Name of the PNG text that holds the data's hashes."""
GREY, ORANGE, BLUE, GREEN = "#8c8c8c", "#f58518", "#4c78a8", "#54a24b"
DPI = 150
FONT = 10
"""Points; at 9 inches of width and a README's 900 pixels, that is 14 pixels."""


def outdated(root: Path, published: Published) -> Iterator[Path]:
    """Pictures that are missing or show other data."""
    for name, sources in PICTURES.items():
        path = root / "docs" / "benchmarks" / name
        if not path.exists() or png_text(path.read_bytes(), KEYWORD) != _hashes(published, sources):
            yield path


def draw(path: Path, published: Published) -> None:
    """Draw one of the pictures into its file."""
    # Without pyplot: no display, and no state between two pictures.
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    drawn: dict[str, Callable[[Any, Published], None]] = {
        "serve_throughput.png": _serve,
        "kernel_bandwidth.png": _kernels,
        "quality_front.png": functools.partial(front.draw, font=FONT),
    }
    drawn[path.name](figure, published)
    # A background of its own, so that it can be read on dark pages too.
    figure.set_facecolor("white")
    figure.savefig(path, dpi=DPI, metadata={KEYWORD: _hashes(published, PICTURES[path.name])})


def png_text(data: bytes, keyword: str) -> str | None:
    """The PNG text (a ``tEXt`` chunk) with that keyword, None where there is none."""
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        name, _, text = body.partition(b"\0")
        if kind == b"tEXt" and name.decode("latin-1") == keyword:
            return text.decode("latin-1")
        position += length + 12
    return None


def _hashes(published: Published, sources: Sequence[str]) -> str:
    return " ".join(f"{name}:{published.sha256(name)}" for name in sources)


def _serve(figure: Any, published: Published) -> None:
    settings = {AUTO: ("auto (bf16)", GREY), FP8: ("fp8", ORANGE), KVTUNER: ("kvtuner, 3.25 bits", BLUE)}
    figure.set_size_inches(9, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    loops = {"new prompts": "output_tok_s", "cached prompts": "repeat_tok_s", "all requests decode": "decode_tok_s"}
    rates, times = {}, {}
    for label, (name, color) in settings.items():
        loop = published.throughput("serve_throughput_h200", label)
        rates[name, color] = {words: loop[key] for words, key in loops.items()}
        times[name, color] = {
            f"64 x {context:,}": published.point("serve_steps_h200", label, 64, context)["decode_ms"]
            for context in (1024, 8192)
        }
    _bars(left, rates, 0)
    left.set_title("Output tokens/s, as many requests as fit\n(4,096 + 512 tokens each)", fontsize=FONT)
    _bars(right, times, 1)
    right.set_title("Time of a decode step, ms\n(requests x cached tokens)", fontsize=FONT)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=FONT)
    figure.suptitle(f"Llama-3.1-8B shapes, {_caption(published, 'serve_throughput_h200')}", fontsize=FONT)


def _kernels(figure: Any, published: Published) -> None:
    def entry(implementation: str, form: str) -> Mapping[str, Any]:
        return published.kernel("kernel_h200", implementation=implementation, format=form, point="64x8192")

    others = {"FlashAttention 3": (("fa3_bf16", "bf16"), ("fa3_fp8", "fp8")),
              "vLLM int4_per_token_head": (("int4_per_token_head", "int4"),)}  # fmt: skip
    series = [
        *zip(others, (GREY, ORANGE), others.values(), strict=True),
        ("kvtuner, CUDA", BLUE, tuple(("cuda", pair) for pair in PAIRS)),
        ("kvtuner, Triton", GREEN, tuple(("triton", pair) for pair in PAIRS)),
    ]
    figure.set_size_inches(9, 4.2)
    axis = figure.subplots()
    forms = ["bf16", "fp8", "int4", *PAIRS]
    bits = {}
    for name, color, cases in series:
        for index, (implementation, form) in enumerate(cases):
            case = entry(implementation, form)
            bits[form] = case["stored_bits"]
            place = {"cuda": -0.22, "triton": 0.22}.get(implementation, 0)
            height = 100 * case["fraction_given"]
            x = forms.index(form) + place
            axis.bar(x, height, 0.42, color=color, label=name if index == 0 else None)
            _label(axis, x, height, fixed(case["us"]), FONT - 2)
    axis.set_xticks(range(len(forms)), [f"{form}\n{bits[form]:g}" for form in forms], fontsize=FONT - 1)
    bandwidth = published.result("kernel_h200")["bandwidth"]["given_bytes_s"]
    axis.set_ylabel(f"% of {fixed(bandwidth / 1e12, 2)} TB/s", fontsize=FONT)
    _frame(axis)
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=FONT)
    figure.suptitle(
        "Decode attention, 64 requests of 8,192 tokens: bandwidth on stored bytes\n"
        f"above the bars: microseconds; below the formats: stored bits; {_caption(published, 'kernel_h200')}",
        fontsize=FONT,
    )


def _bars(axis: "Axes", rows: Mapping[tuple[str, str], Mapping[str, float]], digits: int) -> None:
    """A group of bars per key, one bar per row; rows are by name and colour."""
    width = 0.84 / len(rows)
    for index, ((name, color), row) in enumerate(rows.items()):
        for position, value in enumerate(row.values()):
            x = position + (index - (len(rows) - 1) / 2) * width
            axis.bar(x, value, 0.94 * width, color=color, label=None if position else name)
            _label(axis, x, value, fixed(value, digits), FONT - 1.5)
    axis.set_xticks(range(len(row)), list(row), fontsize=FONT)
    _frame(axis)


def _label(axis: "Axes", x: float, height: float, text: str, size: float) -> None:
    axis.annotate(text, (x, height), (0, 2), textcoords="offset points", ha="center", fontsize=size)


def _caption(published: Published, name: str) -> str:
    result = published.result(name)
    return f"{result['device']}, vLLM {result['versions']['vllm']}, {result['created'][:10]}"


def _frame(axis: "Axes") -> None:
    axis.margins(y=0.12)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)
