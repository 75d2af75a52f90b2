"""The figures of a calibration's report, as plotly figures."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from optuna.study import Study
from plotly.subplots import make_subplots

from kvtuner_tools.calibration.artifacts import PAIR_NAMES, SensitivityTable, read_artifact
from kvtuner_tools.calibration.cluster import Cluster
from kvtuner_tools.calibration.outcome import Heldout, Scored, SearchResult, format_pairs, pareto_front
from kvtuner_tools.calibration.study import OBJECTIVES
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.layout import BITS
from vllm_kvtuner.profile.problems import format_layers

FIGURES_SCHEMA = "kvtuner-study-figures/1"
_BIT_COLORS = {2: "#b2182b", 4: "#ef8a62", 8: "#67a9cf", 16: "#2166ac"}
_GROUPS = {
    "sampled": ("#9e9e9e", "circle", 6),
    "probe": ("#c7c7c7", "diamond", 6),
    "refitted": ("#2166ac", "circle", 6),
    "greedy and integer program": ("#7b3294", "diamond", 9),
    "uniform": ("#e66101", "square", 10),
}
_CHOSEN_COLOR = "#1a9641"
_KL_AXIS = "mean KL divergence (nats per token)"
_BITS_AXIS = "stored bits per cached number"


def write_study_figures(path: Path, study: Study, parameters: int) -> None:
    """Keep Optuna's own figures of a study, so that the report can be made again without its storage.

    Args:
        path: JSON file.
        study: with at least one trial that was scored.
        parameters: decisions that have more than one candidate.
    """
    import optuna.visualization  # takes seconds, and Matplotlib with it

    figures = {"time line of the trials": optuna.visualization.plot_timeline(study)}
    if parameters > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that importance is for low values, which is what is wanted
            figures["importance of each cluster for the KL divergence"] = optuna.visualization.plot_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial: trial.values[0],
                target_name=OBJECTIVES[0],
            )
    plain = [{"title": title, "figure": figure.to_json()} for title, figure in figures.items()]
    write_json(path, {"schema": FIGURES_SCHEMA, "figures": plain})


def read_study_figures(path: Path) -> dict[str, go.Figure]:
    """Title -> figure, as :func:`write_study_figures` kept them.

    Raises:
        ValueError: not readable or of another schema.
    """
    import plotly.io

    figures = read_artifact(path, FIGURES_SCHEMA, ("figures",))["figures"]
    return {each["title"]: plotly.io.from_json(each["figure"]) for each in figures}


MAX_DECADES = 3
"""Decades from which on a logarithmic axis has powers of ten alone."""


def front_figure(result: SearchResult) -> go.Figure:
    """All scored settings in bits and KL, the Pareto front, the budget and the chosen setting."""
    figure = go.Figure()
    front = pareto_front(result.scored)
    figure.add_scatter(
        x=[each.stored_bits for each in front],
        y=[each.quality.kl_mean for each in front],
        mode="lines",
        line={"shape": "hv", "color": "#404040", "width": 1.5},
        name="Pareto front",
        hoverinfo="skip",
    )
    for group, (color, symbol, size) in _GROUPS.items():
        members = [each for each in result.scored if _group(each) == group]
        _add_settings(figure, members, group, color, symbol, size, labels=group == "uniform")
    chosen = result.find(result.chosen.pairs)
    assert chosen is not None
    _add_settings(figure, [chosen], "chosen", _CHOSEN_COLOR, "star", 17)
    _lay_out(figure, result.max_bits, 600)
    return figure


def heldout_figure(heldout: Heldout, max_bits: float) -> go.Figure:
    """The chosen setting and what it is compared with on held-out text, with standard errors."""
    figure = go.Figure()
    others = [each for each in heldout.settings[1:] if each not in heldout.uniform]
    _add_settings(figure, heldout.uniform, "uniform", "#e66101", "square", 10, labels=True, errors=True)
    if others:
        _add_settings(figure, others, "greedy and integer program", "#7b3294", "diamond", 9, errors=True)
    _add_settings(figure, [heldout.chosen], "chosen", _CHOSEN_COLOR, "star", 17, errors=True)
    _lay_out(figure, max_bits, 520)
    return figure


def _lay_out(figure: go.Figure, max_bits: float, height: int) -> None:
    """Axes of bits and KL, and the budget, whose label lies above the plot, where no point is."""
    figure.add_vline(
        x=max_bits,
        line={"dash": "dash", "color": _CHOSEN_COLOR},
        annotation={"text": "budget", "xanchor": "center", "yanchor": "bottom", "y": 1},
    )
    figure.update_layout(xaxis_title=_BITS_AXIS, yaxis_title=_KL_AXIS, height=height)
    losses = [loss for trace in figure.data for loss in (trace.y or ()) if loss > 0]
    figure.update_yaxes(type="log", tickvals=(ticks := _log_ticks(losses)), ticktext=[f"{each:g}" for each in ticks])


def sensitivity_figure(table: SensitivityTable, candidates: Mapping[int, Sequence[str]]) -> go.Figure:
    """Relative attention-output error per layer and pair; candidates are marked with a dot.

    Args:
        table: the errors.
        candidates: names of the pairs that pruning left each layer.
    """
    errors = np.array([[layer.output_error[pair] for pair in PAIR_NAMES] for layer in table.layers])
    marks = [["●" if pair in candidates[layer.index] else "" for pair in PAIR_NAMES] for layer in table.layers]
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(np.maximum(errors, 1e-9)).T.tolist(),
            x=[layer.index for layer in table.layers],
            y=list(PAIR_NAMES),
            text=np.array(marks).T.tolist(),
            texttemplate="%{text}",
            textfont={"size": 9},
            customdata=errors.T.tolist(),
            hovertemplate="layer %{x}, %{y}: error %{customdata:.4g}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "log₁₀ error"},
        )
    )
    figure.update_layout(xaxis_title="layer", yaxis_title="pair", height=380)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(dtick=_tick(len(table.layers)))
    return figure


def heads_figure(table: SensitivityTable, result: SearchResult) -> go.Figure:
    """Relative attention-output error of the chosen pairs per layer and KV head."""
    rows: list[list[float | None]] = []
    most = max(layer.num_kv_heads for layer in table.layers)
    for layer in table.layers:
        pair = result.chosen.pairs[layer.index]
        heads = layer.output_error_per_head[pair.name] if pair.is_quantized else (0.0,) * layer.num_kv_heads
        rows.append([*heads, *(None,) * (most - len(heads))])
    figure = go.Figure(
        go.Heatmap(
            z=[list(heads) for heads in zip(*rows, strict=True)],
            x=[layer.index for layer in table.layers],
            y=list(range(most)),
            hovertemplate="layer %{x}, KV head %{y}: error %{z:.4g}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "error"},
        )
    )
    figure.update_layout(xaxis_title="layer", yaxis_title="KV head", height=260 + 8 * most)
    figure.update_yaxes(dtick=1 if most <= 16 else 4)
    figure.update_xaxes(dtick=_tick(len(table.layers)))
    return figure


def allocation_figure(table: SensitivityTable, result: SearchResult) -> go.Figure:
    """Key and value bits of every layer."""
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.14, subplot_titles=("keys", "values"))
    layers = [layer.index for layer in table.layers]
    transforms = [", ".join(layer.transforms.names) or "none" for layer in table.layers]
    for row, part in enumerate(("k_bits", "v_bits"), 1):
        bits = [getattr(result.chosen.pairs[layer], part) for layer in layers]
        figure.add_bar(
            x=layers,
            y=bits,
            marker_color=[_BIT_COLORS[each] for each in bits],
            text=bits,
            customdata=[
                [result.chosen.pairs[layer].name, names] for layer, names in zip(layers, transforms, strict=True)
            ],
            hovertemplate="layer %{x}: %{customdata[0]}<br>transforms: %{customdata[1]}<extra></extra>",
            row=row,
            col=1,
        )
        figure.update_yaxes(title="bits", range=[0, 17 if 16 in bits else 9], tickvals=list(BITS), row=row, col=1)
    figure.update_xaxes(title="layer", dtick=_tick(len(layers)), row=2, col=1)
    figure.update_layout(showlegend=False, height=420, bargap=0.1)
    return figure


def clusters_figure(table: SensitivityTable, clusters: Sequence[Cluster]) -> go.Figure:
    """Each layer's error at K4V4 against the one at K2V2, coloured by cluster."""
    by_index = {layer.index: layer for layer in table.layers}
    figure = go.Figure()
    for each in clusters:
        members = [by_index[layer] for layer in each.layers]
        figure.add_scatter(
            x=[layer.output_error["K4V4"] for layer in members],
            y=[layer.output_error["K2V2"] for layer in members],
            text=[str(layer.index) for layer in members],
            mode="markers+text",
            textposition="top center",
            marker_size=10,
            name=f"{format_layers(each.layers)} ({len(each.pairs)} pairs)",
            hovertemplate="layer %{text}: K4V4 %{x:.4g}, K2V2 %{y:.4g}<extra></extra>",
        )
    figure.update_layout(xaxis_title="error at K4V4", yaxis_title="error at K2V2", height=520)
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure


def costs_figure(costs: Mapping[str, float]) -> go.Figure:
    """Seconds of each stage."""
    figure = go.Figure(
        go.Bar(
            x=list(costs.values()),
            y=list(costs),
            orientation="h",
            text=[f"{seconds:,.1f} s" for seconds in costs.values()],
            hoverinfo="skip",
            marker_color="#67a9cf",
        )
    )
    figure.update_layout(xaxis_title="seconds", height=120 + 34 * len(costs))
    figure.update_yaxes(autorange="reversed")
    return figure


def _group(each: Scored) -> str:
    if each.origin.startswith(("uniform ", "refitted ", "probe ")):
        return each.origin.split()[0]
    return "greedy and integer program" if each.origin.startswith(("greedy", "integer program")) else "sampled"


def _add_settings(
    figure: go.Figure,
    settings: Sequence[Scored],
    name: str,
    color: str,
    symbol: str,
    size: int,
    *,
    labels: bool = False,
    errors: bool = False,
) -> None:
    shown: dict[str, Any] = {"mode": "markers"}
    if labels:
        shown = {"mode": "markers+text", "text": [each.origin.removeprefix("uniform ") for each in settings]}
    if errors:
        shown["error_y"] = {"type": "data", "array": [each.quality.kl_stderr for each in settings]}
    figure.add_scatter(
        x=[each.stored_bits for each in settings],
        y=[each.quality.kl_mean for each in settings],
        name=name,
        marker={"color": color, "symbol": symbol, "size": size, "line": {"width": 0.5, "color": "white"}},
        textposition="top right",
        cliponaxis=False,
        customdata=[
            [each.origin, each.nominal_bits, format_pairs(each.pairs).replace("; ", "<br>")] for each in settings
        ],
        hovertemplate=(
            "%{customdata[0]}<br>KL %{y:.5f}, %{x:.3f} stored bits (%{customdata[1]:.3f} nominal)"
            "<br>%{customdata[2]}<extra></extra>"
        ),
        **shown,
    )


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers for a logarithmic axis: 1, 2 and 5 of each decade, or powers of ten alone where they are many."""
    if not values:
        return []
    low, high = (math.floor(math.log10(end)) for end in (min(values), max(values)))
    digits = (1, 2, 5) if high - low < MAX_DECADES else (1,)
    return [digit * 10.0**power for power in range(low, high + 1) for digit in digits]


def _tick(layers: int) -> int:
    return 1 if layers <= 16 else 2 if layers <= 40 else 4
