"""vLLM's way in: the entry point, the settings' path from the command line to every worker, and the layers' backends.

``register`` runs in every vLLM process, before vLLM builds its argument parser. It changes nothing of what a run
without ``--kv-cache-dtype kvtuner`` does.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

from vllm_kvtuner import layout
from vllm_kvtuner.layout import PrecisionPair, content_bytes

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile import LayerPrecision, RecentWindow, ResolvedProfile
    from vllm_kvtuner.transforms import RotaryTable

KV_CACHE_DTYPE = "kvtuner"
PROFILE_KEY = "kvtuner_profile"
"""Key of additional_config that holds the profile: a path, a shipped name, or a pair."""
ATTEND_KEY = "kvtuner_attend_cached_prefill"
"""Key of additional_config that overrides the profile's attend_cached_prefill."""
CALIBRATION_KEY = "kvtuner_calibration"
"""Key of additional_config that, when true, makes a calibration engine: the profile's pairs are the room of the pages,
and calibration.switch changes what the layers store in them while the engine runs."""
DIGEST_KEY = "kvtuner_digest"
"""Key of additional_config that holds a digest of the files, so that vLLM's compile cache sees them change."""
RECENT_SUFFIX = ".recent"
"""What follows an attention layer's name in that of its recent window."""

DRAFT_PREFIXES = ("draft_model.", "mtp.")
"""How names of a draft model's layers begin, where their numbers are no others than the target's."""


def register() -> None:
    """Entry point ``vllm.general_plugins``; may run any number of times in a process."""
    from vllm_kvtuner import compat

    compat.apply()


def check_config(config: VllmConfig) -> None:
    """Resolve the profile of a new engine configuration, or refuse, before any weight is loaded.

    Raises:
        ValueError: ``kvtuner`` without a profile, a profile without ``kvtuner``, or (ProfileError) a profile that
            cannot be read or does not fit the model, with all problems.
    """
    additional = config.additional_config if isinstance(config.additional_config, dict) else {}
    wanted = config.cache_config.cache_dtype == KV_CACHE_DTYPE
    if not wanted:
        if additional.get(PROFILE_KEY):
            raise ValueError(
                f"a precision profile ({additional[PROFILE_KEY]!r}) takes effect with --kv-cache-dtype "
                f"{KV_CACHE_DTYPE} only, but got --kv-cache-dtype {config.cache_config.cache_dtype}"
            )
        return
    from vllm_kvtuner import engine_checks, envs
    from vllm_kvtuner.profile import ProfileError, shipped_profiles

    spec = additional.get(PROFILE_KEY) or envs.profile()
    if not spec:
        raise ValueError(
            f"--kv-cache-dtype {KV_CACHE_DTYPE} needs a precision profile: --kvtuner-profile FILE, NAME or pair such "
            f"as K8V4 (or {PROFILE_KEY!r} in additional_config, or KVTUNER_PROFILE). "
            f"Shipped profiles: {', '.join(shipped_profiles())}"
        )
    if not isinstance(config.additional_config, dict):
        raise ValueError(f"additional_config must be a dict to carry {PROFILE_KEY!r}, but got a custom object")
    additional[PROFILE_KEY] = str(spec)
    if problems := engine_checks.settings(config):
        raise ProfileError(problems)
    resolved = resolved_profile(config)
    problems = engine_checks.draft_model(config)
    if resolved.recent_windows:
        problems += engine_checks.recent_windows(config, resolved)
    if problems:
        raise ProfileError(problems)
    additional[DIGEST_KEY] = _digest(resolved)


def resolved_profile(config: VllmConfig) -> ResolvedProfile:
    """The profile of a checked configuration, resolved against its model."""
    additional = config.additional_config
    attend = additional.get(ATTEND_KEY)
    return _resolve(
        additional[PROFILE_KEY], config.model_config.model, attend, _HfConfig(config.model_config.hf_config)
    )


def uses_kvtuner(config: VllmConfig) -> bool:
    """Whether the run's cache is ours."""
    return config.cache_config is not None and config.cache_config.cache_dtype == KV_CACHE_DTYPE


def is_calibration(config: VllmConfig) -> bool:
    """Whether the run's layers can be switched to other pairs and transforms."""
    return bool(config.additional_config.get(CALIBRATION_KEY))


def layer_precision(config: VllmConfig, layer_name: str) -> LayerPrecision | None:
    """What the profile says of a decoder attention layer, or None for one that it does not know (an EAGLE head's)."""
    from vllm.model_executor.models.utils import extract_layer_index

    index = extract_layer_index(layer_name)
    for layer in resolved_profile(config).layers:
        if layer.index == index:
            return layer
    return None


def mixes_attention_kinds(config: VllmConfig) -> bool:
    """Whether the model has sliding-window layers beside full ones, whose pages cannot share one group."""
    return len(set(getattr(config.model_config.hf_text_config, "layer_types", None) or ())) > 1


def needs_packed_blocks(config: VllmConfig) -> bool:
    """Whether pages of unequal size lie in different KV cache groups, which only a block-outermost layout packs."""
    return (
        mixes_attention_kinds(config) or config.model_config.is_hybrid or bool(resolved_profile(config).recent_windows)
    )


def mean_token_bytes(config: VllmConfig) -> int:
    """Bytes of one token in the mean attention layer of a rank, rounded down. The same for all pipeline stages."""
    layers = resolved_profile(config).layers
    return sum(_token_bytes(config, layer) for layer in layers) // len(layers)


def _token_bytes(config: VllmConfig, layer: LayerPrecision) -> int:
    """Bytes of one token in the pages of a layer of one rank."""
    heads = max(1, layer.shape.num_kv_heads // config.parallel_config.tensor_parallel_size)
    return heads * content_bytes(layer.pair, layer.shape.head_size) * _widen(config, layer.pair)


def _widen(config: VllmConfig, pair: PrecisionPair) -> int:
    """What a profile calls 16 bits is the model's dtype."""
    return 1 if pair.is_quantized else config.model_config.dtype.itemsize // 2


def recent_block_size(config: VllmConfig, window: RecentWindow) -> int:
    """Tokens per block of a recent window, the same for all layers that have this one."""
    resolved, model = resolved_profile(config), config.model_config
    ranks = config.parallel_config.tensor_parallel_size
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    sliding = [mixes_attention_kinds(config) and kinds[layer.index] == "sliding_attention" for layer in resolved.layers]
    pool = windows = 0
    for layer, is_sliding in zip(resolved.layers, sliding, strict=True):
        # Groups of sliding-window layers share the blocks that the full layers' pages make.
        pool += 0 if is_sliding else _token_bytes(config, layer)
        if layer.recent == window:
            heads = max(1, layer.shape.num_kv_heads // ranks)
            windows += heads * layer.recent_content_bytes * _widen(config, window.pair)
    block_size = config.cache_config.block_size
    return layout.recent_block_size(block_size, pool * block_size, windows)


def bind_statics(model: torch.nn.Module, config: VllmConfig, resolved: ResolvedProfile | None = None) -> None:
    """Give every layer whose transforms need statics its tensors and the model's own rotary table.

    Under tensor parallelism a rank takes the rows of its own KV heads.

    Args:
        model: the loaded model.
        config: of the engine.
        resolved: what the layers were switched to in calibration mode; by default the profile of ``config``.

    Raises:
        ValueError: the statics file is missing, unreadable or does not fit, or a layer's rotary embedding is of a
            kind whose table is not one row per position.
    """
    layers = {
        name: layer
        for name, layer in config.compilation_config.static_forward_context.items()
        if getattr(getattr(layer, "impl", None), "needs_statics", False)
    }
    if not layers:
        return
    import torch
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    from vllm_kvtuner.statics import load_statics
    from vllm_kvtuner.transforms import LayerTransforms

    resolved = resolved or resolved_profile(config)
    assert resolved.profile.statics is not None, "a profile whose transforms need statics names them"
    statics = load_statics(resolved.profile.statics, resolved)
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for layer in layers.values():
        precision = layer.impl.settings.precision
        device = next(model.parameters()).device
        heads = _heads_of_rank(precision.shape.num_kv_heads, layer.num_kv_heads, rank, world_size)

        def tensor(array: Any, heads: slice = heads, device: torch.device = device) -> torch.Tensor | None:
            return None if array is None else torch.from_numpy(array[heads].copy()).to(device)

        chosen, static = precision.transforms, statics[precision.index]
        rotary = None
        if chosen.key_offset:
            parent = modules[names[id(layer)].rpartition(".")[0]]
            rotary = layer_rotary(parent, config, precision.index)
        layer.impl.bind_statics(
            LayerTransforms(
                key_offset=tensor(static.key_offset) if chosen.key_offset else None,
                rotary=rotary,
                key_equalization=tensor(static.key_equalization) if chosen.key_equalization else None,
                key_hadamard=chosen.key_hadamard,
                value_hadamard=chosen.value_hadamard,
                range_search=chosen.range_search,
            )
        )


class _HfConfig:
    """A model's configuration as part of a cache key: compared by identity."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HfConfig) and self.config is other.config

    def __hash__(self) -> int:
        return id(self.config)


@functools.lru_cache(maxsize=8)
def _resolve(spec: str, model: str, attend_cached_prefill: bool | None, config: _HfConfig) -> ResolvedProfile:
    import dataclasses

    from vllm_kvtuner.profile import ModelShape, load_profile

    profile = load_profile(spec)
    if attend_cached_prefill is not None:
        profile = dataclasses.replace(profile, attend_cached_prefill=bool(attend_cached_prefill))
    return profile.resolve(ModelShape.from_hf_config(config.config, model))


def _digest(resolved: ResolvedProfile) -> str:
    """Digest of the layers' settings and the statics' bytes; also reads the statics, so that errors come early."""
    digest = hashlib.sha256(repr(resolved.layers).encode())
    if resolved.profile.statics is not None:
        from vllm_kvtuner.statics import load_statics

        load_statics(resolved.profile.statics, resolved)
        digest.update(resolved.profile.statics.read_bytes())
    return digest.hexdigest()[:16]


def _heads_of_rank(total: int, local: int, rank: int, world_size: int) -> slice:
    """The KV heads of a tensor-parallel rank; with fewer heads than ranks, each is on several."""
    first = rank * local if total >= world_size else rank * total // world_size
    return slice(first, first + local)


def layer_rotary(parent: torch.nn.Module, config: VllmConfig, layer: int) -> RotaryTable | None:
    """The table of the rotary embedding beside an attention layer, None if the layer rotates nothing.

    Args:
        parent: the module that holds the attention layer.
        config: of the engine.
        layer: its index.

    Raises:
        ValueError: the model has RoPE, but keeps it elsewhere (Transformers' own modelling code does), or as
            :func:`rotary_table`.
    """
    if not hasattr(parent, "rotary_emb") and getattr(config.model_config.hf_text_config, "rope_parameters", None):
        raise ValueError(
            f"layer {layer}: key_offset needs the rotary embedding beside the attention layer, but the model's "
            f"{type(parent).__name__} has none"
        )
    return rotary_table(getattr(parent, "rotary_emb", None), config, layer)


def rotary_table(module: torch.nn.Module | None, config: VllmConfig, layer: int) -> RotaryTable | None:
    """The table of a model's rotary embedding, None if the layer has none."""
    from vllm_kvtuner.transforms import RotaryTable

    if module is None:
        return None
    dtype = config.model_config.dtype
    if hasattr(module, "long_short_cos_sin_cache"):  # Phi-3 keeps the tables of short and long contexts in one
        table, split = module.long_short_cos_sin_cache, module.original_max_position_embeddings
        table = table[split:] if module.use_long_rope else table[:split]
    elif hasattr(module, "mrope_section"):
        raise ValueError(f"layer {layer}: key_offset needs one position per token, but the model uses M-RoPE")
    else:
        table = getattr(module, "cos_sin_cache", None)
    if table is None or table.ndim != 2 or table.is_complex():
        raise ValueError(
            f"layer {layer}: key_offset needs a rotary table with one row per position, but the model's "
            f"{type(module).__name__} has none"
        )
    is_neox = getattr(module, "is_neox_style", True)
    # Phi-3 computes its tables from arguments, and has no cos_sin_cache.
    if hasattr(module, "cos_sin_cache") and hasattr(module, "_compute_cos_sin_cache"):
        linear = _linear_rotary(module)
        if linear is not None:
            return linear
    # In the dtype the model rotates in, so that exactly what it added is subtracted.
    return RotaryTable(cos_sin=table.to(dtype), is_neox=is_neox)


@functools.cache
def _linear_rotary(module: torch.nn.Module) -> RotaryTable | None:
    """Computed once for all layers that share the module, from its table before any rounding to the model's dtype."""
    import torch

    from vllm_kvtuner.transforms import linear_rotary

    with torch.device("cpu"):
        table = module._compute_cos_sin_cache().float().cpu()
    if table.shape != module.cos_sin_cache.shape:
        return None
    return linear_rotary(table, getattr(module, "is_neox_style", True), module.cos_sin_cache.device)
