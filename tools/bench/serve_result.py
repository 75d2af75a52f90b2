"""The result of ``kvtuner bench serve``: one entry per setting, what each is to ``auto``, and its tables."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from kvtuner_tools.bench.points import LongPrefill, Point, ThroughputPoint
from kvtuner_tools.cache_setting import CacheSetting, profile_sha256
from kvtuner_tools.results import format_table

SCHEMA = "kvtuner-bench-serve/6"
_SETTING = {
    "setting": "label:",
    "nominal bits": "nominal_bits:.2f",
    "stored bits": "stored_bits:.2f",
}
COLUMNS = {
    **_SETTING,
    "KV tokens": "kv_tokens:,",
    "x auto": "kv_tokens_ratio:.3f",
    "point": "point:",
    "decode ms": "decode_ms:.2f",
    "decode tok/s": "decode_tok_s:,.0f",
    "tokens/step": "tokens_per_step:.2f",
    "prefill s": "prefill_s:.2f",
}
THROUGHPUT_COLUMNS = {
    **_SETTING,
    "prompt x output": "point:",
    "requests": "concurrency:,",
    "fitting": "fitting:,",
    "output tok/s": "output_tok_s:,.0f",
    "x auto": "ratio:.2f",
    "total tok/s": "total_tok_s:,.0f",
    "cached prompts tok/s": "repeat_tok_s:,.0f",
    "decode alone ms": "decode_ms:.2f",
    "decode alone tok/s": "decode_tok_s:,.0f",
    "tokens/step": "tokens_per_step:.2f",
    "preemptions": "preemptions:",
}
SPECULATION_COLUMNS = ("tokens/step",)
"""Left out without speculation."""
LONG_PREFILL_COLUMNS = {**_SETTING, "prompt:chunk": "point:", "prefill s": "seconds:.3f", "x auto": "ratio:.3f"}


def new_entry(
    setting: CacheSetting,
    bits: tuple[float, float] | None,
    environment: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
    error: str | None,
) -> dict[str, Any]:
    """One setting's part of the result.

    Args:
        setting: what it stores the cache as.
        bits: nominal and stored.
        environment: variables that its engine got besides those of the whole run.
        lines: the JSON lines of its engine.
        error: why the engine failed, if it did.
    """
    nominal, stored = bits or (None, None)
    records: dict[str, list[Any]] = {"engine": [], "points": [], "long_prefill": [], "throughput": []}
    for line in lines:
        for kind, record in line.items():
            records[kind].append(record)
    (engine,) = records.pop("engine") or [{}]
    return {
        "label": setting.label,
        "kv_cache_dtype": setting.kv_cache_dtype,
        "attention_backend": setting.attention_backend,
        "environment": dict(environment),
        "profile": setting.profile,
        "profile_sha256": profile_sha256(setting),
        "nominal_bits": nominal,
        "stored_bits": stored,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **engine,
        **records,
        "error": error,
    }


def assemble(head: Mapping[str, Any], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of all settings, with what each is to ``auto`` if that is among them.

    Args:
        head: provenance and the options of the run.
        entries: of :func:`new_entry`.
    """
    auto = next((entry for entry in entries if entry["label"] == "auto"), None)
    if auto is not None:
        for entry in entries:
            if "kv_tokens" in entry and "kv_tokens" in auto:
                entry["kv_tokens_ratio"] = entry["kv_tokens"] / auto["kv_tokens"]
            for group, key in (("throughput", "output_tok_s"), ("long_prefill", "seconds")):
                base = {_name(point): point[key] for point in auto[group]}
                for point in entry[group]:
                    if _name(point) in base:
                        point["ratio"] = point[key] / base[_name(point)]
    return {"schema": SCHEMA, **head, "settings": list(entries)}


def _name(point: Mapping[str, Any]) -> str:
    """A point as it was written."""
    if "batch" in point:
        return str(Point(point["batch"], point["context"]))
    if "chunk" in point:
        return str(LongPrefill(point["prompt"], point["chunk"]))
    return str(ThroughputPoint(point["prompt"], point["output"]))


def table(result: Mapping[str, Any]) -> str:
    """All points of all settings as Markdown tables; a setting without points keeps one line in the first."""
    tables = []
    for group, columns in (
        ("points", COLUMNS),
        ("throughput", THROUGHPUT_COLUMNS),
        ("long_prefill", LONG_PREFILL_COLUMNS),
    ):
        rows = []
        for entry in result["settings"]:
            for point in entry[group] or ([{}] if group == "points" else []):
                rows.append({**entry, **point, "point": _name(point) if point else None})
        if not result.get("speculate"):
            columns = {name: form for name, form in columns.items() if name not in SPECULATION_COLUMNS}
        if rows:
            tables.append(format_table(columns, rows))
    return "\n\n".join(tables)
