"""What a profile needs to know of a model: KV heads and head size per layer, and whether its kind is served."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_kvtuner.profile.problems import ProfileError, show

ATTENTION_TYPES = {"attention", "full_attention", "sliding_attention", "hybrid"}
"""Entries of a config's layer types whose layers keep plain keys and values."""
CACHELESS_TYPES = {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "mlp", "moe"}
"""Entries whose layers keep no keys and values."""

_NUM_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_NUM_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_groups", "multi_query_group_num")
_HEAD_SIZE = ("head_dim", "hidden_size_per_head", "attention_head_dim", "kv_channels")
_HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
_LAYER_TYPES = ("layer_types", "layers_block_type")

_STATE_SPACE = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"}
_SINKS = {"gpt_oss", "granite_swa", "granitemoe_swa", "hy_v4"}
_SINK_KEYS = (
    "attention_sinks",
    "swa_attention_sink_enabled",
    "add_swa_attention_sink_bias",
    "add_full_attention_sink_bias",
)
_LOOPED = {"IQuestLoopCoderForCausalLM": 2}
"""Architectures that run through their layers several times, and how often where the config does not say."""
_VALUE_SIZES = {"v_head_dim": "head_dim", "v_channels": "head_dim", "swa_v_head_dim": "swa_head_dim"}
"""Keys of the values' head size, and of the keys' head size beside them."""
_OWN_WAYS = {
    "sparse_attention_config": "attention to blocks that an indexer chooses",
    "rswa_window": "a window that slides behind a prompt which stays visible",
    "dual_chunk_attention_config": "dual chunk attention",
}
"""Keys of ways of attending that need masks or caches of their own."""
_ALIBI = {"bloom", "step1"}
_DERIVED_BY_TRANSFORMERS = (
    "attn_layer_period",
    "attn_layer_indices",
    "attn_type_list",
    "block_types",
    "hybrid_override_pattern",
)
"""Keys of raw config files from which transformers derives the layer types."""


@dataclass(frozen=True)
class LayerShape:
    """Shape of what one layer caches per token.

    Args:
        num_kv_heads: KV heads, before tensor parallelism; 0 for a layer that caches no keys and values.
        head_size: numbers per head, the same for keys and values; 0 for such a layer.
    """

    num_kv_heads: int
    head_size: int


@dataclass(frozen=True)
class ModelShape:
    """A model as a profile is checked against it.

    Args:
        name: model name or folder.
        architecture: first of the config's ``architectures``.
        layers: shape of each decoder layer, of a looped model for each pass over them in turn; may be empty for a kind
            that is not served.
        unsupported: why models of this kind are not served, each ``<rule>, but got <value>``; empty if they are.
        attention_sinks: whether some of its layers, or all, have a learned logit per query head in every softmax.
    """

    name: str
    architecture: str
    layers: tuple[LayerShape, ...]
    unsupported: tuple[str, ...] = ()
    attention_sinks: bool = False

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why the model is not served, in the words of every command and of the engine; empty if it is."""
        return tuple(f"model {self.name} {reason}" for reason in self.unsupported)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers that cache keys and values."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.num_kv_heads)

    @classmethod
    def from_hf_config(cls, config: Any, name: str) -> "ModelShape":
        """Read a transformers config, or the mapping that a ``config.json`` holds.

        Args:
            config: the config object or mapping; a nested text config is found.
            name: how errors and reports call the model.

        Raises:
            ProfileError: a value that gives the shape is missing; transformers' own config classes fill in defaults
                that a ``config.json`` may leave out.
        """
        text = _text_config(config)
        reasons = tuple(_unsupported(config, text))
        architectures = _get(config, "architectures") or _get(text, "architectures") or ("",)
        try:
            layers = tuple(_layer_shapes(text, name))
        except ProfileError:
            if not reasons:
                raise
            layers = ()  # an unserved kind may describe its layers in its own way; the reasons are the answer
        return cls(
            name=name,
            architecture=architectures[0],
            layers=layers,
            unsupported=reasons,
            attention_sinks=_has_sinks(text),
        )


def num_loops(text: Any) -> int:
    """How often a model runs through its layers, each time with keys and values of their own.

    Args:
        text: a model's (text) configuration, object or mapping.
    """
    default = _LOOPED.get((_get(text, "architectures") or ("",))[0])
    if default is None:
        return 1
    given = _get(text, "loop_num")
    return default if given is None else int(given)


def _get(config: Any, *names: str) -> Any:
    """The first of the named values that is given, or None."""
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if value is not None:
            return value
    return None


def _require(config: Any, model: str, *names: str) -> Any:
    value = _get(config, *names)
    if value is None:
        raise ProfileError([f"{model}: config must give {' or '.join(names)}, but got neither"])
    return value


def _text_config(config: Any) -> Any:
    if (thinker := _get(config, "thinker_config")) is not None:
        config = thinker
    nested = _get(config, "text_config", "llm_config", "language_config")
    return config if nested is None else nested


def _layer_types(text: Any, model: str) -> list[str] | None:
    types = _get(text, *_LAYER_TYPES)
    if types is None and (keys := [key for key in _DERIVED_BY_TRANSFORMERS if _get(text, key) is not None]):
        raise ProfileError([f"{model}: config must give layer_types, but got only {', '.join(keys)}"])
    return None if types is None else list(types)


def _layer_shapes(text: Any, model: str) -> Iterator[LayerShape]:
    types = _layer_types(text, model)
    num_layers = _require(text, model, *_NUM_LAYERS)
    if _get(text, "model_type") in _STATE_SPACE:
        types = ["mamba"] * num_layers
    # Models whose layers differ: transformers gives one config per layer, a raw file only the differences.
    per_layer = _get(text, "per_layer_config")
    if isinstance(per_layer, Mapping) or (per_layer is None and _get(text, "global_head_dim") is not None):
        raise ProfileError([f"{model}: config must give the shape of every layer, but got one with exceptions"])
    for index in [*range(num_layers)] * num_loops(text):
        if types is not None and types[index] in CACHELESS_TYPES:
            yield LayerShape(0, 0)
            continue
        layer = text if per_layer is None else per_layer[index]
        num_kv_heads, head_size = _num_kv_heads(layer, model), _head_size(layer, model)
        yield LayerShape(
            num_kv_heads[index] if isinstance(num_kv_heads, list | tuple) else num_kv_heads,
            head_size[index] if isinstance(head_size, list | tuple) else head_size,
        )


def _num_kv_heads(text: Any, model: str) -> Any:
    kind = _get(text, "model_type")
    if kind in ("falcon", "RefinedWeb", "RefinedWebModel") and not _get(text, "new_decoder_architecture"):
        # transformers writes num_kv_heads = num_attention_heads beside multi_query, which overrules it.
        return 1 if _get(text, "multi_query") in (None, True) else _require(text, model, *_NUM_HEADS)
    if kind == "gpt_bigcode" and _get(text, "multi_query") in (None, True):
        return 1
    if kind == "chatglm" and not _get(text, "multi_query_attention"):
        return _require(text, model, *_NUM_HEADS)
    if kind == "zamba2":  # whose num_key_value_heads vLLM does not read
        return _require(text, model, *_NUM_HEADS)
    attn_config = _get(text, "attn_config")
    nested = None if attn_config is None else _get(attn_config, "kv_n_heads")
    return nested or _require(text, model, *_NUM_KV_HEADS, *_NUM_HEADS)


def _head_size(text: Any, model: str) -> Any:
    explicit = _get(text, *_HEAD_SIZE)
    if explicit:
        return explicit
    return _require(text, model, *_HIDDEN_SIZE) // _require(text, model, *_NUM_HEADS)


def _head_size_or_none(text: Any) -> Any:
    hidden, heads = _get(text, *_HIDDEN_SIZE), _get(text, *_NUM_HEADS)
    return _get(text, *_HEAD_SIZE) or (hidden // heads if hidden and heads else None)


def _unsupported(config: Any, text: Any) -> Iterator[str]:
    kind = _get(text, "model_type")
    if _get(config, "is_encoder_decoder") or _get(text, "is_encoder_decoder"):
        yield "must be a decoder (encoder-decoder models are not served), but got is_encoder_decoder=True"
    if (crossed := _get(text, "cross_attention_layers")) is not None:
        yield f"must have self-attention only, but got cross_attention_layers={show(crossed)}"
    for key in ("kv_lora_rank", "compress_ratios"):
        if (value := _get(text, key)) is not None:
            yield f"must cache keys and values per head (MLA is not served), but got {key}={show(value)}"
            break
    else:
        for key, size in _VALUE_SIZES.items():
            value = _get(text, key)
            if value is not None and value != (_get(text, size) or _head_size_or_none(text)):
                yield f"must have keys and values of one head size, but got {key}={show(value)}"
    for key, what in _OWN_WAYS.items():
        if value := _get(text, key) or _get(config, key):
            rule = f"must attend to all tokens or to a sliding window ({what} is not served)"
            yield f"{rule}, but got {key}={show(value)}"
    if (tokens := _get(text, "param_sink_number")) not in (None, 0):
        yield f"must have no learned sink tokens (not served), but got param_sink_number={show(tokens)}"
    if reason := _alibi(config, text):
        yield f"must have no ALiBi (not served), but got {reason}"
    if shared := _get(text, "num_kv_shared_layers"):
        yield f"must cache keys and values in every layer, but got num_kv_shared_layers={shared}"
    if _get(text, "block_configs") is not None:
        yield "must have layers that config values describe, but got block_configs"
    types = set(_get(text, *_LAYER_TYPES) or ())
    if unknown := sorted(types - ATTENTION_TYPES - CACHELESS_TYPES):
        known = ", ".join(sorted(ATTENTION_TYPES | CACHELESS_TYPES))
        yield f"must have layers of the types {known}, but got {', '.join(unknown)}"
    if kind in _STATE_SPACE or (types and types <= CACHELESS_TYPES):
        yield "must have attention layers, but got none"


def _has_sinks(text: Any) -> bool:
    if _get(text, "attention_sinks") is False:
        return False
    return _get(text, "model_type") in _SINKS or any(_get(text, key) for key in _SINK_KEYS)


def _alibi(config: Any, text: Any) -> str | None:
    kind = _get(text, "model_type")
    if kind in _ALIBI:
        return f"model_type={kind!r}"
    # The 7B is rotary, the 13B is not, and nothing in the config but its size tells them apart.
    if kind == "baichuan" and _get(text, "hidden_size") != 4096:
        return f"model_type='baichuan' with hidden_size={_get(text, 'hidden_size')}"
    for key in ("position_encoding_type", "position_embedding_type"):
        if _get(text, key) == "alibi":
            return f"{key}='alibi'"
    if _get(text, "alibi"):
        return "alibi=True"
    attn_config = _get(text, "attn_config")
    if kind == "mpt" or attn_config is not None:
        alibi = None if attn_config is None else _get(attn_config, "alibi")
        if alibi or (alibi is None and kind == "mpt"):
            return "attn_config.alibi=True"
    return None
