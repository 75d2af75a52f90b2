"""``kvtuner bench serve``: arguments, what an engine's lines become, failures; no engine runs."""

import argparse
import json
from pathlib import Path

import pytest

from kvtuner_tools import bench
from kvtuner_tools.bench import decode_points
from kvtuner_tools.bench.decode_points import SHAPES, Point, ServeJob, assemble, table, token_range
from kvtuner_tools.settings import Setting
from vllm_kvtuner.profile import ModelShape

ENGINE = {"startup_s": 70.0, "kv_tokens": 1000, "block_size": 16}
POINT = {
    "batch": 64,
    "context": 1024,
    "prefill_s": 1.5,
    "warm_s": 0.1,
    "decode_ms": 7.654,
    "decode_tok_s": 8361.6,
}


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(["serve", *words])


def test_points() -> None:
    assert Point.parse(" 64x8192") == Point(64, 8192)
    assert str(Point(8, 32000)) == "8x32000"
    for text in ("64", "x8", "0x8", "8x0", "8x8x8", "-1x8", "ax8"):
        with pytest.raises(ValueError, match="a point is written BATCHxCONTEXT"):
            Point.parse(text)


def test_arguments() -> None:
    args = parse("--shape=llama31_8b", "--setting=auto", "--setting=kvtuner:K8V8")

    assert args.setting == [Setting("auto"), Setting("kvtuner", "K8V8")]
    assert (args.points, args.output_tokens, args.memory, args.max_model_len) == (
        "64x1024,64x8192,8x32000",
        64,
        0.85,
        33000,
    )
    for words in (["--setting=auto"], ["--shape=llama31_8b"], ["--shape=llama31_8b", "--setting=kvtuner"]):
        with pytest.raises(SystemExit):
            parse(*words)


def test_llama_shape() -> None:
    shape = ModelShape.from_hf_config(json.loads((SHAPES / "llama31_8b" / "config.json").read_text()), "llama31_8b")

    assert len(shape.layers) == 32
    assert {(layer.num_kv_heads, layer.head_size) for layer in shape.layers} == {(8, 128)}


def test_prompts_stay_comparable_and_inside_the_vocabulary() -> None:
    assert token_range(128_256) == (1000, 100_000)
    assert token_range(512) == (256, 512)


def test_assembled_result_and_table() -> None:
    result = assemble(
        {"model": "m"},
        [
            (Setting("auto"), (16.0, 16.0), [ENGINE, POINT, {**POINT, "context": 8192}], None),
            (Setting("kvtuner", "K4V4"), (4.0, 4.25), [{**ENGINE, "kv_tokens": 3700}, POINT], None),
            (Setting("fp8"), (8.0, 8.0), [], "RuntimeError: no"),
        ],
    )

    auto, packed, failed = result["settings"]
    assert auto["kv_tokens_ratio"] == 1
    assert packed["kv_tokens_ratio"] == 3.7
    assert packed["points"] == [POINT]
    assert failed["error"] == "RuntimeError: no"
    assert "kv_tokens" not in failed
    lines = table(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["auto", "auto", "kvtuner:K4V4", "fp8"]
    assert [cell.strip() for cell in lines[4].split("|")[2:-1]] == [
        "4.00", "4.25", "3,700", "3.700", "64x1024", "7.65", "8,362", "1.50",
    ]  # fmt: skip
    json.dumps(result, allow_nan=False)


def test_run_keeps_the_points_of_a_failed_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    jobs: list[ServeJob] = []

    def fake(function: object, job: ServeJob) -> None:
        assert function is decode_points.measure
        jobs.append(job)
        job.lines.write_text(json.dumps(ENGINE) + "\n" + json.dumps(POINT) + "\n")
        if job.setting.label == "fp8":
            raise RuntimeError("out of memory")

    monkeypatch.setattr(decode_points, "in_own_process", fake)
    out = tmp_path / "out.json"

    status = bench.run(
        parse(
            "--shape=llama31_8b",
            "--setting=fp8",
            "--setting=kvtuner:K8V8",
            "--points=64x1024",
            "--kv-memory=0.5",
            f"--out={out}",
        )
    )

    result = json.loads(out.read_text())
    assert status == 1
    assert [(job.points, job.vocab_size, job.kv_memory_bytes) for job in jobs] == [
        ((Point(64, 1024),), 128_256, 1 << 29)
    ] * 2
    assert [entry["points"] for entry in result["settings"]] == [[POINT]] * 2
    assert [entry["error"] for entry in result["settings"]] == ["RuntimeError: out of memory", None]
    assert result["settings"][1]["stored_bits"] == 8.25
    assert "fp8: RuntimeError: out of memory" in capsys.readouterr().err


def test_points_beyond_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="--max-model-len must be at least 40065 for these points, but got 33000"):
        bench.run(parse("--shape=llama31_8b", "--setting=auto", "--points=1x40000"))
