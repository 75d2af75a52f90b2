"""Precision profiles: which precision pair each layer of a model stores, read from YAML and checked against a model.

A profile file::

    version: 1
    model:                      # may be left out; then layers are checked when the profile meets a model
      name: meta-llama/Llama-3.1-8B-Instruct
      architecture: LlamaForCausalLM
      num_layers: 32
      num_kv_heads: 8           # or one number per layer, as head_size; 0 for a layer without keys and values
      head_size: 128
      weights: 0f3a59c7de21b684 # may be left out: a digest (profile/weights.py) of the only weights it is for, or any
    layers:                     # or one pair for all layers, `layers: K8V4`
      0: K8V4
      1-30: K4V2
      31: K4V4                  # `4, 8, 12-14: K4V2` works too
    transforms:                 # all false where left out
      value_hadamard: true
      overrides:
        0-3: {value_hadamard: false}
    recent_window: 64           # newest tokens of a request that are read in 16 bits; 0 where left out
    recent_window_bits: 16      # or 8
    recent_window_overrides: {0-3: 128, 30-31: 0}
    sink_tokens: 4              # a request's first tokens, which layers with a window read in its bits too
    statics: llama.statics.safetensors   # beside the profile; key_offset, key_equalization and round feedback read it
    attend_cached_prefill: false
    provenance: {}              # how it was made: any plain values

A pair alone (``K8V4``) is a uniform profile with the treatment of profile/pair.py, ``K8V4:plain`` one without.
A checkpoint's ``config.json`` or ``hf_quant_config.json`` is the cache that it asks for, in pairs (checkpoint.py).
``{0: {nbits_key: 8, nbits_value: 4}, ...}``, the preset format of KVTuner's reference implementation, is read as it is.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_kvtuner.pages.layout import BITS, RECENT_BITS, UNQUANTIZED, PrecisionPair
from vllm_kvtuner.profile.checkpoint import CHECKPOINT_FILES, checkpoint_profile
from vllm_kvtuner.profile.hub import FORM, fetch_profile, is_hub_spec
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.pair import is_pair, pair_profile
from vllm_kvtuner.profile.problems import (
    MAX_LAYERS,
    Problems,
    ProfileError,
    UnknownProfileError,
    expand_layers,
    format_layers,
    read_yaml,
    show,
    suggest,
)
from vllm_kvtuner.profile.profile import (
    FROM_WEIGHTS,
    MAX_RECENT_WINDOW,
    MAX_SINK_TOKENS,
    SCHEMA_VERSION,
    SINK_TOKENS_WITHOUT_WINDOW,
    STATIC_TRANSFORMS,
    TRANSFORM_KEYS,
    WEIGHT_TRANSFORMS,
    LayerPrecision,
    Profile,
    RecentWindow,
    ResolvedProfile,
    TransformSettings,
)
from vllm_kvtuner.profile.shipped import REPLACED, find_shipped, shipped_profiles
from vllm_kvtuner.profile.weights import ANY_WEIGHTS, DIGEST

AUTO = "auto"
"""The spec, with or without a budget behind a colon, for what is best for a model (profile/auto.py)."""

__all__ = [
    "LayerPrecision",
    "LayerShape",
    "ModelShape",
    "Profile",
    "ProfileError",
    "RecentWindow",
    "ResolvedProfile",
    "TransformSettings",
    "load_profile",
    "shipped_profiles",
]

_KEYS = (
    "version",
    "model",
    "layers",
    "transforms",
    "recent_window",
    "recent_window_bits",
    "recent_window_overrides",
    "sink_tokens",
    "statics",
    "attend_cached_prefill",
    "provenance",
)
_MODEL_KEYS = ("name", "architecture", "num_layers", "num_kv_heads", "head_size", "weights")
_PRESET_KEYS = ("nbits_key", "nbits_value")


def load_profile(spec: str) -> Profile:
    """Read a profile.

    Args:
        spec: a path, the bare name of a shipped profile with or without ``.yaml``, a pair such as ``K8V4``, the bare
            format of one, ``K8V4:plain``, or ``hf://ORG/REPO[@REVISION][/FILE.yaml]``.

    Raises:
        ProfileError: everything that is wrong with the file; UnknownProfileError where there is none.
    """
    if is_pair(spec):
        return pair_profile(spec)
    if spec.partition(":")[0].lower() == AUTO and not os.path.isfile(spec):
        raise ProfileError([f"{spec}: profile must be looked for with a model (--model), but got none"])
    path = fetch_profile(spec).path if is_hub_spec(spec) else Path(spec)
    if not os.path.isfile(path):  # False for names that no file can have, where Path.is_file raises
        shipped = find_shipped(spec)
        if shipped is None and (better := REPLACED.get(spec.removesuffix(".yaml"))) is not None:
            got = f"one that has left: {better} has less loss in no more bits"
            raise UnknownProfileError([f"{spec}: profile must be one that is still shipped, but got {got}"])
        if shipped is None:
            rule = "must be a file, a pair such as K8V4, or the name of a shipped profile (kvtuner profile list)"
            rule += f" or of one on the hub ({FORM})"
            names = [each.stem for each in shipped_profiles().values()]
            got = "a folder" if os.path.isdir(path) else "no such file" + suggest(path.stem, names)
            raise UnknownProfileError([f"{spec}: profile {rule}, but got {got}"])
        path = shipped
    if path.name in CHECKPOINT_FILES:
        return checkpoint_profile(spec, path)
    document = read_yaml(path, spec)
    problems = Problems(spec)
    is_preset = document and all(re.fullmatch("[0-9]+", str(key)) for key in document)
    profile = (_parse_preset if is_preset else _parse)(problems, document, path)
    problems.raise_if_any()
    return profile


def _parse(problems: Problems, document: Mapping[Any, Any], path: Path) -> Profile:
    problems.check_keys("profile", document, _KEYS)
    version = document.get("version")
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        problems.add("version", f"must be {SCHEMA_VERSION}", show(version) if "version" in document else "none")
    model = _parse_model(problems, document["model"]) if "model" in document else None
    num_layers = None if model is None else len(model.layers) or None
    pairs = _parse_pairs(problems, document.get("layers"), model)
    transforms, overrides = _parse_transforms(problems, document.get("transforms", {}), num_layers)
    window, window_bits, window_overrides, sink_tokens = _parse_recent(problems, document, num_layers)

    statics = document.get("statics")
    if statics is not None:
        if not isinstance(statics, str):
            problems.add("statics", "must name a safetensors file", show(statics))
        elif not os.path.isfile(path.parent / statics):
            problems.add("statics", "must name a file (relative to the profile)", f"{statics!r}, which is not there")
    elif needing := _layers_needing_statics(pairs, transforms, overrides):
        rule = (
            f"must name a safetensors file where {', '.join(STATIC_TRANSFORMS[:-1])} or {STATIC_TRANSFORMS[-1]} is true"
        )
        problems.add("statics", rule, f"none, needed for {needing}")

    attend = document.get("attend_cached_prefill", False)
    if not isinstance(attend, bool):
        problems.add("attend_cached_prefill", "must be true or false", show(attend))
    provenance = document.get("provenance", {})
    if not isinstance(provenance, Mapping):
        problems.add("provenance", "must be a mapping", show(provenance))
    return Profile(
        name=path.stem,
        source=path,
        model=model,
        weights=_parse_weights(problems, document.get("model")),
        pairs=pairs,
        transforms=transforms,
        transform_overrides=overrides,
        recent_window=window,
        recent_window_bits=window_bits,
        recent_window_overrides=window_overrides,
        sink_tokens=sink_tokens,
        attend_cached_prefill=attend,
        statics=path.parent / statics if isinstance(statics, str) else None,
        provenance=provenance,
    )


def _parse_model(problems: Problems, raw: Any) -> ModelShape | None:
    if not problems.check_keys("model", raw, _MODEL_KEYS):
        return None
    before = len(problems.lines)

    def read(key: str, rule: str, is_valid: Callable[[Any], bool]) -> Any:
        if key not in raw:
            problems.add(f"model.{key}", "must be given", "none")
        elif not is_valid(raw[key]):
            problems.add(f"model.{key}", rule, show(raw[key]))
        return raw.get(key)

    def is_count(value: Any, least: int, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    def is_per_layer(value: Any) -> bool:
        if not isinstance(value, list):
            return is_count(value, 1, MAX_LAYERS)
        return len(value) == num_layers and any(value) and all(is_count(each, 0, MAX_LAYERS) for each in value)

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and bool(value)

    name = read("name", "must be the model's name", is_text)
    architecture = read("architecture", "must be the first architecture in the model's config", is_text)
    num_layers = read("num_layers", f"must be an integer of 1-{MAX_LAYERS}", lambda n: is_count(n, 1, MAX_LAYERS))
    if not is_count(num_layers, 1, MAX_LAYERS):
        return None
    rule = f"must be a positive integer up to {MAX_LAYERS}, or a list of {num_layers} (0 where a layer caches nothing)"
    num_kv_heads, head_size = read("num_kv_heads", rule, is_per_layer), read("head_size", rule, is_per_layer)
    if len(problems.lines) > before:
        # The layer count is known, so that layers can still be checked.
        return ModelShape(str(name), str(architecture), (LayerShape(1, 1),) * num_layers)
    heads = num_kv_heads if isinstance(num_kv_heads, list) else [num_kv_heads] * num_layers
    sizes = head_size if isinstance(head_size, list) else [head_size] * num_layers
    if empty := [layer for layer in range(num_layers) if heads[layer] and not sizes[layer]]:
        problems.add("model.head_size", "must be positive where a layer has KV heads", f"0 for {format_layers(empty)}")
    return ModelShape(name, architecture, tuple(LayerShape(*shape) for shape in zip(heads, sizes, strict=True)))


def _parse_weights(problems: Problems, raw: Any) -> str | None:
    """The digest of the only weights that the profile is for, if it gives one."""
    if not isinstance(raw, Mapping) or "weights" not in raw:
        return None
    value = raw["weights"]
    if isinstance(value, str) and (value == ANY_WEIGHTS or DIGEST.fullmatch(value)):
        return value
    problems.add("model.weights", f"must be 16 hexadecimal digits, in quotes, or {ANY_WEIGHTS}", show(value))
    return None


def _parse_pairs(problems: Problems, raw: Any, model: ModelShape | None) -> Mapping[int, PrecisionPair] | PrecisionPair:
    if isinstance(raw, str):
        try:
            return PrecisionPair.parse(raw)
        except ValueError as error:
            problems.lines.append(f"{problems.source}: layers: {error}")
            return UNQUANTIZED
    if not isinstance(raw, Mapping) or not raw:
        rule = "must be a pair such as K8V4 or a mapping from layers to pairs such as 1-31: K4V2"
        problems.add("layers", rule, "none" if raw is None else show(raw))
        return UNQUANTIZED
    pairs = {}
    for key, value in raw.items():
        try:
            pairs[str(key)] = PrecisionPair.parse(value)
        except ValueError as error:
            problems.lines.append(f"{problems.source}: layers.{key}: {error}")
    written = expand_layers(problems, "layers", raw, None if model is None else len(model.layers))
    required = range(max(written, default=-1) + 1) if model is None else model.attention_layers
    if missing := [layer for layer in required if layer not in written]:
        problems.add("layers", "must give every layer a pair", f"none for {format_layers(missing)}")
    return {layer: pairs[key] for layer, (key, _) in sorted(written.items()) if key in pairs}


def _parse_transforms(
    problems: Problems, raw: Any, num_layers: int | None
) -> tuple[TransformSettings, dict[int, TransformSettings]]:
    key = "transforms"
    if not problems.check_keys(key, raw, (*TRANSFORM_KEYS, "overrides")):
        return TransformSettings(), {}
    default = _read_switches(problems, key, raw)
    _check_feedback(problems, key, default)
    overrides = raw.get("overrides", {})
    key = "transforms.overrides"
    if not isinstance(overrides, Mapping):
        problems.add(key, "must be a mapping from layers to transforms", show(overrides))
        overrides = {}
    switches = {}
    for written, value in overrides.items():
        if problems.check_keys(f"{key}.{written}", value, TRANSFORM_KEYS):
            switches[str(written)] = {**default, **_read_switches(problems, f"{key}.{written}", value)}
            if value.keys() & {"key_hadamard", "key_round_feedback"}:  # else the default's problem is told already
                _check_feedback(problems, f"{key}.{written}", switches[str(written)])
    expanded = expand_layers(problems, key, overrides, num_layers)
    settings = {
        layer: TransformSettings(**switches[written]) for layer, (written, _) in expanded.items() if written in switches
    }
    return TransformSettings(**default), settings


def _read_switches(problems: Problems, key: str, raw: Mapping[Any, Any]) -> dict[str, Any]:
    switches = {name: raw[name] for name in TRANSFORM_KEYS if name in raw}
    for name, value in switches.items():
        may_follow = name in WEIGHT_TRANSFORMS
        if not isinstance(value, bool) and not (may_follow and value == FROM_WEIGHTS):
            rule = f"must be true, false or {FROM_WEIGHTS}" if may_follow else "must be true or false"
            problems.add(f"{key}.{name}", rule, show(value))
            switches[name] = False
    return switches


def _check_feedback(problems: Problems, key: str, switches: Mapping[str, Any]) -> None:
    if switches.get("key_round_feedback") == FROM_WEIGHTS and not switches.get("key_hadamard"):
        rule = "must be true or false without key_hadamard, by which the channels that weights weigh come together"
        problems.add(f"{key}.key_round_feedback", rule, FROM_WEIGHTS)


def _parse_recent(
    problems: Problems, document: Mapping[Any, Any], num_layers: int | None
) -> tuple[int, int, dict[int, int], int]:
    """Tokens, bits, tokens of single layers, and sink tokens."""

    def tokens(key: str, value: Any, most: int = MAX_RECENT_WINDOW) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
            return value
        problems.add(key, f"must be an integer of 0-{most} tokens", show(value))
        return 0

    window = tokens("recent_window", document.get("recent_window", 0))
    bits = document.get("recent_window_bits", 16)
    if not isinstance(bits, int) or bits not in RECENT_BITS:
        problems.add("recent_window_bits", f"must be one of {RECENT_BITS}", show(bits))
        bits = 16
    key, overrides = "recent_window_overrides", document.get("recent_window_overrides", {})
    if not isinstance(overrides, Mapping):
        problems.add(key, "must be a mapping from layers to tokens such as 0-3: 128", show(overrides))
        overrides = {}
    counts = {str(written): tokens(f"{key}.{written}", value) for written, value in overrides.items()}
    expanded = expand_layers(problems, key, overrides, num_layers)
    sink_tokens = tokens("sink_tokens", document.get("sink_tokens", 0), MAX_SINK_TOKENS)
    if sink_tokens and not document.get("recent_window") and not any(counts.values()):
        problems.add("sink_tokens", SINK_TOKENS_WITHOUT_WINDOW, str(sink_tokens))
    return window, bits, {layer: counts[written] for layer, (written, _) in expanded.items()}, sink_tokens


def _layers_needing_statics(
    pairs: Mapping[int, PrecisionPair] | PrecisionPair,
    transforms: TransformSettings,
    overrides: Mapping[int, TransformSettings],
) -> str | None:
    if isinstance(pairs, PrecisionPair):
        settings = (transforms, *overrides.values())
        return "the quantized layers" if any(each.at(pairs).needs_statics for each in settings) else None
    layers = [layer for layer, pair in pairs.items() if overrides.get(layer, transforms).at(pair).needs_statics]
    return f"layers {format_layers(layers)}" if layers else None


def _parse_preset(problems: Problems, document: Mapping[Any, Any], path: Path) -> Profile:
    """The reference implementation's ``{layer: {nbits_key, nbits_value}}``, keys numbers or digits in quotes."""
    pairs = {}
    layers = expand_layers(problems, "layers", document, None)
    for layer, (written, raw) in layers.items():
        if not problems.check_keys(f"layers.{written}", raw, _PRESET_KEYS):
            continue
        bits = [raw.get(key) for key in _PRESET_KEYS]
        wrong = [isinstance(value, bool) or value not in BITS for value in bits]
        for key, value, is_wrong in zip(_PRESET_KEYS, bits, wrong, strict=True):
            if is_wrong:
                problems.add(f"layers.{written}.{key}", f"must be one of {BITS}", show(value) if key in raw else "none")
        if not any(wrong):
            try:
                pairs[layer] = PrecisionPair(*bits)
            except ValueError as error:
                problems.lines.append(f"{problems.source}: layers.{written}: {error}")
    if missing := set(range(max(layers, default=-1) + 1)) - set(layers):
        problems.add("layers", "must give every layer a pair", f"none for {format_layers(missing)}")
    return Profile(name=path.stem, source=path, pairs=dict(sorted(pairs.items())))
