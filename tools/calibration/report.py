"""``report.html``: what a calibration found and why, in one file that needs nothing else."""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
import plotly.io

from kvtuner_tools.calibration import plots
from kvtuner_tools.calibration.artifacts import SensitivityTable
from kvtuner_tools.calibration.cluster import Cluster
from kvtuner_tools.calibration.feedback_choice import FeedbackChoice, SideChoice
from kvtuner_tools.calibration.outcome import Heldout, Scored, SearchResult, short_name, verdict
from kvtuner_tools.calibration.prune import LayerCandidates
from vllm_kvtuner.pages.layout import FEEDBACK_BITS
from vllm_kvtuner.profile.problems import format_layers

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child, table.facts td { text-align: left; }
tr.chosen { background: #e7f4ea; font-weight: 600; }
.verdict { padding: .8em 1em; background: #f3f3f3; border-left: 4px solid #1a9641; }
code { font-size: 90%; }
"""


def build_report(
    table: SensitivityTable,
    candidates: Sequence[LayerCandidates],
    clusters: Sequence[Cluster],
    result: SearchResult,
    heldout: Heldout,
    feedback: FeedbackChoice | None,
    study_figures: Mapping[str, go.Figure],
    costs: Mapping[str, float],
) -> str:
    """The report as HTML, plotly's script included.

    Args:
        table: sensitivity of every layer.
        candidates: what pruning left.
        clusters: what shares a decision.
        result: what the search found.
        heldout: scores on text that nothing was chosen by.
        feedback: round feedback of all layers; None where it was not asked for.
        study_figures: title -> figure of Optuna's.
        costs: stage -> seconds.
    """
    chosen = result.chosen
    pair_names = {layer.index: [pair.name for pair in layer.pairs] for layer in candidates}
    parts = [
        f"<h1>Precision profile for {escape(short_name(table.model['name']))}</h1>",
        f"<p class='verdict'>{escape(verdict(heldout, result.max_bits))}</p>",
        _facts(table, result),
        "<h2>Scores on held-out text</h2>",
        f"<p>{heldout.chosen.quality.num_tokens:,} predicted tokens of "
        f"{escape(short_name(heldout.data['source']))} (SHA-256 {escape(str(heldout.data['sha256'])[:12])}…), which "
        f"neither sensitivity nor search has seen.</p>",
        _scores_table(heldout),
        plots.heldout_figure(heldout, result.max_bits),
        "<h2>Settings that the search scored</h2>",
        f"<p>On {chosen.quality.num_tokens:,} predicted tokens of {escape(short_name(result.data['source']))}: "
        f"{result.trials['scored']} settings; {result.trials['duplicates']} proposals were known already and "
        f"{result.trials['over_budget']} were over the budget, which cost no evaluation.</p>",
        plots.front_figure(result),
        _additive(result),
        "<h2>Allocation over layers</h2>",
        plots.allocation_figure(table, result),
        "<h2>Sensitivity</h2>",
        f"<p>Relative error of each layer's attention output, on {table.data['tokens']:,} tokens of "
        f"{escape(short_name(table.data['source']))}. Dots mark the pairs that pruning left as candidates.</p>",
        plots.sensitivity_figure(table, pair_names),
        "<h3>Per KV head, at the chosen pairs</h3>",
        plots.heads_figure(table, result),
        *_feedback(feedback, result),
        "<h2>Clusters</h2>",
        "<p>Layers of one cluster have the same shape and candidates, like errors, and one pair.</p>",
        _clusters_table(clusters, result),
        plots.clusters_figure(table, clusters),
        "<h2>Cost</h2>",
        f"<p>Median time to score a setting in the search: {result.evaluation_seconds:.1f} s.</p>",
        plots.costs_figure(costs),
    ]
    for title, figure in study_figures.items():
        parts += [f"<h3>Optuna: {escape(title)}</h3>", figure]
    return _page(f"{short_name(table.model['name'])} at {chosen.stored_bits:.2f} stored bits", parts)


def write_report(path: Path, html: str) -> None:
    """Write the file at once or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as f:
        try:
            f.write(html)
            f.flush()
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def _page(title: str, parts: Sequence[str | go.Figure]) -> str:
    body = []
    is_first = True
    for part in parts:
        if isinstance(part, str):
            body.append(part)
            continue
        part.update_layout(template="plotly_white", margin={"l": 70, "r": 20, "t": 40, "b": 50})
        body.append(plotly.io.to_html(part, full_html=False, include_plotlyjs=is_first, config={"responsive": True}))
        is_first = False
    head = f"<meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def _facts(table: SensitivityTable, result: SearchResult) -> str:
    chosen = result.chosen
    rows = {
        "budget": result.budget,
        "profile": f"{chosen.nominal_bits:.3f} nominal bits, {chosen.stored_bits:.3f} stored bits",
        "found by": chosen.origin,
        "layers": f"{len(table.layers)} with keys and values",
        "search": f"{result.sampler}, seed {result.seed}, study {result.study}",
        "versions": ", ".join(f"{name} {version}" for name, version in table.versions.items()),
    }
    return _html_table((), [list(row) for row in rows.items()]).replace("<table>", "<table class='facts'>")


def _scores_table(heldout: Heldout) -> str:
    reference = heldout.chosen.quality
    header = ("setting", "nominal bits", "stored bits", "mean KL", "± stderr", "KL p99", "top-1", "perplexity")
    rows = [["bf16", "16.000", "16.000", "0", "", "", "1.0000", f"{reference.perplexity_reference:.3f}"]]
    ordered = sorted(heldout.settings, key=lambda each: (-each.stored_bits, each.quality.kl_mean))
    rows += [_score_row(each) for each in ordered]
    marked = [None, *("chosen" if each is heldout.chosen else None for each in ordered)]
    return _html_table(header, rows, marked)


def _score_row(each: Scored) -> list[str]:
    quality = each.quality
    return [
        each.origin,
        f"{each.nominal_bits:.3f}",
        f"{each.stored_bits:.3f}",
        f"{quality.kl_mean:.5f}",
        f"{quality.kl_stderr:.5f}",
        f"{quality.kl_p99:.4f}",
        f"{quality.top1_agreement:.4f}",
        f"{quality.perplexity:.3f}",
    ]


def _additive(result: SearchResult) -> str:
    """What the search adds over the choices that take errors as additive."""
    sentences = []
    for name, pairs in (("greedy", result.greedy), ("integer program", result.integer_program)):
        found = result.find(pairs)
        assert found is not None  # both are seeds
        ratio = result.chosen.quality.kl_mean / found.quality.kl_mean if found.quality.kl_mean else 1.0
        sentences.append(
            f"The {name} choice scored {found.quality.kl_mean:.5f} at {found.stored_bits:.3f} stored bits "
            f"({found.nominal_bits:.3f} nominal); the chosen one has {ratio:.1%} of its mean KL on the same text."
        )
    return f"<p>{' '.join(sentences)}</p>"


def _feedback(feedback: FeedbackChoice | None, result: SearchResult) -> list[str]:
    """What round feedback does to each layer's error."""
    title = "<h2>Round feedback</h2>"
    if feedback is None:
        return [title, "<p>Not asked for: all codes are nearest ones.</p>"]
    sides = {"keys": [each.keys for each in feedback.layers], "values": [each.values for each in feedback.layers]}
    sentences = []
    for name, choices in sides.items():
        ratios = [each.ratio for each in choices if each is not None and each.is_on]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
        gain = "" if mean is None else f", where their error is {mean:.2f} times that of nearest codes (geometric mean)"
        sentences.append(f"{len(ratios)} of {len(choices)} layers round {name} with feedback{gain}.")
    header = (
        "layer",
        "pair",
        "keys: ratio",
        "ranges, 2 bits",
        "4 bits",
        "values: ratio",
        "ranges, 2 bits",
        "4 bits",
        "",
    )
    rows = [
        [
            str(each.index),
            result.chosen.pairs[each.index].name,
            *_feedback_cells(each.keys),
            *_feedback_cells(each.values),
            each.note or "",
        ]
        for each in feedback.layers
    ]
    text = (
        "The ratio is that of the attention output's error with feedback to that with nearest codes, as what reads "
        "the output counts it, on windows that the metrics have not seen. Above 1, nearest codes are taken."
    )
    return [title, f"<p>{' '.join(sentences)} {text}</p>", _html_table(header, rows)]


def _feedback_cells(side: SideChoice | None) -> list[str]:
    if side is None:
        return ["", "", ""]
    ranges = [" / ".join(f"{factor:g}" for factor in side.ranges[str(bits)]) for bits in FEEDBACK_BITS]
    return [f"{side.ratio:.3f}", *(ranges if side.is_on else ["nearest"] * len(ranges))]


def _clusters_table(clusters: Sequence[Cluster], result: SearchResult) -> str:
    rows = [
        [
            format_layers(each.layers),
            str(len(each.layers)),
            ", ".join(pair.name for pair in reversed(each.pairs)),
            result.chosen.pairs[each.layers[0]].name,
        ]
        for each in clusters
    ]
    return _html_table(("layers", "number", "candidates", "chosen"), rows)


def _html_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str | None] | None = None
) -> str:
    lines = []
    if header:
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>")
    for row, name in zip(rows, classes or [None] * len(rows), strict=True):
        attribute = f" class='{name}'" if name else ""
        lines.append(f"<tr{attribute}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"
