"""From a sensitivity table to profile and report, with a made-up engine; and what the commands refuse."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace
from html import escape
from types import SimpleNamespace

import numpy as np
import optuna
import plotly.io
import pytest
import yaml

from kvtuner_tools import cli
from kvtuner_tools.calibration import pipeline
from kvtuner_tools.calibration.calibration_text import CalibrationText
from kvtuner_tools.calibration.export import write_profile
from kvtuner_tools.calibration.feedback_choice import (
    FEEDBACK_STATICS_FILE,
    FeedbackChoice,
    LayerFeedback,
    SideChoice,
)
from kvtuner_tools.calibration.options import STAGES, CalibrationOptions, Texts
from kvtuner_tools.calibration.outcome import Heldout, SearchResult, label, pareto_front, uniform_file
from kvtuner_tools.calibration.pipeline import Calibration
from kvtuner_tools.calibration.study import EvaluatorSpec
from kvtuner_tools.calibration.transform_choice import LayerChoice, TransformChoice
from kvtuner_tools.calibration.verdict import judge
from tests.helpers.calibration import FakeEvaluator, sensitivity_table
from tests.helpers.tiny_model import make_tokenizer
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.profile import RecentWindow, TransformSettings
from vllm_kvtuner.profile.statics import FeedbackStatics, LayerStatics, load_statics, save_statics

pytestmark = pytest.mark.slow  # whole calibrations, though on a stand-in for engines

AFTER_SENSITIVITY = STAGES[STAGES.index("sensitivity") + 1 :]
STATICS = TransformSettings(key_offset=True, key_hadamard=True, key_round_feedback=True)
FEEDBACK = FeedbackStatics(
    factors=np.broadcast_to(np.eye(64, dtype=np.float16), (2, 64, 64)),
    ranges={2: (0.75, 1.0), 4: (1.0,)},
    transforms=("key_hadamard",),
)
OFFSETS = {
    layer: LayerStatics(key_offset=np.full((2, 64), layer, dtype=np.float32), key_round_feedback=FEEDBACK)
    for layer in (0, 2, 3)
}


@pytest.fixture(scope="module", autouse=True)
def quiet_optuna():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def texts():
    return Texts(*(CalibrationText("bundled", "ab" * 32, ((1, 2, 3, number),)) for number in range(3)))


def calibration(out, table, evaluators, monkeypatch, **options):
    """A calibration whose first stages have run; every engine that it starts is added to ``evaluators``."""

    def start(settings):
        evaluators.append(FakeEvaluator(table))
        return evaluators[-1]

    monkeypatch.setattr(pipeline, "start_engine", start)
    defaults = {"max_bits": 4.0, "trials": 30, "recent_window": 0, "sink_tokens": 0}
    options = CalibrationOptions(model="fake", **(defaults | options))
    made = Calibration(out, options, texts())
    table.write(out / "sensitivity.json")
    feedback = FeedbackChoice("made up", FEEDBACK_STATICS_FILE, tuple(map(feedback_of, table.layers)))
    feedback.write(out)
    layers = [LayerChoice(each.index, each.transforms, "mean", 8, "none", None, {}, None) for each in table.layers]
    TransformChoice("made up", None, tuple(layers)).write(out)
    save_statics(out / FEEDBACK_STATICS_FILE, OFFSETS, {"data": "bundled", "method": "test", "model": "fake"})
    return made


def feedback_of(layer):
    ranges = {str(bits): each for bits, each in FEEDBACK.ranges.items()}
    errors = {"nearest": {"2": 0.4, "4": 0.04}, "feedback": {"2": 0.1, "4": 0.01}}
    keys = SideChoice(layer.transforms.key_round_feedback, ranges, errors, 0.25)
    return LayerFeedback(layer.index, layer.transforms, keys, replace(keys, is_on=False, ratio=1.125), None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder, table and engines of a calibration that has run."""
    out = tmp_path_factory.mktemp("calibration")
    table = sensitivity_table(10)
    layers = [replace(layer, transforms=STATICS) if layer.index in (2, 3) else layer for layer in table.layers]
    table = replace(table, layers=tuple(layers))
    evaluators = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = calibration(out, table, evaluators, monkeypatch)
        for stage in AFTER_SENSITIVITY:
            made.run(stage)
    return out, table, evaluators


@pytest.mark.slow
def test_profile_round_trip(finished):
    out, table, _ = finished
    profile = load_profile(str(out / "profile.yaml"))
    result = SearchResult.read(out)
    assert profile.pairs == result.chosen.pairs
    assert {layer.index: profile.transforms_of(layer.index) for layer in table.layers} == {
        layer.index: layer.transforms for layer in table.layers
    }
    assert profile.statics == out / "profile.statics.safetensors"
    statics = load_statics(profile.statics, profile.resolve(profile.model))
    assert {index: each.key_offset.tolist() for index, each in statics.items()} == {
        index: OFFSETS[index].key_offset.tolist() for index in (2, 3)
    }
    for index, each in statics.items():
        bits = profile.pairs[index].k_bits
        has_feedback = bits in FEEDBACK.ranges
        assert (each.key_round_feedback is not None) == has_feedback
        assert not has_feedback or each.key_round_feedback.ranges == {bits: FEEDBACK.ranges[bits]}
    assert profile.model is not None and profile.model.name == "fake"
    provenance = profile.provenance
    assert provenance["versions"] == table.versions
    assert provenance["seeds"] == {"sampling": 0, "search": 0}
    assert provenance["data"]["sensitivity"] == table.data
    assert provenance["search"]["trials"]["scored"] == 30
    scores = provenance["heldout_scores"]
    assert scores["bf16"]["perplexity"] == 10.0
    assert scores["this profile"]["kl_mean"] == pytest.approx(
        result.find(result.chosen.pairs).quality.kl_mean, rel=1e-4
    )
    within, above = (name for name in scores if name.startswith("uniform "))
    assert scores[within]["stored_bits"] <= 4.0 < scores[above]["stored_bits"]
    assert provenance["stored_bits"] == pytest.approx(result.chosen.stored_bits, abs=1e-3)


@pytest.mark.slow
def test_nothing_runs_twice(finished, monkeypatch, tmp_path):
    out, table, evaluators = finished
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name.startswith(("profile", "heldout"))}
    again = calibration(out, table, evaluators, monkeypatch)
    number = len(evaluators)
    for stage in AFTER_SENSITIVITY:
        again.run(stage)
    assert len(evaluators) == number
    assert before == {name: (out / name).read_bytes() for name in before}
    # From nothing, the same options give the same profile, byte for byte.
    anew = calibration(tmp_path, table, [], monkeypatch)
    for stage in AFTER_SENSITIVITY:
        anew.run(stage)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_without_round_feedback_the_transforms_statics_are_exported(finished, monkeypatch, tmp_path):
    _, table, _ = finished
    settings = replace(STATICS, key_round_feedback=False)
    layers = tuple(replace(layer, transforms=settings) for layer in table.layers[2:4])
    table = replace(table, layers=(*table.layers[:2], *layers, *table.layers[4:]))
    made = calibration(tmp_path, table, [], monkeypatch, round_feedback="none")
    (tmp_path / FEEDBACK_STATICS_FILE).rename(tmp_path / "statics.safetensors")
    for stage in AFTER_SENSITIVITY:
        made.run(stage)
    assert "Not asked for: all codes are nearest ones." in (tmp_path / "report.html").read_text()
    profile = load_profile(str(tmp_path / "profile.yaml"))
    statics = load_statics(profile.statics, profile.resolve(profile.model))
    assert {index: each.key_round_feedback for index, each in statics.items()} == {2: None, 3: None}


@pytest.mark.slow
def test_changed_inputs_run_again(finished, monkeypatch, tmp_path):
    _, table, _ = finished
    evaluators = []
    for stage in AFTER_SENSITIVITY:
        calibration(tmp_path, table, evaluators, monkeypatch, trials=12).run(stage)
    first = len(evaluators)
    worse = replace(table, layers=(replace(table.layers[0], transforms=STATICS), *table.layers[1:]))
    for stage in AFTER_SENSITIVITY:
        calibration(tmp_path, worse, evaluators, monkeypatch, trials=12).run(stage)
    assert len(evaluators) == 2 * first
    assert sum(len(each.scored) for each in evaluators[:first]) == sum(len(each.scored) for each in evaluators[first:])
    assert load_profile(str(tmp_path / "profile.yaml")).transforms_of(0) == STATICS


def test_sensitivity_is_measured_anew_only_for_other_inputs(tmp_path, monkeypatch):
    table = sensitivity_table(3)
    measured = []

    def measure(capture, choice, out, recent_window):
        measured.append((capture.inputs, choice, recent_window))
        table.write(out / "sensitivity.json")
        return table

    monkeypatch.setattr(pipeline, "measure_sensitivity", measure)
    capture = SimpleNamespace(inputs="first")
    monkeypatch.setattr("kvtuner_tools.calibration.captured.Capture.read", lambda folder: capture)
    made = calibration(tmp_path, table, [], monkeypatch, transforms="none")
    for inputs, number in (("first", 1), ("first", 1), ("second", 2)):
        capture.inputs = inputs
        made.run("sensitivity")
        assert len(measured) == number
    (tmp_path / "sensitivity.json").write_text("edited")
    made.run("sensitivity")
    assert len(measured) == 3
    for unquantized in ({"recent_window": 64}, {"recent_window": 64, "sink_tokens": 4}):
        made.options = replace(made.options, **unquantized)
        made.run("sensitivity")
        made.run("sensitivity")
    assert measured[3:] == [("second", None, RecentWindow(64)), ("second", None, RecentWindow(64, sink_tokens=4))]


def test_costs_of_stages_are_kept(finished):
    out, _, _ = finished
    costs = json.loads((out / "costs.json").read_text())["stages"]
    assert set(costs) == set(AFTER_SENSITIVITY)
    assert all(cost["seconds"] >= 0 for cost in costs.values())


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


@pytest.mark.slow
def test_all_settings_are_scored_on_held_out_text_only_when_asked(finished, monkeypatch, tmp_path):
    out, table, _ = finished
    assert [each.origin.split()[0] for each in Heldout.read(out).settings] == ["this", "uniform", "uniform"]
    for name in ("candidates.json", "clusters.json", "search.json", "heldout.json", "heldout.safetensors"):
        shutil.copy(out / name, tmp_path)
    evaluators = []
    calibration(tmp_path, table, evaluators, monkeypatch, full_report=True).run("export")
    full = Heldout.read(tmp_path)
    assert len(full.uniform) == 9 and {each.origin for each in full.settings} >= {"greedy"}
    assert len(evaluators[0].scored) == len(full.settings) - 3, "what was scored before is not scored again"
    assert set(full.differences) == {each.origin for each in full.settings[1:]}


@pytest.mark.slow
def test_the_uniform_setting_can_be_served_with_what_calibration_found(finished, tmp_path):
    out, table, _ = finished
    rival = Heldout.read(out).rival(4.0)
    profile = load_profile(str(out / uniform_file(rival)))
    assert profile.pairs == rival.pairs and len(set(profile.pairs.values())) == 1
    assert all(profile.transforms_of(layer.index) == layer.transforms for layer in table.layers)
    load_statics(profile.statics, profile.resolve(profile.model))
    assert profile.provenance["verdict"] == load_profile(str(out / "profile.yaml")).provenance["verdict"]
    assert profile.provenance["heldout_scores"]["this profile"]["kl_mean"] == pytest.approx(
        rival.quality.kl_mean, rel=1e-4
    )


def test_uniform_profiles_of_earlier_runs_go(finished, monkeypatch, tmp_path):
    out, table, _ = finished
    for name in ("candidates.json", "clusters.json", "search.json", "heldout.json", "heldout.safetensors"):
        shutil.copy(out / name, tmp_path)
    for name in ("uniform_K8V8.yaml", "uniform_K8V8.statics.safetensors", "mine.yaml"):
        (tmp_path / name).write_text("old")
    calibration(tmp_path, table, [], monkeypatch).run("export")
    assert not list(tmp_path.glob("uniform_K8V8*")) and (tmp_path / "mine.yaml").exists()


@pytest.mark.slow
def test_quick_takes_the_integer_programs_pairs_and_scores_only_what_to_serve(finished, monkeypatch, tmp_path):
    _, table, _ = finished
    evaluators = []
    made = calibration(tmp_path, table, evaluators, monkeypatch, quick=True)
    for stage in AFTER_SENSITIVITY:
        made.run(stage)
    result = SearchResult.read(tmp_path)
    assert result.chosen.pairs == result.integer_program and not result.scored
    (held_out,) = evaluators
    assert held_out.scored[0] == result.chosen.pairs and len(held_out.scored) == 3
    assert load_profile(str(tmp_path / "profile.yaml")).pairs == result.chosen.pairs
    assert "search" not in load_profile(str(tmp_path / "profile.yaml")).provenance["data"]
    html = (tmp_path / "report.html").read_text()
    assert "the integer program chose the pairs" in html and "Optuna: " not in html


@pytest.mark.slow
def test_the_summary_says_how_to_serve_what_fits_and_what_to_expect(finished, monkeypatch):
    out, table, _ = finished
    made = calibration(out, table, [], monkeypatch)
    summary = dict(made.summary())
    assert [*summary][:1] + [*summary][-1:] == ["verdict", "serve"]
    verdict = judge(Heldout.read(out), 4.0)
    serve = f"vllm serve fake --kv-cache-dtype kvtuner --kvtuner-profile {out / verdict.file}"
    assert summary["serve"] == serve
    resolved = load_profile(str(out / verdict.file)).resolve(load_profile(str(out / verdict.file)).model)
    ratio = resolved.bf16_bytes_per_token / resolved.bytes_per_token
    assert summary["fits"].startswith(f"{ratio:.2f} times bf16's tokens")
    assert f"{(1 << 30) // (16 * resolved.bytes_per_token) * 16:,} per GiB" in summary["fits"]
    assert "KL " in summary["expect"] and "key_hadamard in 10 layers" in summary["transforms"]
    html = (out / "report.html").read_text()
    for name, text in summary.items():
        assert (escape(text) in html) == (name != "report")
    assert "<meta name='viewport'" in html and html.index("vllm serve") < html.index("<h2>")
    assert "kvtuner calibrate fake --out" in html


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_size": 256,
}


TOO_MANY_SINKS = "sink-tokens must be an integer of 0-16 tokens"
SINKS_ALONE = "sink-tokens must be 0 without a recent_window, whose cache holds them"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ([], ["the budget must be given as --max-bits, or as --memory with --context and --concurrency, but got none"]),
        (["--max-bits", "4", "--memory", "1GiB"], ["but got --max-bits, --memory"]),
        (["--memory", "1GiB", "--context", "100"], ["but got --memory, --context"]),
        (["--max-bits", "2"], ["at least 2.500 stored bits (2.000 nominal)", "but got 2.000 stored bits"]),
        (
            ["--memory", "1MB", "--context", "1000", "--concurrency", "4", "--recent-window", "0"],
            ["at least 2.500 stored bits", "got 1.938 stored bits"],
        ),
        (["--max-bits", "3", "--unquantized", "0"], ["at least 5.875 stored bits (5.500 nominal)"]),
        (["--max-bits", "4", "--unquantized", "7"], ["--unquantized must name layers of", "but got 7"]),
        (["--max-bits", "4", "--unquantized", "x"], ["--unquantized must be a layer, a range or a list"]),
        (["--max-bits", "4", "--unquantized", "0-3"], ["--unquantized must leave a layer to choose pairs for"]),
        (
            [
                "--max-bits",
                "17",
                "--sequence-length",
                "3",
                "--trials",
                "0",
                "--cluster-factor",
                "0.5",
                "--data",
                "/none.txt",
            ],
            [
                "--max-bits must be above 0 and at most 16, but got 17",
                "--sequence-length must be at least 32, but got 3",
                "--trials must be at least 1, but got 0",
                "--cluster-factor must be at least 1, but got 0.5",
                "/none.txt: the file must be readable",
            ],
        ),
        (["--max-bits", "4", "--recent-window", "64", "--sink-tokens", "17"], [f"--{TOO_MANY_SINKS}, but got 17"]),
        (["--max-bits", "4", "--recent-window", "64", "--sink-tokens", "-1"], [f"--{TOO_MANY_SINKS}, but got -1"]),
        (["--max-bits", "4", "--recent-window", "0", "--sink-tokens", "4"], [f"--{SINKS_ALONE}, but got 4"]),
        (
            ["--max-bits", "4", "--sequence-length", "272"],
            ["--sequence-length must be more than 272 tokens, 4 times the 68"],
        ),
        (
            ["--max-bits", "4", "--recent-window", "512"],
            ["--sequence-length must be more than 2064 tokens", "but got 2048"],
        ),
        (
            ["--max-bits", "4", "--sequence-length", "2048"],
            ["--sequence-length must be less than the model's 2,048 positions"],
        ),
        (
            ["--max-bits", "4", "--capture-tokens", "9000000", "--kv-cache-memory-bytes", "1MiB"],
            ["bundled: --heldout-tokens + --capture-tokens + --search-tokens must be at most the ", "9,020,480"],
        ),
        (
            ["--max-bits", "4", "--kv-cache-memory-bytes", "1MiB"],
            ["--kv-cache-memory-bytes must hold the longest window, of 2,047 tokens"],
        ),
        (["--max-bits", "4", "--storage", "nonsense"], ["--storage must be a database that can be opened"]),
    ],
)
def test_all_input_errors_at_once_before_a_model_loads(model, tmp_path, capsys, monkeypatch, arguments, problems):
    monkeypatch.setattr(Calibration, "run", lambda *_: pytest.fail("a stage was run"))
    out = tmp_path / "out"
    assert cli.main(["calibrate", model, "--out", str(out), *arguments]) == 1
    errors = capsys.readouterr().err
    assert all(problem in errors for problem in problems), errors
    assert len(errors.splitlines()) == max(1, len(problems) if len(arguments) > 8 else 1)
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "rule"), [("recent_window: 64\nsink_tokens: 17", TOO_MANY_SINKS), ("sink_tokens: 4", SINKS_ALONE)]
)
def test_sink_tokens_are_refused_as_a_profile_with_them_is(tmp_path, settings, rule):
    path = tmp_path / "profile.yaml"
    path.write_text(f"version: 1\nlayers: K4V4\n{settings}\n")
    with pytest.raises(ValueError, match=rule.replace("sink-tokens", "sink_tokens")):
        load_profile(str(path))


def test_a_window_cannot_go_where_its_sinks_stay(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Calibration, "run", lambda *_: "done")
    monkeypatch.setattr(Calibration, "summary", lambda _: [])
    out = str(tmp_path / "out")
    window = ["--recent-window", "64", "--sink-tokens", "4"]
    assert cli.main(["calibrate", model, "--out", out, "--max-bits", "4", *window]) == 0
    assert CalibrationOptions.read(tmp_path / "out").sink_tokens == 4
    assert cli.main(["transforms", out, "--recent-window", "0"]) == 1
    assert f"--{SINKS_ALONE}, but got 4" in capsys.readouterr().err
    assert CalibrationOptions.read(tmp_path / "out").recent_window == 64
    assert cli.main(["transforms", out, "--recent-window", "0", "--sink-tokens", "0"]) == 0


def test_the_models_own_folder_is_no_output_folder(model, capsys, monkeypatch):
    monkeypatch.setattr(Calibration, "run", lambda *_: pytest.fail("a stage was run"))
    assert cli.main(["calibrate", model, "--out", model, "--max-bits", "4"]) == 1
    assert "--out must not be in the model's folder" in capsys.readouterr().err


def test_options_are_kept_for_the_stages_that_follow(model, tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(Calibration, "run", lambda self, stage: ran.append((stage, self.options)))
    monkeypatch.setattr(Calibration, "summary", lambda _: [])
    out = tmp_path / "out"
    assert cli.main(["capture", model, "--out", str(out), "--seed", "7"]) == 0
    assert cli.main(["prune", str(out), "--keep-all-pairs"]) == 0
    assert cli.main(["search", str(out), "--memory", "1MiB", "--context", "1000", "--concurrency", "2"]) == 0
    assert cli.main(["search", str(out), "--max-bits", "4.25"]) == 0
    assert [stage for stage, _ in ran] == ["capture", "prune", "search", "search"]
    assert ran[2][1].memory == 1 << 20
    asked = CalibrationOptions(model=model, seed=7, keep_all_pairs=True, max_bits=4.25)
    assert CalibrationOptions.read(out) == asked
    assert ran[3][1] == replace(asked, window=2047, recent_window=64, sink_tokens=4)
    assert cli.main(["calibrate", model, "--out", str(out), "--no-keep-all-pairs"]) == 0
    assert [stage for stage, _ in ran[4:]] == list(STAGES)
    assert ran[-1][1] == replace(ran[3][1], keep_all_pairs=False)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "must be the output folder of kvtuner capture or kvtuner calibrate" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("step", ["before", "after"])
def test_an_export_that_is_killed_ends_as_an_undisturbed_one(finished, tmp_path, monkeypatch, step):
    """Killed at a renaming, run again and killed at a later one, until it is done."""
    undisturbed, table, _ = finished
    for name in ("candidates.json", "clusters.json", "search.json"):
        shutil.copy(undisturbed / name, tmp_path)
    made = calibration(tmp_path, table, [], monkeypatch)
    codes = []
    while not codes or codes[-1] != 0:
        process = multiprocessing.get_context("fork").Process(
            target=_export_and_be_killed, args=(made, len(codes) // 3 + 1, step)
        )
        process.start()
        process.join()
        codes.append(process.exitcode)
        assert codes[-1] in (0, -signal.SIGKILL) and len(codes) < 60
    assert len(codes) > 6
    for name in ("profile.yaml", "profile.statics.safetensors", "heldout.json", "heldout.safetensors"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def _export_and_be_killed(made, renaming, step):
    counter, replace_file = itertools.count(1), os.replace

    def killing(*paths):
        last = next(counter) == renaming
        if last and step == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(*paths)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killing
    made.run("export")
    os._exit(0)


def test_interrupt_says_how_to_go_on(model, tmp_path, monkeypatch, capsys):
    def interrupted(self, stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibration, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["calibrate", model, "--out", str(tmp_path / "out"), "--max-bits", "4"])
    assert caught.value.code == 130
    assert "run the same command again to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["search"], "must be given DIR, or --join"),
        (["search", "DIR", "--study", "x"], "must be given DIR, or --join"),
        (["search", "DIR", "--join", "DIR"], "--join takes the search as it was made"),
        (["search", "--join", "DIR", "--trials", "3"], "--join takes the search as it was made"),
        (["search", "--join", "DIR"], "must be the output folder"),
        (["search", "--join", "sqlite:///DIR/none/x.db"], "--storage must be a database"),
        (["search", "--join", "sqlite:///DIR/x.db"], "--study must name a search in this storage (none)"),
    ],
)
def test_join_errors(tmp_path, capsys, arguments, problem):
    assert cli.main([argument.replace("DIR", str(tmp_path)) for argument in arguments]) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", *STAGES])
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"kvtuner {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_budget_reaches_the_search(tmp_path, monkeypatch):
    table = sensitivity_table(4)
    shapes = 4 * 2 * 2 * 64  # numbers per token
    memory = int(4.25 * shapes / 8) * 1008 * 3
    made = calibration(
        tmp_path, table, [], monkeypatch, max_bits=None, memory=memory, context=1000, concurrency=3, trials=8
    )
    for stage in ("prune", "cluster", "search"):
        made.run(stage)
    result = SearchResult.read(tmp_path)
    assert result.max_bits == pytest.approx(4.25)
    assert result.chosen.stored_bits <= 4.25
    where = f"3 requests of 1,000 tokens in {memory:,} bytes"
    assert result.budget == f"at most 4.250 stored bits (3.750 nominal): {where}"


@pytest.mark.quick(1)
@pytest.mark.parametrize(("sink_tokens", "blocks"), [(0, 3), (4, 4), (16, 4)])
def test_a_recent_window_reaches_the_engine_and_the_profile(tmp_path, monkeypatch, sink_tokens, blocks):
    """And takes its share of a budget given as memory: three blocks of 16 tokens hold 20 wherever they lie, and one its
    sink tokens."""
    table = sensitivity_table(6)
    numbers = sum(2 * layer.num_kv_heads * layer.head_size for layer in table.layers)
    recent = sum(
        blocks * 16 * layer.num_kv_heads * content_bytes(PrecisionPair(8, 8), layer.head_size) for layer in table.layers
    )
    memory = (int(4.25 * numbers / 8) * 1008 + recent) * 3
    options = {"max_bits": None, "memory": memory, "context": 1000, "concurrency": 3, "trials": 8}
    settings = []
    window = {"recent_window": 20, "recent_window_bits": 8, "sink_tokens": sink_tokens}
    made = calibration(tmp_path, table, [], monkeypatch, **window, **options)
    start = pipeline.start_engine
    monkeypatch.setattr(pipeline, "start_engine", lambda engine: settings.append(engine) or start(engine))
    for stage in AFTER_SENSITIVITY:
        made.run(stage)
    assert len(settings) == 2, "the search's engine and that of the held-out scores"
    for each in settings:
        assert each.recent_window == RecentWindow(20, 8, sink_tokens)
    assert all(EvaluatorSpec.from_plain(each.to_plain()) == each for each in settings)
    result = SearchResult.read(tmp_path)
    assert result.max_bits == pytest.approx(4.25)
    beside = f"beside a recent window of 20 tokens{f' and the first {sink_tokens}' if sink_tokens else ''} in 8 bits"
    assert beside in result.budget and beside in (tmp_path / "report.html").read_text()
    profile = load_profile(str(tmp_path / "profile.yaml"))
    assert (profile.recent_window, profile.recent_window_bits, profile.sink_tokens) == (20, 8, sink_tokens)
    assert ("sink_tokens" in (tmp_path / "profile.yaml").read_text()) == (sink_tokens > 0)


@pytest.mark.slow
def test_another_number_of_sink_tokens_is_another_search(tmp_path, monkeypatch):
    """What was scored with other sink tokens is scored again, and kept for the next run with these."""
    table, evaluators = sensitivity_table(4), []
    studies, started = [], []
    for sink_tokens in (0, 4, 4):
        window = {"recent_window": 20, "sink_tokens": sink_tokens, "trials": 8}
        made = calibration(tmp_path, table, evaluators, monkeypatch, **window)
        for stage in ("prune", "cluster", "search", "export"):
            made.run(stage)
        studies.append(SearchResult.read(tmp_path).study)
        started.append(len(evaluators))
    assert started == [2, 4, 4]
    assert studies[0] != studies[1] == studies[2]


def test_profile_is_not_written_where_it_would_not_load(finished, tmp_path):
    out, table, _ = finished
    broken = replace(table, model={**table.model, "num_layers": 3})
    with pytest.raises(ValueError, match="layers"):
        write_profile(
            tmp_path / "p.yaml", SearchResult.read(out).chosen.pairs, broken, out / FEEDBACK_STATICS_FILE, None, {}
        )
    assert not list(tmp_path.glob("*.yaml"))
    assert yaml.safe_load((out / "profile.yaml").read_text())["version"] == 1
