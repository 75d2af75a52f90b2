"""The KV cache that a checkpoint asks for: schemes of llm-compressor and ModelOpt, and ModelOpt's list of layers.

vLLM takes such a scheme wherever the cache's dtype is left open. Here it is read so that it can be said, left out where
an unquantized cache is wanted, and, where it names layers, served in pairs of as many bits.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvtuner.pages.layout import UNQUANTIZED, PrecisionPair
from vllm_kvtuner.profile.pair import treatment
from vllm_kvtuner.profile.problems import Problems, show
from vllm_kvtuner.profile.profile import Profile

CHECKPOINT_FILES = ("config.json", "hf_quant_config.json")
"""Names of a model's files that may ask for a KV cache."""

LAYERS_KEY = "kv_cache_quantized_layers"
"""ModelOpt's key of the list of layers."""
SCHEMA_KEY, SCHEMA_VERSION = "kv_cache_schema_version", 1
_SCHEME_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo", LAYERS_KEY)
_ALGORITHMS = {
    "FP8": PrecisionPair(8, 8),
    "INT8": PrecisionPair(8, 8),
    "NVFP4": PrecisionPair(4, 4),
    "INT4": PrecisionPair(4, 4),
    "FP8_K_NVFP4_V": PrecisionPair(8, 4),
    "NONE": UNQUANTIZED,
}
"""ModelOpt's names of what a layer caches, and the pair of as many bits."""
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


@dataclass(frozen=True)
class CheckpointScheme:
    """What a checkpoint asks for its KV cache.

    Args:
        written: the keys that say so and their values.
    """

    written: Mapping[str, Any]

    def pairs(self, problems: Problems) -> PrecisionPair | dict[int, PrecisionPair]:
        """The pairs of as many bits, of all layers or of those that ModelOpt's list names, by their numbers.

        Args:
            problems: collects what no pair stands for.
        """
        version = self.written.get(SCHEMA_KEY, SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            problems.add(SCHEMA_KEY, f"must be {SCHEMA_VERSION}", show(version))
        if listed := self.written.get(LAYERS_KEY):
            return _listed_pairs(listed, problems)
        key, value = next((key, self.written[key]) for key in _SCHEME_KEYS if key in self.written)
        if isinstance(value, Mapping):  # as llm-compressor writes it
            bits = value.get("num_bits")
            pair = PrecisionPair(bits, bits) if bits in (4, 8) else None
            if pair is None:
                problems.add(f"{key}.num_bits", "must be 4 or 8", show(bits))
        else:
            pair = _ALGORITHMS.get(str(value).upper())
            if pair is None:
                problems.add(key, f"must be one of {', '.join(_ALGORITHMS)}", show(value))
        return pair or UNQUANTIZED

    @property
    def has_scales_per_head(self) -> bool:
        """Whether the checkpoint has a scale for every KV head of a layer, not one for all."""
        scheme = self.written.get("kv_cache_scheme")
        return isinstance(scheme, Mapping) and scheme.get("strategy") == "attn_head"

    def __str__(self) -> str:
        words = []
        for key, value in self.written.items():
            words.append(f"{key}={f'of {len(value)} layers' if key == LAYERS_KEY else show(value)}")
        return ", ".join(words)


def checkpoint_scheme(config: Any) -> CheckpointScheme | None:
    """What a model's configuration asks for the KV cache, or None.

    Args:
        config: transformers' object, or the mapping of a ``config.json`` or of a ``hf_quant_config.json``.
    """
    written: dict[str, Any] = {}
    for _, quantization in _quantizations(config):
        for part in (quantization, quantization.get("quantization")):
            if isinstance(part, Mapping):
                written |= {key: part[key] for key in (*_SCHEME_KEYS, SCHEMA_KEY) if part.get(key)}
    return CheckpointScheme(written) if any(key in written for key in _SCHEME_KEYS) else None


def without_scheme(config: Any) -> dict[str, Any]:
    """vLLM's ``hf_overrides`` with which it serves a checkpoint as if it asked for no KV cache; {} where it does not.

    Args:
        config: transformers' object or the mapping of a ``config.json``.
    """
    overrides: dict[str, Any] = {}
    for path, quantization in _quantizations(config):
        plain = _plain(quantization)
        if plain == quantization:
            continue
        inner: dict[str, Any] = overrides
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = plain
    return overrides


def _plain(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """With None for what asks for a KV cache: vLLM updates nested mappings key by key."""
    plain = {key: None if key in _SCHEME_KEYS else value for key, value in quantization.items()}
    if isinstance(nested := plain.get("quantization"), Mapping):
        plain["quantization"] = _plain(nested)
    return plain


def _quantizations(config: Any) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Where a configuration says how the checkpoint is quantized, and what it says there."""
    if isinstance(config, Mapping) and "quantization" in config:  # a hf_quant_config.json
        yield ("quantization_config",), config
    for owner in ((), ("text_config",)):
        found = config
        for name in owner:
            found = _get(found, name)
        for key in ("quantization_config", "compression_config"):
            value = _get(found, key)
            if value is not None and not isinstance(value, Mapping) and hasattr(value, "to_dict"):
                value = value.to_dict()
            if isinstance(value, Mapping):
                yield (*owner, key), value


def _get(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def checkpoint_profile(spec: str, path: Path) -> Profile:
    """The cache that a checkpoint asks for as a profile: pairs of as many bits, with all that needs no data.

    Layers that ModelOpt's list leaves out stay in the model's dtype.

    Args:
        spec: how the user wrote the file.
        path: one of ``CHECKPOINT_FILES``.

    Raises:
        ProfileError: no JSON, nothing asked for, or something that no pair stands for; all problems at once.
    """
    problems = Problems(spec)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.add("the file", "must be JSON", str(error))
        problems.raise_if_any()
    scheme = checkpoint_scheme(config)
    if scheme is None:
        rule = f"must ask for a KV cache ({', '.join(_SCHEME_KEYS)}) to be a profile"
        problems.add("the file", rule, "neither; a profile is a YAML file")
        problems.raise_if_any()
    assert scheme is not None
    pairs = scheme.pairs(problems)
    problems.raise_if_any()
    stored = [pairs] if isinstance(pairs, PrecisionPair) else list(pairs.values())
    least = min(stored, key=lambda pair: pair.nominal_bits)
    provenance = {"checkpoint": str(scheme)}
    return Profile(
        name=path.stem, source=path, pairs=pairs, others=UNQUANTIZED, adapts=True, provenance=provenance,
        **treatment(least),
    )  # fmt: skip


def _listed_pairs(listed: Mapping[str, Any], problems: Problems) -> dict[int, PrecisionPair]:
    """The pair of each layer of ModelOpt's list, ``{"model.layers.0.self_attn": {"quant_algo": "FP8"}}``."""
    pairs: dict[int, PrecisionPair] = {}
    for name, recipe in listed.items():
        key = f"{LAYERS_KEY}.{name}"
        numbers = _NUMBER.findall(name)
        algorithm = recipe.get("quant_algo") if isinstance(recipe, Mapping) else recipe
        pair = _ALGORITHMS.get(str(algorithm).upper())
        if pair is None:
            problems.add(key, f"must be one of {', '.join(_ALGORITHMS)}", show(algorithm))
        if len(numbers) != 1:
            problems.add(key, "must be the name of a layer with its number", show(name))
        elif int(numbers[0]) in pairs:
            problems.add(key, "must name a layer once", f"layer {numbers[0]} again")
        else:
            pairs[int(numbers[0])] = pair or UNQUANTIZED
    return pairs
