"""What the benchmarks' pictures share: colours, captions, and the look of axes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")
BAR_GROUP = 0.84
"""Width of a group of bars; the groups' distance is 1."""
LABEL_SIZE = 7


def caption(result: Mapping[str, Any]) -> str:
    """Card, date and versions of a result."""
    versions = result["versions"]
    shown = (f"{name} {versions[name]}" for name in ("vllm", "torch", "triton", "vllm-kvtuner") if name in versions)
    return f"{result['device']}, {result['created'][:10]}, {', '.join(shown)}"


def patch(color: str) -> Any:
    """A legend's handle of bars of that colour."""
    from matplotlib.patches import Patch

    return Patch(color=color)


def frame(axis: "Axes") -> None:
    """Room above the highest value, zero below, and a grid behind."""
    axis.margins(y=0.12)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
