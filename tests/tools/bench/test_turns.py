"""``kvtuner bench turns``: its table, its refusals, and engines on a tiny model."""

import argparse
import json

import pytest
import torch

from kvtuner_tools import bench
from kvtuner_tools.bench import turns
from tests.helpers.engine import cpu_only
from tests.helpers.tiny_model import make_tiny_model


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["turns", "model", *words])


def test_ratios_are_of_the_same_round():
    """The machine was ten times slower in the second of three rounds."""
    seconds = {
        "auto": {"1x128": [0.010, 0.100, 0.010]},
        "kvtuner:K4V4": {"1x128": [0.012, 0.120, 0.011]},
        "kvtuner:K8V8": {"1x128": [0.030, 0.100, 0.009]},
    }
    lines = turns.table(seconds).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")] == [
        "",
        "point",
        "auto, ms",
        "kvtuner:K4V4",
        "kvtuner:K8V8",
        "",
    ]
    assert [cell.strip() for cell in lines[2].split("|")] == ["", "1x128", "10.0", "1.20", "1.00", ""]


@cpu_only
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds=0"], "--rounds must be at least 1, but got 0"),
        (["--steps=0"], "--steps must be at least 1, but got 0"),
        (["--setting=auto"], "--setting must name each setting once"),
        (["--points=3"], "a point is written BATCHxCONTEXT"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_an_engine_starts(words, message):
    args = parse("--setting=auto", *words)
    with pytest.raises(ValueError, match=message):
        args.run_benchmark(args)


def test_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = parse("--setting=auto")
    with pytest.raises(ValueError, match="bench serve measures them on a GPU"):
        args.run_benchmark(args)


@cpu_only
@pytest.mark.engine
@pytest.mark.slow
def test_engines_take_turns(tmp_path, capsys):
    model, out = make_tiny_model(tmp_path), tmp_path / "turns.json"
    words = ["--points=2x40", "--rounds=2", "--steps=2", "--threads=1", "--clock=cpu", "--kv-cache-memory-bytes=32MiB"]
    args = parse("--setting=auto", "--setting=kvtuner:K4V4", *words, f"--out={out}")
    args.model = model
    assert args.run_benchmark(args) == 0
    assert "| 2x40" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["schema"] == turns.SCHEMA and result["clock"] == "cpu" and result["threads"] == 1
    assert {label: len(points["2x40"]) for label, points in result["seconds"].items()} == {"auto": 2, "kvtuner:K4V4": 2}
    assert all(0 < step < 10 for points in result["seconds"].values() for step in points["2x40"])
