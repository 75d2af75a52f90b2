"""KL against stored bits: nearest codes, round feedback, searched profiles, and vLLM's own caches."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .published import Published

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOURCE = "evaluate_feedback_h200"
MODELS = ("Qwen2.5-Coder-1.5B-Instruct", "Qwen2.5-Coder-0.5B-Instruct", "SmolLM2-135M-Instruct")
CONTEXT = 1024
"""Tokens of a context, of which the picture is; other contexts are in the notes."""
SERIES = {
    "nearest codes, one pair": ("#8c8c8c", "o", "-"),
    "round feedback, one pair": ("#4c78a8", "o", "-"),
    "the same, calibration's held-out text": ("#9ecae9", "o", "--"),
    "searched, held-out text": ("#54a24b", "D", "--"),
    "pair alone, no data": ("#b279a2", "s", ":"),
    "vLLM's fp8": ("#f58518", "X", ""),
    "vLLM's int4_per_token_head": ("#e45756", "P", ""),
}
"""Name -> colour, marker and line."""
UNIFORM = ("uniform K2V2", "uniform K4V2", "uniform K4V4")
"""Of those that searches were compared with; their other pairs of as many bits are worse."""
OWN_CACHES = {"fp8": "vLLM's fp8", "int4_per_token_head": "vLLM's int4_per_token_head"}


def points(published: Published, model: str) -> dict[str, list[tuple[float, float, str]]]:
    """Of each series of a model: stored bits, KL and pair, from the fewest bits to the most."""
    found: dict[str, dict[tuple[float, str], float]] = {name: {} for name in SERIES}
    for name, bits, kl, text in (*_evaluated(published, model), *_searched(published, model)):
        found[name][bits, text] = kl
    return {name: [(bits, kl, text) for (bits, text), kl in sorted(each.items())] for name, each in found.items()}


def draw(figure: Any, published: Published, font: int) -> None:
    """Draw a panel for each model."""
    figure.set_size_inches(9, 4.6)
    for axis, model in zip(figure.subplots(1, len(MODELS), sharex=True, sharey=True), MODELS, strict=True):
        _panel(axis, points(published, model), font)
        axis.set_title(model.removesuffix("-Instruct"), fontsize=font)
    figure.supylabel("KL to bf16, nats a token", fontsize=font)
    figure.axes[len(MODELS) // 2].set_xlabel("stored bits of a cached number", fontsize=font)
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    ordered = [name for name in SERIES if name in handles]
    figure.legend(
        [handles[name] for name in ordered], ordered, loc="outside lower center", ncols=3, frameon=False, fontsize=font
    )
    first = published.result(SOURCE)["evaluations"][0]
    caption = f"{first['device']}, vLLM {first['versions']['vllm']}, {first['created'][:10]}"
    figure.suptitle(f"Prose and maths, contexts of {CONTEXT:,} tokens, {caption}", fontsize=font)


def _panel(axis: "Axes", found: dict[str, list[tuple[float, float, str]]], font: int) -> None:
    for name, each in found.items():
        color, marker, line = SERIES[name]
        if not each:
            continue
        bits, kl, texts = zip(*each, strict=True)
        axis.plot(bits, kl, marker=marker, linestyle=line or "none", color=color, label=name, markersize=5)
        if name == "round feedback, one pair":
            for x, y, text in zip(bits, kl, texts, strict=True):
                axis.annotate(text, (x, y), (-4, -11), textcoords="offset points", ha="right", fontsize=font - 3)
    axis.set_yscale("log")
    axis.set_xlim(1.2, 8.6)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=font - 1)
    axis.spines[["top", "right"]].set_visible(False)


def _evaluated(published: Published, model: str) -> Iterator[tuple[str, float, float, str]]:
    for evaluation in published.result(SOURCE)["evaluations"]:
        # Too few tokens beside a task to compare with.
        if evaluation["model"] != model or evaluation["context"] != CONTEXT or evaluation["task"] is not None:
            continue
        for row in evaluation["settings"]:
            label = row["label"].removeprefix("kvtuner:").removesuffix(".yaml")
            how, _, pair = label.partition("_")
            if label in OWN_CACHES:
                # By what fits: int4_per_token_head's scales are in its pages.
                yield OWN_CACHES[label], 16 / row["kv_tokens_ratio"], row["kl_mean"], label
            elif how in ("nearest", "feedback"):
                name = "nearest codes, one pair" if how == "nearest" else "round feedback, one pair"
                yield name, row["stored_bits"], row["kl_mean"], pair
            elif row["profile"] == label and ":" not in label:
                yield "pair alone, no data", row["stored_bits"], row["kl_mean"], label


def _searched(published: Published, model: str) -> Iterator[tuple[str, float, float, str]]:
    for row in published.result(SOURCE)["heldout"]:
        if row["model"] != model:
            continue
        if row["origin"] == "this profile":
            yield "searched, held-out text", row["stored_bits"], row["kl_mean"], ""
        elif row["origin"] in UNIFORM:
            yield "the same, calibration's held-out text", row["stored_bits"], row["kl_mean"], ""
