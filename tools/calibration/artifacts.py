"""What calibration's stages hand to one another: typed values, and the JSON files that hold them.

A file is strict: its ``schema`` names what it is, and unknown or missing keys are errors that name the file.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.layout import QUANTIZED_BITS, QUANTIZED_PAIRS, PrecisionPair
from vllm_kvtuner.profile.problems import Problems, show
from vllm_kvtuner.profile.profile import TRANSFORM_KEYS, RecentWindow, TransformSettings

SENSITIVITY_SCHEMA = "kvtuner-sensitivity/2"
STATICS_FILE = "statics.safetensors"
"""Name of the file with the static tensors in a calibration's output folder."""
PAIR_NAMES = tuple(pair.name for pair in QUANTIZED_PAIRS)
"""Names of the quantized pairs, the keys of ``LayerSensitivity.output_error``."""
KEY_BITS_NAMES = tuple(f"K{bits}" for bits in reversed(QUANTIZED_BITS))
"""``K8``, ``K4`` and ``K2``, the keys of ``LayerSensitivity.score_error``."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What one layer's precision costs it.

    Args:
        index: decoder layer.
        num_kv_heads: KV heads, before tensor parallelism.
        head_size: numbers per head.
        sliding_window: tokens a query sees, or None for full attention.
        transforms: what the layer does before it stores.
        output_error: relative error of the attention output per quantized pair; as what reads it counts it, where round
            feedback was chosen.
        score_error: relative error of the attention scores per key bits (``K8``, ``K4``, ``K2``).
        output_error_per_head: the same as ``output_error``, one number per KV head.
    """

    index: int
    num_kv_heads: int
    head_size: int
    sliding_window: int | None
    transforms: TransformSettings
    output_error: Mapping[str, float]
    score_error: Mapping[str, float]
    output_error_per_head: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class SensitivityTable:
    """Sensitivity of every layer that caches keys and values.

    Args:
        model: identity, as in a profile's ``model`` section.
        data: the text it was measured on: source, sha256, tokens.
        seed: seed of the sampling.
        versions: package -> version.
        layers: in the model's order.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    layers: tuple[LayerSensitivity, ...]

    def write(self, path: Path) -> None:
        """Write the file at once or not at all."""
        write_json(path, {"schema": SENSITIVITY_SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> "SensitivityTable":
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: the file cannot be read, is of another schema, or its keys, layers, pairs or numbers are not
                those of a sensitivity table; all problems at once.
        """
        problems = Problems(str(path))
        document = read_artifact(path, SENSITIVITY_SCHEMA, tuple(field.name for field in fields(cls)))
        raw_layers = document["layers"]
        for name, kind in (("model", dict), ("data", dict), ("seed", int), ("versions", dict), ("layers", list)):
            if not isinstance(document[name], kind):
                problems.add(name, f"must be a {kind.__name__}", show(document[name]))
        layers = [
            _read_layer(problems, position, raw)
            for position, raw in enumerate(raw_layers if isinstance(raw_layers, list) else ())
        ]
        indices = [layer.index for layer in layers if layer is not None]
        if not problems.lines and (not indices or indices != sorted(set(indices))):
            problems.add("layers", "must hold one entry per layer, in order", show(indices))
        problems.raise_if_any()
        return cls(**{**document, "layers": tuple(layer for layer in layers if layer is not None)})


@dataclass(frozen=True)
class Quality:
    """How near a setting is to the unquantized cache, teacher-forced on the same tokens.

    Args:
        kl_mean: mean KL divergence of the next token's distribution from the unquantized one, nats per token.
        kl_stderr: its standard error.
        kl_p99: its 99th percentile.
        top1_agreement: share of positions with the same most likely token.
        perplexity: exp of the mean negative log-likelihood.
        perplexity_reference: that of the unquantized cache.
        num_tokens: predicted positions.
    """

    kl_mean: float
    kl_stderr: float
    kl_p99: float
    top1_agreement: float
    perplexity: float
    perplexity_reference: float
    num_tokens: int


class Evaluator(Protocol):
    """Measures settings of the precision pairs on one model and one text."""

    def score(self, pairs: Mapping[int, PrecisionPair]) -> Quality:
        """Quality with these pairs, one for every layer that caches keys and values."""
        ...

    def score_tokens(self, pairs: Mapping[int, PrecisionPair]) -> tuple[Quality, np.ndarray]:
        """The same, and the KL of each predicted position, float32 [num_tokens]."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


def read_artifact(path: Path, schema: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The values of a JSON artifact with exactly ``keys`` beside its ``schema``.

    Raises:
        ValueError: not readable, not a JSON object, of another schema, or with other keys.
    """
    problems = Problems(str(path))
    document: Any = None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.add("the file", "must be readable", str(error.strerror))
    except ValueError as error:
        problems.add("the file", "must be JSON", str(error))
    problems.raise_if_any()
    if not isinstance(document, dict):
        problems.add("the file", "must hold a JSON object", show(document))
    elif document.get("schema") != schema:
        problems.add("schema", f"must be {schema!r}", show(document.get("schema")))
    else:
        check_exact_keys(problems, "the file", document, ("schema", *keys))
    problems.raise_if_any()
    return {key: document[key] for key in keys}


def check_exact_keys(problems: Problems, key: str, value: Any, keys: tuple[str, ...]) -> bool:
    """Report a value that is no mapping with exactly ``keys``; True if it is one."""
    before = len(problems.lines)
    if problems.check_keys(key, value, keys) and (missing := [name for name in keys if name not in value]):
        problems.add(key, f"must have the keys {', '.join(missing)}", "none")
    return len(problems.lines) == before


def plain_window(window: RecentWindow | None) -> dict[str, int]:
    """A recent window as JSON's types, by the keys that profiles know; :func:`read_window` reads it back."""
    return {**unquantized_tokens(window), "recent_window_bits": 16 if window is None else window.bits}


def unquantized_tokens(window: RecentWindow | None) -> dict[str, int]:
    """What captured attention depends on of a recent window: errors count its rows as exact, whatever its bits."""
    if window is None:
        return {"recent_window": 0, "sink_tokens": 0}
    return {"recent_window": window.tokens, "sink_tokens": window.sink_tokens}


def read_window(plain: Mapping[str, Any]) -> RecentWindow | None:
    """The recent window of what :func:`plain_window` gave, other keys aside; None for one of no tokens."""
    if not plain["recent_window"]:
        return None
    return RecentWindow(plain["recent_window"], plain["recent_window_bits"], plain["sink_tokens"])


def digest(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON: the same for the same plain values, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_statics(path: Path) -> bytes:
    """A statics file with its header in sorted order: safetensors writes metadata in another order every time, and what
    follows from the file must not depend on that."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + data[size:]


def _read_layer(problems: Problems, position: int, raw: Any) -> LayerSensitivity | None:
    key = f"layers[{position}]"
    if not check_exact_keys(problems, key, raw, tuple(field.name for field in fields(LayerSensitivity))):
        return None
    before = len(problems.lines)
    for name in ("index", "num_kv_heads", "head_size", "sliding_window"):
        least = 0 if name == "index" else 1
        value = raw[name]
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not is_count and not (name == "sliding_window" and value is None):
            problems.add(f"{key}.{name}", f"must be an integer of at least {least}", show(value))
    if check_exact_keys(problems, f"{key}.transforms", raw["transforms"], TRANSFORM_KEYS):
        for name, value in raw["transforms"].items():
            if not isinstance(value, bool):
                problems.add(f"{key}.transforms.{name}", "must be true or false", show(value))
    _check_errors(problems, f"{key}.output_error", raw["output_error"], PAIR_NAMES, _is_error)
    _check_errors(problems, f"{key}.score_error", raw["score_error"], KEY_BITS_NAMES, _is_error)
    num_kv_heads = raw["num_kv_heads"]
    per_head = raw["output_error_per_head"]
    _check_errors(
        problems,
        f"{key}.output_error_per_head",
        per_head,
        PAIR_NAMES,
        lambda heads: isinstance(heads, list) and len(heads) == num_kv_heads and all(map(_is_error, heads)),
    )
    if len(problems.lines) > before:
        return None
    return LayerSensitivity(
        **{
            **raw,
            "transforms": TransformSettings(**raw["transforms"]),
            "output_error_per_head": {pair: tuple(heads) for pair, heads in per_head.items()},
        }
    )


def _check_errors(
    problems: Problems, key: str, raw: Any, names: tuple[str, ...], is_valid: Callable[[Any], bool]
) -> None:
    if not check_exact_keys(problems, key, raw, names):
        return
    for name, value in raw.items():
        if not is_valid(value):
            problems.add(f"{key}.{name}", "must be a finite error of at least 0 (one per KV head)", show(value))


def _is_error(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
