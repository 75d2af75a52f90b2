"""Artifacts on disk: round trips, and errors that name the file."""

import json

import pytest

from kvtuner_tools.calibration.artifacts import SensitivityTable, digest
from kvtuner_tools.calibration.cluster import cluster, read_clusters, write_clusters
from kvtuner_tools.calibration.prune import prune, read_candidates, write_candidates
from tests.helpers.calibration import sensitivity_table


def test_sensitivity_round_trip(tmp_path):
    table = sensitivity_table()
    table.write(tmp_path / "s.json")
    assert SensitivityTable.read(tmp_path / "s.json") == table


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.update(schema="other/1"), "schema must be 'kvtuner-sensitivity/2', but got 'other/1'"),
        (lambda d: d.update(extra=1), "must only have the keys"),
        (lambda d: d.pop("seed"), "must have the keys seed, but got none"),
        (lambda d: d.update(layers=3), "layers must be a list, but got 3"),
        (lambda d: d["layers"].reverse(), "layers must hold one entry per layer, in order"),
        (lambda d: d["layers"][1].pop("head_size"), "layers[1] must have the keys head_size"),
        (lambda d: d["layers"][0]["output_error"].pop("K4V4"), "layers[0].output_error must have the keys K4V4"),
        (lambda d: d["layers"][0]["output_error"].update(K4V4=-1), "layers[0].output_error.K4V4 must be a finite"),
        (lambda d: d["layers"][0]["output_error_per_head"].update(K4V4=[1.0]), "output_error_per_head.K4V4 must be"),
        (lambda d: d["layers"][0].update(num_kv_heads=0), "layers[0].num_kv_heads must be an integer of at least 1"),
        (lambda d: d["layers"][0]["transforms"].update(key_hadamard="yes"), "transforms.key_hadamard must be true or"),
    ],
)
def test_sensitivity_errors_name_file_and_key(tmp_path, change, problem):
    path = tmp_path / "s.json"
    sensitivity_table().write(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="must") as caught:
        SensitivityTable.read(path)
    assert problem in str(caught.value)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": []}'])
def test_unreadable_sensitivity(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=r"s\.json"):
        SensitivityTable.read(tmp_path / "s.json")


def test_candidates_and_clusters_round_trip(tmp_path):
    candidates = prune(sensitivity_table(), unquantized=(2,))
    write_candidates(tmp_path / "c.json", candidates)
    assert read_candidates(tmp_path / "c.json") == candidates
    clusters = cluster(candidates)
    write_clusters(tmp_path / "k.json", clusters)
    assert read_clusters(tmp_path / "k.json") == clusters


def test_digest_does_not_depend_on_key_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
