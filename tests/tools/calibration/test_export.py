"""The stage export: a profile that loads, with statics and provenance, whatever stops it."""

import itertools
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from kvtuner_tools.calibration import pipeline
from kvtuner_tools.calibration.export import write_profile
from kvtuner_tools.calibration.feedback_choice import FEEDBACK_STATICS_FILE
from kvtuner_tools.calibration.outcome import SearchResult
from tests.helpers.calibration_run import AFTER_SENSITIVITY, FEEDBACK, OFFSETS, STATICS, calibration
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.statics import load_statics

pytestmark = pytest.mark.slow  # whole calibrations, though on a stand-in for engines


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
    assert provenance["search"]["trials"]["scored"] == 36, "the seeds, which are more than the trials asked for"
    scores = provenance["heldout_scores"]
    assert scores["bf16"]["perplexity"] == 10.0
    assert scores["this profile"]["kl_mean"] == pytest.approx(
        result.find(result.chosen.pairs).quality.kl_mean, rel=1e-4
    )
    within, above = (name for name in scores if name.startswith("uniform "))
    assert scores[within]["stored_bits"] <= 4.0 < scores[above]["stored_bits"]
    assert provenance["stored_bits"] == pytest.approx(result.chosen.stored_bits, abs=1e-3)


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


def test_profiles_name_the_weights_that_they_were_made_for(finished, tmp_path, monkeypatch):
    out, table, _ = finished
    assert load_profile(str(out / "profile.yaml")).weights is None, "there are none of this model"
    for name in ("candidates.json", "clusters.json", "search.json", "heldout.json", "heldout.safetensors"):
        shutil.copy(out / name, tmp_path)
    made = calibration(tmp_path, table, [], monkeypatch)
    monkeypatch.setattr(pipeline, "ModelFiles", lambda *_: SimpleNamespace(weights="0123456789abcdef"))
    made.run("export")
    written = sorted(tmp_path.glob("*.yaml"))
    assert {load_profile(str(path)).weights for path in written} == {"0123456789abcdef"}
    assert written[0].name == "profile.yaml" and len(written) == 2


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


def test_profile_is_not_written_where_it_would_not_load(finished, tmp_path):
    out, table, _ = finished
    broken = replace(table, model={**table.model, "num_layers": 3})
    with pytest.raises(ValueError, match="layers"):
        write_profile(
            tmp_path / "p.yaml", SearchResult.read(out).chosen.pairs, broken, out / FEEDBACK_STATICS_FILE, None, {}
        )
    assert not list(tmp_path.glob("*.yaml"))
    assert yaml.safe_load((out / "profile.yaml").read_text())["version"] == 1
