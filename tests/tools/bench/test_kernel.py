"""``kvtuner bench kernel``: its report, and one run on a card."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from kvtuner_tools.bench import kernel
from kvtuner_tools.bench.kernel import report, table
from kvtuner_tools.bench.points import IMPLEMENTATIONS, LayerHeads

HEADS = LayerHeads(4, 2, 64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="bench kernel must run on a GPU"):
        kernel.run(argparse.Namespace(**vars(_arguments())))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernel.add_arguments(parser)
    return parser.parse_args([])


def test_report(capsys):
    entry = {
        "implementation": "cuda", "format": "K4V4", "transforms": "none", "nominal_bits": 4.0, "stored_bits": 4.25,
        "shape": "32/8/128", "block_size": 16, "point": "64x8192", "query_tokens": "1+4", "rows_per_kv_head": 16,
        "us": 140.0, "bytes": 570_425_344,
        "fraction_measured": 0.9, "fraction_given": None, "relative_errors": {"random": 2e-3},
        "rounding_errors": {"random": 1e-3},
        "failure": None, "unsupported": None,
    }  # fmt: skip
    result = {
        "device": "a card", "bandwidth": {"measured_bytes_s": 4.37e12}, "shapes": ["32/8/128"], "seconds": 99.0,
        "presets": {"llama31_8b": "32/8/128"},
        "skipped": [{"implementation": "fa3_fp8", "part": "decode", "reason": "vLLM is not installed"}],
        "decode": [entry, {**entry, "failure": "RuntimeError: no", "us": None, "format": "K2V2"}],
        "layer": [], "store": [], "gather": [],
    }  # fmt: skip

    assert report(result, as_json=False) == 1
    out, err = capsys.readouterr()
    assert (
        "| 64x8192 |          1+4 |   16 |           cuda |   K4V4 |       none |            4 |        4.25 |" in out
    )
    assert "| 570.4 | 140.0 |" in out and "32/8/128 llama31_8b (heads" in out
    assert "90.0" in out and "4.37 TB/s" in out and "2.0e-03 / 1.0e-03" in out
    assert "skipped fa3_fp8 (decode): vLLM is not installed" in err
    assert "cuda K2V2 32/8/128 64x8192 with 1+4 query tokens: RuntimeError: no" in err
    assert report({**result, "decode": [entry, {**entry, "unsupported": "too narrow"}]}, as_json=False) == 0
    assert "unsupported cuda K4V4: too narrow" in capsys.readouterr().err
    assert "32/8/128 block 16" in table({**result, "shapes": ["32/8/128", "7/1/64"]})


@pytest.mark.gpu
def test_on_a_card(tmp_path):
    """Every implementation that runs here measures, stays below what memory allows, and is right."""
    out, picture = tmp_path / "out.json", None
    words = [f"--out={out}"]
    if importlib.util.find_spec("matplotlib"):
        picture = tmp_path / "picture.png"
        words.append(f"--picture={picture}")
    parser = argparse.ArgumentParser()
    kernel.add_arguments(parser)

    status = kernel.run(
        parser.parse_args(
            [
                "--points=64x4096,mixed:8:256-4096", "--pairs=K8V8,K4V2", "--store-pairs=K4V4", "--gather-tokens=8192",
                "--transforms=none,all", "--query-tokens=1,1+3", "--samples=3", "--sample-ms=2", *words,
            ]
        )
    )  # fmt: skip

    result = json.loads(out.read_text())
    assert status == 0, [entry["failure"] for entry in result["decode"] + result["layer"]]
    keys = ("implementation", "format", "point", "query_tokens", "transforms")
    decode, layer = ({tuple(entry[key] for key in keys) for entry in result[part]} for part in ("decode", "layer"))
    assert layer == decode
    # The slowest card this is meant for reads hundreds of GB/s; no kernel can read what it has not got.
    assert 1e11 < result["bandwidth"]["measured_bytes_s"] < 2e13
    for entry in result["decode"] + result["layer"]:
        assert 0 < entry["fraction_measured"] < 1.15
        assert (entry["query_tokens"], entry["rows_per_kv_head"]) in {("1", 4), ("1+3", 12)}
        limit = {"fp8": 0.1, "int4": 3e-2}.get(entry["format"], 1e-2)
        assert entry["relative_errors"]["random"] < limit, (entry["implementation"], entry["format"])
        assert entry["copies"] * entry["bytes"] > 2 * result["bandwidth"]["l2_bytes"]
    skipped = {entry["implementation"] for entry in result["skipped"] if entry["part"] == "decode"}
    assert {entry["implementation"] for entry in result["decode"]} == set(IMPLEMENTATIONS) - skipped
    assert {entry["tokens"] for entry in result["store"]} == {64, 16384}
    assert picture is None or Path(picture).stat().st_size > 10_000
