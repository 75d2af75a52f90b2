"""What a precision profile says, and how it meets a model."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vllm_kvtuner.pages.layout import (
    BLOCK_SIZE_MULTIPLE,
    FEEDBACK_BITS,
    RECENT_BITS,
    UNQUANTIZED,
    PrecisionPair,
    content_bytes,
    mean_bits,
    unsupported_head_size,
)
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import Problems, format_layers
from vllm_kvtuner.profile.weights import ANY_WEIGHTS

SCHEMA_VERSION = 1
"""Version of the YAML schema that this package reads."""
FROM_WEIGHTS = "from_weights"
"""Value of a transform that takes it from the loaded projections instead of from statics."""


@dataclass(frozen=True)
class TransformSettings:
    """Which key and value transforms a layer uses; K16V16 layers use none.

    Args:
        key_offset: subtract a rotated static offset before quantizing keys: one from statics, or, as FROM_WEIGHTS, the
            k projection's bias.
        key_equalization: divide keys by a static factor per RoPE pair (statics).
        key_hadamard: rotate keys over head_size.
        value_hadamard: rotate values over head_size.
        range_search: choose each row's range by squared error.
        key_round_feedback: round each number of a key with regard to the errors of those before it: by statics, or, as
            FROM_WEIGHTS, by what the q projection reads.
        value_round_feedback: likewise for values.
    """

    key_offset: bool | str = False
    key_equalization: bool = False
    key_hadamard: bool = False
    value_hadamard: bool = False
    range_search: bool = False
    key_round_feedback: bool | str = False
    value_round_feedback: bool = False

    @property
    def needs_statics(self) -> bool:
        """Whether some of them read the statics file."""
        return any(getattr(self, name) is True for name in STATIC_TRANSFORMS)

    @property
    def needs_model(self) -> bool:
        """Whether some of them are complete only once the model is loaded."""
        return self.needs_statics or self.follows_weights

    @property
    def follows_weights(self) -> bool:
        """Whether some of them are made of the model's weights."""
        return any(getattr(self, name) == FROM_WEIGHTS for name in WEIGHT_TRANSFORMS)

    def at(self, pair: PrecisionPair) -> "TransformSettings":
        """What of them a layer of that pair does: none in 16 bits, and round feedback in few bits alone."""
        if not pair.is_quantized:
            return TransformSettings()
        return replace(
            self,
            key_round_feedback=self.key_round_feedback if pair.k_bits in FEEDBACK_BITS else False,
            value_round_feedback=self.value_round_feedback and pair.v_bits in FEEDBACK_BITS,
        )

    @property
    def described(self) -> str:
        """What is on, in words for a line of a log."""
        words = [f"{name} from weights" if getattr(self, name) == FROM_WEIGHTS else name for name in self.names]
        return ", ".join(words) or "no transforms"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the transforms that are on."""
        return tuple(name for name in TRANSFORM_KEYS if getattr(self, name))


TRANSFORM_KEYS = tuple(field.name for field in fields(TransformSettings))
"""Names of the transforms, in the order they are applied."""
STATIC_TRANSFORMS = ("key_offset", "key_equalization", "key_round_feedback", "value_round_feedback")
"""Those of them that read statics."""
WEIGHT_TRANSFORMS = ("key_offset", "key_round_feedback")
"""Those of them that can be made of weights alone."""

MAX_RECENT_WINDOW = 4096
"""Longest recent window, in tokens."""
MAX_SINK_TOKENS = BLOCK_SIZE_MULTIPLE
"""Most sink tokens: what one block of a recent window holds, however small its blocks are."""
SINK_TOKENS_WITHOUT_WINDOW = "must be 0 without a recent_window, whose cache holds them"
"""The rule that sink tokens alone break."""


@dataclass(frozen=True)
class RecentWindow:
    """The newest tokens of a request, which attention reads from a second cache instead of from the packed pages.

    Args:
        tokens: how many, the query itself included.
        bits: 16, rows of the model's dtype without transforms, or 8, K8V8 with the layer's transforms.
        sink_tokens: tokens at the request's head that are read from there too.
    """

    tokens: int
    bits: int = 16
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        assert self.tokens > 0 and self.bits in RECENT_BITS and 0 <= self.sink_tokens <= MAX_SINK_TOKENS, self

    @property
    def pair(self) -> PrecisionPair:
        return PrecisionPair(self.bits, self.bits)

    def __str__(self) -> str:
        sink_tokens = f" and the first {self.sink_tokens}" if self.sink_tokens else ""
        return f"{self.tokens} tokens{sink_tokens} in {self.bits} bits"


@dataclass(frozen=True)
class LayerPrecision:
    """What one layer stores.

    Args:
        index: decoder layer.
        pair: bits of its keys and values.
        shape: KV heads (before tensor parallelism) and head size.
        transforms: what it does before storing, only what its pair makes use of.
        recent: its recent window; None for K16V16.
    """

    index: int
    pair: PrecisionPair
    shape: LayerShape
    transforms: TransformSettings
    recent: RecentWindow | None = None

    @property
    def recent_content_bytes(self) -> int:
        """Bytes one token of the recent window takes in one KV head."""
        return 0 if self.recent is None else content_bytes(self.recent.pair, self.shape.head_size)

    @property
    def recent_bytes(self) -> int:
        """Bytes the recent window of one request takes over all KV heads, sink tokens included."""
        tokens = 0 if self.recent is None else self.recent.tokens + self.recent.sink_tokens
        return tokens * self.shape.num_kv_heads * self.recent_content_bytes


@dataclass(frozen=True)
class Profile:
    """A precision profile as its file gives it.

    Args:
        name: the file's stem, or the pair.
        source: the file; None for a pair.
        schema_version: version of the YAML schema.
        model: the model it was made for, if the file says so; its ``unsupported`` is empty.
        weights: digest of that model's weights, or ``any``, if the file says so (profile/weights.py).
        pairs: the pair of each layer, or one for all.
        transforms: transforms of every layer without an override.
        transform_overrides: transforms of single layers.
        recent_window: tokens of the recent window of every layer without an override; 0 for none.
        recent_window_bits: bits of all recent windows.
        recent_window_overrides: tokens of the recent window of single layers.
        sink_tokens: tokens at a request's head that every recent window holds beside the newest.
        attend_cached_prefill: prefill attends to what it stored, not to the fresh keys and values.
        statics: safetensors file with the static tensors, if given.
        provenance: how the profile was made; plain values.
        adapts: what a model or an engine does not serve of the transforms and windows is left out, not refused.
        others: the pair of layers that ``pairs`` does not name; None where it must name all.
        left_out: of a profile that adapts, what was left out and why, each in a few words.
    """

    name: str
    source: Path | None
    pairs: Mapping[int, PrecisionPair] | PrecisionPair
    schema_version: int = SCHEMA_VERSION
    model: ModelShape | None = None
    weights: str | None = None
    transforms: TransformSettings = TransformSettings()
    transform_overrides: Mapping[int, TransformSettings] = field(default_factory=dict)
    recent_window: int = 0
    recent_window_bits: int = 16
    recent_window_overrides: Mapping[int, int] = field(default_factory=dict)
    sink_tokens: int = 0
    attend_cached_prefill: bool = False
    statics: Path | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    adapts: bool = False
    others: PrecisionPair | None = None
    left_out: tuple[str, ...] = ()

    def weights_problem(self, weights: str | None) -> str | None:
        """Why it is not for weights of this digest, None for unknown ones; None where it may be."""
        if weights is None or self.weights in (None, ANY_WEIGHTS, weights):
            return None
        return f"model.weights must be those of the model, {weights}, or {ANY_WEIGHTS}, but got {self.weights}"

    @property
    def nominal_bits(self) -> float:
        """Mean nominal bits over the layers named, each counted once (the paper's number); needs no model."""
        pairs = [self.pairs] if isinstance(self.pairs, PrecisionPair) else list(self.pairs.values())
        return float(sum(pair.nominal_bits for pair in pairs) / len(pairs))

    def pair_of(self, layer: int) -> PrecisionPair | None:
        return self.pairs if isinstance(self.pairs, PrecisionPair) else self.pairs.get(layer, self.others)

    @property
    def keeps_layers_unquantized(self) -> bool:
        """Whether some layer stays with vLLM's own cache."""
        named = self.pairs.values() if isinstance(self.pairs, Mapping) else (self.pairs,)
        return any(not pair.is_quantized for pair in (*named, *([self.others] if self.others else ())))

    def transforms_of(self, layer: int) -> TransformSettings:
        return self.transform_overrides.get(layer, self.transforms)

    def recent_of(self, layer: int) -> RecentWindow | None:
        tokens = self.recent_window_overrides.get(layer, self.recent_window)
        return RecentWindow(tokens, self.recent_window_bits, self.sink_tokens) if tokens else None

    def without(self, reason: str, **changes: Any) -> "Profile":
        """The same with some fields changed, and a word on what that leaves out and why."""
        return replace(self, left_out=(*self.left_out, reason), **changes)

    def resolve(self, shape: ModelShape) -> "ResolvedProfile":
        """Match the profile with a model; one that adapts leaves out what the model does not allow.

        Layers without keys and values (``num_kv_heads`` 0) are left out, named by the profile or not.

        Args:
            shape: the model.

        Raises:
            ProfileError: everything in which the two do not fit, or in which the model is not served.
        """
        if self.adapts and (profile := _adapted(self, shape)) is not self:
            return profile.resolve(shape)
        problems = Problems(str(self.source or self.name))
        problems.lines += [f"{problems.source}: {refusal}" for refusal in shape.refusals]
        if self.model is not None:
            _check_identity(problems, self.model, shape)
        if shape.layers and (self.model is None or len(self.model.layers) == len(shape.layers)):
            self._check_layers(problems, shape)
        problems.raise_if_any()
        layers = []
        for index in shape.attention_layers:
            pair = self.pair_of(index)
            assert pair is not None
            transforms = self.transforms_of(index).at(pair)
            recent = self.recent_of(index) if pair.is_quantized else None
            layers.append(LayerPrecision(index, pair, shape.layers[index], transforms, recent))
        return ResolvedProfile(self, tuple(layers))

    def _check_layers(self, problems: Problems, shape: ModelShape) -> None:
        named = () if isinstance(self.pairs, PrecisionPair) else self.pairs
        for key, layers in (
            ("layers", named),
            ("transforms.overrides", self.transform_overrides),
            ("recent_window_overrides", self.recent_window_overrides),
        ):
            if beyond := [layer for layer in layers if layer >= len(shape.layers)]:
                rule = f"must lie within the layers 0-{len(shape.layers) - 1} of {shape.name}"
                problems.add(key, rule, format_layers(beyond))
        pairs = {layer: pair for layer in shape.attention_layers if (pair := self.pair_of(layer)) is not None}
        if missing := [layer for layer in shape.attention_layers if layer not in pairs]:
            problems.add(
                "layers", f"must give every layer of {shape.name} a pair", f"none for {format_layers(missing)}"
            )

        unpacked: dict[tuple[str, int, PrecisionPair], list[int]] = {}
        for layer, pair in pairs.items():
            head_size = shape.layers[layer].head_size
            rules = {unsupported_head_size(head_size, bits) for bits in (pair.k_bits, pair.v_bits)} - {None}
            for broken in rules if pair.is_quantized else ():
                unpacked.setdefault((str(broken), head_size, pair), []).append(layer)
        for (broken, head_size, pair), where in unpacked.items():
            problems.add(f"layers.{format_layers(where)}", broken, f"head_size {head_size} with {pair}")

        quantized = [layer for layer, pair in pairs.items() if pair.is_quantized]
        _check_recent(problems, {layer: (self.recent_of(layer), shape.layers[layer]) for layer in quantized})


@dataclass(frozen=True)
class ResolvedProfile:
    """A profile that fits a model.

    Args:
        profile: the profile.
        layers: one entry for each layer that caches keys and values, in order.
    """

    profile: Profile
    layers: tuple[LayerPrecision, ...]

    @property
    def nominal_bits(self) -> float:
        return self._mean_bits[0]

    @property
    def stored_bits(self) -> float:
        return self._mean_bits[1]

    @property
    def _mean_bits(self) -> tuple[float, float]:
        return mean_bits((layer.pair, layer.shape.num_kv_heads, layer.shape.head_size) for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes one token takes over all layers and KV heads, scales and minima included."""
        return sum(layer.shape.num_kv_heads * content_bytes(layer.pair, layer.shape.head_size) for layer in self.layers)

    @property
    def recent_bytes_per_request(self) -> int:
        """Bytes the recent windows of one request take over all layers and KV heads, beside ``bytes_per_token``.

        The engine allocates them in whole blocks.
        """
        return sum(layer.recent_bytes for layer in self.layers)

    @property
    def recent_windows(self) -> dict[RecentWindow, tuple[int, ...]]:
        """Layers of each recent window."""
        windows: dict[RecentWindow, tuple[int, ...]] = {}
        for layer in self.layers:
            if layer.recent is not None:
                windows[layer.recent] = (*windows.get(layer.recent, ()), layer.index)
        return windows

    @property
    def bf16_bytes_per_token(self) -> int:
        return sum(
            layer.shape.num_kv_heads * content_bytes(UNQUANTIZED, layer.shape.head_size) for layer in self.layers
        )

    @property
    def attend_cached_prefill(self) -> bool:
        return self.profile.attend_cached_prefill


def _adapted(profile: Profile, shape: ModelShape) -> Profile:
    """A profile without the windows that the model does not allow; the same object if it allows all."""
    windows = [layer for layer in shape.attention_layers if profile.recent_of(layer) is not None]
    kinds = Counter(shape.layers[layer] for layer in windows)
    if len(kinds) > 1:  # a window serves layers of one shape: those that are most
        chosen = kinds.most_common(1)[0][0]
        others = [layer for layer in windows if shape.layers[layer] != chosen]
        overrides = {**profile.recent_window_overrides, **dict.fromkeys(others, 0)}
        reason = f"the recent window of layers {format_layers(others)}, whose shape is another"
        profile = profile.without(reason, recent_window_overrides=overrides)
    return profile


def _check_recent(problems: Problems, layers: Mapping[int, tuple[RecentWindow | None, LayerShape]]) -> None:
    unpacked: dict[tuple[str, int], list[int]] = {}
    shapes: dict[RecentWindow, dict[LayerShape, list[int]]] = {}
    for layer, (recent, shape) in layers.items():
        if recent is None:
            continue
        if recent.pair.is_quantized and (broken := unsupported_head_size(shape.head_size, recent.bits)):
            unpacked.setdefault((broken, shape.head_size), []).append(layer)
        shapes.setdefault(recent, {}).setdefault(shape, []).append(layer)
    for (broken, head_size), where in unpacked.items():
        problems.add("recent_window_bits", broken, f"head_size {head_size} in layers {format_layers(where)}")
    for recent, found in shapes.items():
        if len(found) > 1:
            got = ", ".join(format_layers(where) for where in found.values())
            rule = f"must only give layers of one shape a window of {recent}"
            problems.add("recent_window", rule, f"layers of {len(found)} shapes ({got})")


def _check_identity(problems: Problems, model: ModelShape, shape: ModelShape) -> None:
    if model.architecture != shape.architecture:
        problems.add("model.architecture", f"must be {shape.architecture}, that of {shape.name}", model.architecture)
    if not shape.layers:
        return
    if len(model.layers) != len(shape.layers):
        rule = f"must be {len(shape.layers)}, that of {shape.name}"
        problems.add("model.num_layers", rule, str(len(model.layers)))
        return
    for key in ("num_kv_heads", "head_size"):
        expected = [getattr(shape.layers[layer], key) for layer in shape.attention_layers]
        got = [getattr(model.layers[layer], key) for layer in shape.attention_layers]
        if expected != got:
            problems.add(f"model.{key}", f"must be {_one_or_all(expected)}, that of {shape.name}", _one_or_all(got))


def _one_or_all(values: Iterable[int]) -> str:
    values = list(values)
    return str(values[0]) if len(set(values)) == 1 else str(values)
