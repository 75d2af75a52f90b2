"""The results that are published: files of ``docs/benchmarks/data`` by name, and the numbers in them."""

import hashlib
import json
import os
from collections.abc import Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from kvtuner_tools.bench.kernel_entries import query_tokens_of
from vllm_kvtuner.profile.shipped import EARLIER_NAMES, REPLACED

AUTO, FP8, KVTUNER = "auto", "fp8", "kvtuner:llama31_3.25bit"
"""Labels of the settings that the engine tables compare."""
LLAMA_LAYER = "32/8/128"
"""Query heads, KV heads and head size of Llama-3.1-8B's layers, which most kernel tables are of."""


class Published:
    """The data folder of one checkout.

    Args:
        root: the repository's root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "docs" / "benchmarks" / "data"

    @cached_property
    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in sorted(self.folder.glob("????-??-??_*.json")):
            name = path.stem.partition("_")[2]
            if name in files:
                raise ValueError(f"{self.folder}: {name} must be one file, but got {files[name].name} and {path.name}")
            files[name] = path
        return files

    @cached_property
    def _results(self) -> dict[str, dict[str, Any]]:
        return {name: json.loads(path.read_text()) for name, path in self._files.items()}

    def names(self) -> list[str]:
        """Names of all results: the files' without date and suffix."""
        return list(self._files)

    def result(self, name: str) -> dict[str, Any]:
        """A whole result by its file's name without date and suffix.

        Raises:
            KeyError: no such file.
        """
        return self._results[name]

    def file(self, name: str) -> Path:
        """A result's file."""
        return self._files[name]

    def sha256(self, name: str) -> str:
        """Hash of a result's file, in hexadecimal."""
        return hashlib.sha256(self._files[name].read_bytes()).hexdigest()

    def source(self, page: Path, *names: str) -> str:
        """Where a table's numbers come from: card, vLLM's version, date and files, linked from ``page``."""
        parts: dict[str, list[str]] = {}
        for name in names:
            result = self.result(name)
            evaluations = result.get("evaluations", [result])
            dates = sorted({entry["created"][:10] for entry in evaluations})
            date = " to ".join(dict.fromkeys((dates[0], dates[-1])))
            path = self._files[name]
            text = f"{evaluations[0]['device']}, vLLM {evaluations[0]['versions']['vllm']}, {date}"
            parts.setdefault(text, []).append(f"[{path.name}]({os.path.relpath(path, page.parent)})")
        # A link a line, which keeps lines narrow.
        return "\n".join(f"{text}:\n" + ",\n".join(links) + "." for text, links in parts.items())

    def setting(self, name: str, label: str) -> dict[str, Any]:
        """A setting of an engine benchmark by its label."""
        return only(entry for entry in self.result(name)["settings"] if entry["label"] == label)

    def point(self, name: str, label: str, batch: int, context: int) -> dict[str, Any]:
        """A setting's decode point."""
        points = self.setting(name, label)["points"]
        return only(entry for entry in points if (entry["batch"], entry["context"]) == (batch, context))

    def throughput(self, name: str, label: str, prompt: int = 4096) -> dict[str, Any]:
        """A setting's closed loop with prompts of that length."""
        return only(entry for entry in self.setting(name, label)["throughput"] if entry["prompt"] == prompt)

    def kernel(self, name: str, part: str = "decode", **keys: Any) -> dict[str, Any]:
        """A case of a kernel benchmark, such as ``kernel("kernel_h200", format="K4V4", point="64x8192")``.

        Unless given, ``implementation`` is ``cuda``, ``shape`` Llama's layer, ``block_size`` 16, ``transforms`` none;
        and ``query_tokens``, where there are queries, ``"1"``.
        """
        defaults = {"implementation": "cuda", "shape": LLAMA_LAYER, "block_size": 16, "transforms": "none"}
        if part in ("decode", "layer"):
            defaults["query_tokens"] = "1"
        wanted = defaults | keys
        entries = ({**entry, "query_tokens": query_tokens_of(entry)} for entry in self.result(name)[part])
        return only(entry for entry in entries if all(entry.get(key) == value for key, value in wanted.items()))

    def evaluation(self, model: str, name: str) -> dict[str, Any]:
        """One evaluation of a model by its name in the model's file."""
        evaluations = self.result(f"evaluate_{model}_h200")["evaluations"]
        return only(entry for entry in evaluations if entry["name"] == name)

    def score(self, model: str, evaluation: str, label: str | None = None) -> dict[str, Any]:
        """A setting of an evaluation by the end of its label; without one the only setting."""
        settings = self.evaluation(model, evaluation)["settings"]
        return only(entry for entry in settings if label is None or entry["label"].endswith(label))

    def profile(self, name: str) -> dict[str, Any]:
        """A shipped profile's provenance; the name may be an earlier one, as data of its time have it.

        Of profiles that have left, the held-out scores are data.
        """
        if name in (left := self.result("heldout_h200")["profiles"]):
            return left[name]
        path = self.root / "precision_profiles" / f"{shipped_name(name)}.yaml"
        return yaml.safe_load(path.read_text())["provenance"]


def shipped_name(name: str) -> str:
    """What a profile that data name is called now."""
    return EARLIER_NAMES.get(name, name)


def profile_label(name: str) -> str:
    """How a table names a profile, by any name of its: in code if it is shipped."""
    return f"{name}, no longer shipped" if name in REPLACED else f"`{shipped_name(name)}`"


def only(entries: Any) -> dict[str, Any]:
    """The one entry that there must be.

    Raises:
        ValueError: none or several.
    """
    found = list(entries)
    if len(found) != 1:
        raise ValueError(f"data must have this exactly once, but got it {len(found)} times")
    return found[0]


def fixed(value: float, digits: int = 0) -> str:
    """A number with that many digits after the point, halves rounded to even, thousands apart.

    The decimal number that the JSON has is rounded, not its binary neighbour.
    """
    rounded = Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_EVEN)
    return f"{rounded + 0:,}"  # + 0 takes the sign off a negative zero


def loss(value: float | None) -> str:
    """A KL divergence in nats per token, to about three digits; a dash where it was not measured."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return fixed(value, 4 if value < 0.1 else 3 if value < 1 else 2)


def accuracy(score: Mapping[str, Any]) -> str:
    """A task's accuracy with its standard error; a dash where it was not measured."""
    if score.get("task_accuracy") is None:
        return "-"
    return f"{fixed(score['task_accuracy'], 3)} ± {fixed(score['task_stderr'], 3)}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the first column aligned left, the others right."""
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"a row must have {len(heads)} cells, but got {row}")
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [heads, rule, *rows])
