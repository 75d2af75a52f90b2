"""Stages after each other: what runs again and what does not, with a made-up engine."""

import json
import shutil
from dataclasses import replace
from html import escape
from types import SimpleNamespace

import pytest

from kvtuner_tools.calibration import pipeline
from kvtuner_tools.calibration.outcome import Heldout, SearchResult, uniform_file
from kvtuner_tools.calibration.verdict import judge
from tests.helpers.calibration import sensitivity_table
from tests.helpers.calibration_run import AFTER_SENSITIVITY, STATICS, calibration
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.profile import RecentWindow
from vllm_kvtuner.profile.statics import load_statics

pytestmark = pytest.mark.slow  # whole calibrations, though on a stand-in for engines


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


@pytest.mark.slow
def test_all_settings_are_scored_on_held_out_text_only_when_asked(finished, monkeypatch, tmp_path):
    out, table, _ = finished
    assert [each.origin.split()[0] for each in Heldout.read(out).settings] == ["this", "uniform", "uniform"]
    for name in ("candidates.json", "clusters.json", "search.json", "heldout.json", "heldout.safetensors"):
        shutil.copy(out / name, tmp_path)
    evaluators = []
    calibration(tmp_path, table, evaluators, monkeypatch, full_report=True).run("export")
    full = Heldout.read(tmp_path)
    assert len(full.uniform) == 9
    assert SearchResult.read(tmp_path).greedy in [each.pairs for each in full.settings]
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
