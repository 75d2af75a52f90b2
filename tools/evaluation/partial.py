"""The file that keeps what an evaluation has done, so that a killed run can go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtuner_tools.results import write_json


class Done:
    """The rows that are done, in a file if there is one.

    Args:
        path: the file, or None.
        head: what the rows rest on; rows of a file with another head do not count.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path = path
        self._head = {key: value for key, value in head.items() if key != "created"}
        self._rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["head"] == self._head:
                self._rows = found["rows"]

    def row(self, label: str, sha256: str | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a setting, from the file or measured now."""
        for row in self._rows:
            if row["label"] == label and row["profile_sha256"] == sha256:
                return row
        self._rows.append(measure())
        if self._path is not None:
            write_json(self._path, {"head": self._head, "rows": self._rows})
        return self._rows[-1]

    def delete(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
