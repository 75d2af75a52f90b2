"""The result of ``kvtuner bench serve``: entries from an engine's lines, what they are to ``auto``, and tables."""

import json

import pytest

from kvtuner_tools.bench.serve_result import assemble, new_entry, table
from kvtuner_tools.cache_setting import CacheSetting
from tests.helpers.serve_bench import ENGINE, POINT, lines

THROUGHPUT = {
    "prompt": 4096,
    "output": 512,
    "fitting": 180,
    "concurrency": 180,
    "fill_s": 18.0,
    "decode_ms": 32.1,
    "decode_tok_s": 5607.5,
    "window_s": 20.0,
    "prompts": 100,
    "output_tok_s": 2800.0,
    "total_tok_s": 25200.0,
    "preemptions": 0,
}
LONG_PREFILL = {"prompt": 32768, "chunk": 8192, "seconds": 1.0, "seconds_min": 0.9, "seconds_max": 1.1}


def test_assembled_result_and_table() -> None:
    result = assemble(
        {"model": "m"},
        [
            new_entry(CacheSetting("auto"), (16.0, 16.0), {}, lines(ENGINE, POINT, {**POINT, "context": 8192}), None),
            new_entry(
                CacheSetting("kvtuner", "K4V4"), (4.0, 4.25), {}, lines({**ENGINE, "kv_tokens": 3700}, POINT), None
            ),
            new_entry(CacheSetting("fp8"), (8.0, 8.0), {}, [], "RuntimeError: no"),
        ],
    )

    auto, packed, failed = result["settings"]
    assert auto["kv_tokens_ratio"] == 1
    assert packed["kv_tokens_ratio"] == 3.7
    assert packed["points"] == [POINT]
    assert failed["error"] == "RuntimeError: no"
    assert "kv_tokens" not in failed
    rows = table(result).splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["auto", "auto", "kvtuner:K4V4", "fp8"]
    assert [cell.strip() for cell in rows[4].split("|")[2:-1]] == [
        "4.00", "4.25", "3,700", "3.700", "64x1024", "7.65", "8,362", "1.50",
    ]  # fmt: skip
    json.dumps(result, allow_nan=False)


def test_throughput_and_long_prefill_are_compared_with_auto() -> None:
    packed = {**THROUGHPUT, "concurrency": 800, "output_tok_s": 7000.0}
    result = assemble(
        {"model": "m"},
        [
            new_entry(CacheSetting("kvtuner", "K4V4"), (4.0, 4.25), {},
                      [{"engine": ENGINE}, {"throughput": packed}, {"throughput": {**packed, "prompt": 8}},
                       {"long_prefill": {**LONG_PREFILL, "seconds": 1.04}}], None),
            new_entry(CacheSetting("auto"), (16.0, 16.0), {},
                      [{"engine": ENGINE}, {"throughput": THROUGHPUT}, {"long_prefill": LONG_PREFILL}], None),
        ],
    )  # fmt: skip

    entry = result["settings"][0]
    assert entry["throughput"][0]["ratio"] == 2.5
    assert "ratio" not in entry["throughput"][1], "auto has no such point"
    assert entry["long_prefill"][0]["ratio"] == pytest.approx(1.04)
    assert "4096x512 |      800" in table(result)
    assert "32768:8192 |     1.040 |  1.040" in table(result)


def test_tables_with_speculation() -> None:
    point = {**POINT, "decode_steps": 64, "tokens_per_step": 2.53}
    entries = [
        new_entry(
            CacheSetting("fp8"), (8.0, 8.0), {}, [*lines(ENGINE, point), {"throughput": {**THROUGHPUT, **point}}], None
        )
    ]

    plain, speculated = (table(assemble({"speculate": text}, entries)) for text in (None, "3:0.7"))

    assert "tokens/step" not in plain
    for rows in speculated.split("\n\n"):
        heads, _, cells = ([cell.strip() for cell in row.split("|")] for row in rows.splitlines())
        assert cells[heads.index("tokens/step")] == "2.53"
