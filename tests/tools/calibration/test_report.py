"""The stage report: a page that holds the data and needs nothing else."""

import json
import re
from html import escape

import plotly.io
import pytest

from kvtuner_tools.calibration.outcome import Heldout, SearchResult, label, pareto_front
from kvtuner_tools.calibration.verdict import judge
from tests.helpers.calibration_run import calibration

pytestmark = pytest.mark.slow  # whole calibrations, though on a stand-in for engines


def report_figures(html):
    """The figures of a report, parsed from the calls that draw them."""
    decoder = json.JSONDecoder()
    figures = []
    for match in re.finditer(r"Plotly\.newPlot\(\s*\"[0-9a-f-]+\",\s*", html):
        data, end = decoder.raw_decode(html, match.end())
        layout, _ = decoder.raw_decode(html, re.compile(r"\s*,\s*").match(html, end).end())
        figures.append(plotly.io.from_json(json.dumps({"data": data, "layout": layout}), skip_invalid=True))
    return figures


def test_report_holds_the_data_and_needs_nothing_else(finished):
    out, table, _ = finished
    html = (out / "report.html").read_text()
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=", html)
    assert "Plotly.newPlot" in html and len(html) > 3_000_000  # plotly's script is inside
    result, heldout = SearchResult.read(out), Heldout.read(out)
    figures = report_figures(html)
    named = {trace.name: trace for figure in figures for trace in figure.data if trace.name}
    front = next(figure for figure in figures if any(trace.name == "Pareto front" for trace in figure.data))
    points = {(x, y) for trace in front.data if trace.mode != "lines" for x, y in zip(trace.x, trace.y, strict=True)}
    assert points == {(each.stored_bits, each.quality.kl_mean) for each in result.scored}
    line = next(trace for trace in front.data if trace.name == "Pareto front")
    assert list(line.y) == [each.quality.kl_mean for each in pareto_front(result.scored)]
    assert list(named["chosen"].x) == [result.chosen.stored_bits]
    heat = next(trace for figure in figures for trace in figure.data if trace.type == "heatmap")
    errors = [[layer.output_error[pair] for layer in table.layers] for pair in heat.y]
    assert list(map(list, heat.customdata)) == errors
    bars = [trace for figure in figures for trace in figure.data if trace.type == "bar"]
    pairs = [result.chosen.pairs[layer.index] for layer in table.layers]
    assert list(bars[0].y) == [pair.k_bits for pair in pairs]
    assert list(bars[1].y) == [pair.v_bits for pair in pairs]
    assert escape(judge(heldout, result.max_bits).text) in html
    for each in heldout.settings:
        name = escape(label(each.origin))
        assert re.search(
            f"<td>{name}</td><td>[^<]*</td><td>{each.stored_bits:.3f}</td><td>{each.nominal_bits:.3f}", html
        )
    assert "<h3>KL by kind of text</h3><p>Tokens: generated 3, prose 997.</p>" in html
    assert "<th>setting</th><th>generated</th><th>prose</th>" in html
    assert "<td>accuracy</td><td>not measured</td>" in html
    assert "Optuna: " in html
    assert "2 of 10 layers round keys with feedback, where their error is 0.25 times" in html
    assert "0 of 10 layers round values with feedback. " in html
    assert "<td>0.250</td><td>0.75 / 1</td><td>1</td><td>1.125</td><td>nearest</td><td>nearest</td>" in html


@pytest.mark.slow
def test_report_can_be_made_again(finished, monkeypatch):
    out, table, evaluators = finished
    (out / "report.html").unlink()
    calibration(out, table, evaluators, monkeypatch).run("report")
    assert "Precision profile for fake" in (out / "report.html").read_text()
