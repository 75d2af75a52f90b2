"""Files and tables of measurements."""

import json
import os
from pathlib import Path

import pytest

from kvtuner_tools.results import format_table, write_json

VOCABULARY = 37


def test_write_json_replaces_whole_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    for broken in ({"a": object()}, {"a": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, broken)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": 2})

    assert json.loads(path.read_text()) == {"a": 1}
    assert [item.name for item in path.parent.iterdir()] == ["result.json"]


def test_table() -> None:
    text = format_table(
        {"name": "label:", "KL": "kl:.3f"}, [{"label": "auto", "kl": 0.12345}, {"label": "f", "kl": None}]
    )

    assert text.splitlines() == ["| name |    KL |", "| ---- | ----: |", "| auto | 0.123 |", "| f    |     - |"]
