"""``report.html``: what a calibration found and why, in one file that needs nothing else."""

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go
import plotly.io

from kvtuner_tools.calibration import plots
from kvtuner_tools.calibration.cluster import Cluster
from kvtuner_tools.calibration.feedback_choice import FeedbackChoice, SideChoice
from kvtuner_tools.calibration.outcome import (
    PROFILE_FILE,
    Heldout,
    Scored,
    SearchResult,
    bits_text,
    label,
    short_name,
    uniform_file,
)
from kvtuner_tools.calibration.report_inputs import ReportInputs
from kvtuner_tools.calibration.summary import summarize
from kvtuner_tools.calibration.transform_choice import LayerChoice
from vllm_kvtuner.pages.layout import FEEDBACK_BITS
from vllm_kvtuner.profile.problems import format_layers
from vllm_kvtuner.profile.profile import TransformSettings

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222;
  overflow-wrap: anywhere; }
.table { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; overflow-wrap: normal; }
td:first-child, th:first-child, table.facts td, table.words td, table.words th { text-align: left; }
table.scores { font-size: 90%; }
table.scores td, table.scores th { padding: .25em .5em; }
table.scores td:first-child { min-width: 11em; }
table.facts td:first-child { white-space: nowrap; vertical-align: top; color: #555; }
tr.chosen { background: #e7f4ea; font-weight: 600; }
.verdict { padding: .8em 1em; background: #f3f3f3; border-left: 4px solid #888; }
.verdict.good { background: #e7f4ea; border-color: #1a9641; }
.verdict.bad { background: #fdecea; border-color: #c62828; }
pre { background: #f3f3f3; padding: .7em 1em; white-space: pre-wrap; }
code, pre { font-size: 90%; }
@media (max-width: 600px) { body { margin: 1em auto; } td, th { padding: .25em .4em; } h1 { font-size: 1.5em; } }
"""
_MARGIN = {"l": 60, "r": 40, "t": 40, "b": 50}
_PLOT = {"responsive": True, "displayModeBar": False}  # the bar would lie over titles on a phone
_LEGEND = {"orientation": "h", "yanchor": "top", "y": -0.18, "xanchor": "left", "x": 0}
"""Below the plot: beside it, on a phone, it leaves the plot no room."""
_TEXTS = {
    "capture": "transforms, round feedback and sensitivity",
    "search": "the score of each setting in the search",
    "held-out": "the final scores",
}
_ELSEWHERE = ("verdict", "serve", "report")
"""Of the summary, what stands out at the top, and this file."""


def build_report(inputs: ReportInputs) -> str:
    """The report as HTML, plotly's script included."""
    table, result, heldout = inputs.table, inputs.result, inputs.heldout
    pair_names = {layer.index: [pair.name for pair in layer.pairs] for layer in inputs.candidates}
    summary = dict(summarize(inputs))
    verdict = inputs.verdict
    parts: list[str | go.Figure] = [
        f"<h1>Precision profile for {escape(short_name(table.model['name']))}</h1>",
        f"<p class='verdict {verdict.tone}'>{escape(verdict.text)}</p>",
        f"<pre>{escape(summary['serve'])}</pre>",
        _html_table((), [[name, text] for name, text in summary.items() if name not in _ELSEWHERE], style="facts"),
        "<h2>Scores on held-out text</h2>",
        f"<p>{heldout.chosen.quality.num_tokens:,} predicted tokens that nothing was chosen by. The difference is that "
        "of each token's KL to the profile's, with its own standard error.</p>",
        _scores_table(heldout, serve=verdict.serve),
        *_kinds(heldout),
        plots.heldout_figure(heldout, result.max_bits),
        "<h2>Allocation over layers</h2>",
        plots.allocation_figure(table, result),
        "<h2>Transforms of the layers</h2>",
        _transforms_table(inputs),
        *_feedback(inputs.feedback, result),
        *_search(result),
        "<h2>Sensitivity</h2>",
        "<p>Relative error of each layer's attention output. Dots mark the pairs that pruning left as candidates.</p>",
        plots.sensitivity_figure(table, pair_names),
        "<h3>Per KV head, at the chosen pairs</h3>",
        plots.heads_figure(table, result),
        "<h2>Clusters</h2>",
        "<p>Layers of one cluster have the same shape and candidates, like errors, and one pair.</p>",
        _clusters_table(inputs.clusters, result),
        plots.clusters_figure(table, inputs.clusters),
        "<h2>How it was made</h2>",
        f"<pre>{escape(inputs.options.command(inputs.out))}</pre>",
        _facts(inputs),
        "<h3>Texts</h3>",
        _texts_table(inputs),
        "<h3>Time</h3>",
        plots.costs_figure(inputs.costs),
    ]
    for title, figure in inputs.study_figures.items():
        parts += [f"<h3>Optuna: {escape(title)}</h3>", figure]
    return _page(f"{short_name(table.model['name'])} at {result.chosen.stored_bits:.2f} stored bits", parts)


def _page(title: str, parts: Sequence[str | go.Figure]) -> str:
    body = []
    is_first = True
    for part in parts:
        if isinstance(part, str):
            body.append(part)
            continue
        part.update_layout(template="plotly_white", margin=_MARGIN, legend=_LEGEND)
        body.append(plotly.io.to_html(part, full_html=False, include_plotlyjs=is_first, config=_PLOT))
        is_first = False
    viewport = "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    head = f"<meta charset='utf-8'>{viewport}<title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def _facts(inputs: ReportInputs) -> str:
    result = inputs.result
    seconds = result.evaluation_seconds
    rows = {
        "budget": result.budget,
        "profile": f"{bits_text(result.chosen)}, found by {result.chosen.origin}",
        "layers": f"{len(inputs.table.layers)} with keys and values",
        "search": f"{result.sampler}, seed {result.seed}, study {result.study}",
        "a setting took": "" if seconds is None else f"{seconds:.1f} s in the search (median)",
        "versions": ", ".join(f"{name} {version}" for name, version in inputs.table.versions.items()),
    }
    return _html_table((), [[name, text] for name, text in rows.items() if text], style="facts")


def _texts_table(inputs: ReportInputs) -> str:
    options = inputs.options
    asked = (options.capture_tokens, options.search_tokens, options.heldout_tokens)
    got = (inputs.table.data, inputs.result.data, inputs.heldout.data)
    rows = [
        [
            name,
            _TEXTS[name],
            short_name(data["source"]),
            f"{tokens:,}",
            f"{data['tokens']:,}",
            str(data["windows"]),
            f"{data['longest']:,}",
            str(data["sha256"])[:12],
        ]
        for name, tokens, data in zip(_TEXTS, asked, got, strict=True)
        if data
    ]
    header = ("text", "for", "from", "tokens asked", "got", "windows", "longest", "SHA-256")
    return _html_table(header, rows, style="words")


def _transforms_table(inputs: ReportInputs) -> str:
    """What each layer does before it stores; layers that do the same are one row."""
    pairs = inputs.result.chosen.pairs
    chosen = {} if inputs.transforms is None else {layer.index: layer for layer in inputs.transforms.layers}
    feedback = {} if inputs.feedback is None else {layer.index: layer for layer in inputs.feedback.layers}
    rows: dict[tuple[str, ...], list[int]] = {}
    for layer in inputs.table.layers:
        pair, settings = pairs[layer.index], layer.transforms
        cells = (pair.name, "", "", "", "")
        if pair.is_quantized:
            factors = feedback[layer.index].equalization if layer.index in feedback else None
            keys = _key_transforms(settings, chosen.get(layer.index), factors)
            values = _joined(Hadamard=settings.value_hadamard, feedback=settings.value_round_feedback)
            note = chosen[layer.index].note if layer.index in chosen else None
            cells = (pair.name, keys, values, "by error" if settings.range_search else "min, max", note or "")
        rows.setdefault(cells, []).append(layer.index)
    header = ("layers", "pair", "keys", "values", "range", "")
    return _html_table(header, [[format_layers(layers), *cells] for cells, layers in rows.items()], style="words")


def _key_transforms(settings: TransformSettings, choice: LayerChoice | None, factors: str | None) -> str:
    """In words; ``factors`` is what those of an equalization are from where round feedback chose others."""
    offset, equalization = "offset", "equalization"
    if choice is not None and settings.key_offset:
        pairs = "" if choice.offset_pairs is None else f", {choice.offset_pairs} pairs"
        offset = f"offset ({choice.offset}{pairs})"
    if choice is not None and settings.key_equalization:
        equalization = f"equalization ({factors or choice.equalization})"
    return _joined(
        **{
            offset: bool(settings.key_offset),
            equalization: settings.key_equalization,
            "Hadamard": settings.key_hadamard,
            "feedback": bool(settings.key_round_feedback),
        }
    )


def _joined(**switches: bool) -> str:
    return ", ".join(name for name, is_on in switches.items() if is_on) or "none"


def _scores_table(heldout: Heldout, serve: Scored) -> str:
    reference = heldout.chosen.quality
    header = (
        "setting",
        "file",
        "stored bits",
        "nominal",
        "KL",
        "±",
        "difference",
        "±",
        "KL p99",
        "top-1",
        "perplexity",
    )
    rows = [["bf16", "", "16.000", "16.000", "0", "", "", "", "", "1.0000", f"{reference.perplexity_reference:.3f}"]]
    ordered = sorted(heldout.settings, key=lambda each: (-each.stored_bits, each.quality.kl_mean))
    rows += [_score_row(each, heldout, serve) for each in ordered]
    marked = [None, *("chosen" if each is serve else None for each in ordered)]
    return _html_table(header, rows, marked, style="scores")


def _kinds(heldout: Heldout) -> list[str]:
    """KL of each setting by kind of text; nothing where texts are of one kind."""
    kinds = heldout.kinds.get(heldout.chosen.origin, {})
    if len(kinds) < 2:
        return []
    rows = [
        [label(each.origin), *(f"{heldout.kinds[each.origin][kind]['kl_mean']:.5f}" for kind in kinds)]
        for each in heldout.settings
    ]
    tokens = ", ".join(f"{kind} {each['tokens']:,}" for kind, each in kinds.items())
    return [f"<h3>KL by kind of text</h3><p>Tokens: {escape(tokens)}.</p>", _html_table(("setting", *kinds), rows)]


def _score_row(each: Scored, heldout: Heldout, serve: Scored) -> list[str]:
    quality = each.quality
    name, file, difference, stderr = label(each.origin), "", "", ""
    if each is heldout.chosen:
        file = PROFILE_FILE
        if (pair := heldout.uniform_pair) is not None:
            name = f"{name}: {label(f'uniform {pair}')}"
    else:
        mean, error = heldout.differences[each.origin]
        difference, stderr = f"{mean:+.5f}", f"{error:.5f}"
        file = uniform_file(each) if each is serve else ""
    return [
        name,
        file,
        f"{each.stored_bits:.3f}",
        f"{each.nominal_bits:.3f}",
        f"{quality.kl_mean:.5f}",
        f"{quality.kl_stderr:.5f}",
        difference,
        stderr,
        f"{quality.kl_p99:.4f}",
        f"{quality.top1_agreement:.4f}",
        f"{quality.perplexity:.3f}",
    ]


def _search(result: SearchResult) -> list[str | go.Figure]:
    """What the search scored, where there was one."""
    title = "<h2>Settings that the search scored</h2>"
    if not result.scored:
        text = "None: the integer program chose the pairs from the layers' sensitivities."
        return [title, f"<p>{text}</p>"]
    tokens = result.scored[0].quality.num_tokens
    return [
        title,
        f"<p>On {tokens:,} predicted tokens of {escape(short_name(result.data['source']))}: "
        f"{result.trials['scored']} settings; {result.trials['duplicates']} proposals were known already and "
        f"{result.trials['over_budget']} were over the budget, which cost no evaluation.</p>",
        plots.front_figure(result),
        _additive(result),
    ]


def _additive(result: SearchResult) -> str:
    """What the search adds over the choices that take errors as additive."""
    sentences = []
    chosen = result.find(result.chosen.pairs)
    for name, pairs in (("greedy", result.greedy), ("integer program", result.integer_program)):
        found = result.find(pairs)
        assert chosen is not None and found is not None  # all are scored, the latter two as seeds
        ratio = chosen.quality.kl_mean / found.quality.kl_mean if found.quality.kl_mean else 1.0
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
    return _html_table(("layers", "number", "candidates", "chosen"), rows, style="words")


def _html_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    classes: Sequence[str | None] | None = None,
    style: str = "",
) -> str:
    """A table that scrolls sideways where it is wider than the page.

    Args:
        header: empty for none.
        rows: of cells.
        classes: of the rows.
        style: class of the table.
    """
    lines = []
    if header:
        lines.append("<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>")
    for row, name in zip(rows, classes or [None] * len(rows), strict=True):
        attribute = f" class='{name}'" if name else ""
        lines.append(f"<tr{attribute}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<div class='table'><table class='{style}'>" + "".join(lines) + "</table></div>"
