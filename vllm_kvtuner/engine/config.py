"""The settings' path: from vLLM's configuration to the resolved profile, and what follows from it for blocks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_kvtuner.engine.layer_names import layer_index, sliding_layers
from vllm_kvtuner.engine.verdict import model_shape
from vllm_kvtuner.pages import layout
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_shape import num_loops

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_kvtuner.profile.profile import LayerPrecision, Profile, RecentWindow, ResolvedProfile

KV_CACHE_DTYPE = "kvtuner"
BACKEND_NAME = "KVTUNER"
"""Name of our attention backends in vLLM's registry, which is not the CUSTOM that other plugins may take."""
PROFILE_KEY = "kvtuner_profile"
"""Key of additional_config that holds the profile: a path, a shipped name, or a pair."""
ATTEND_KEY = "kvtuner_attend_cached_prefill"
"""Key of additional_config that overrides the profile's attend_cached_prefill."""
CALIBRATION_KEY = "kvtuner_calibration"
"""Key of additional_config that, when true, makes a calibration engine: the profile's pairs are the room of the pages,
and attention.switchable.switch changes what the layers store in them while the engine runs."""
DIGEST_KEY = "kvtuner_digest"
"""Key of additional_config that holds a digest of the files, so that vLLM's compile cache sees them change."""
AUTO_KEY = "kvtuner_auto"
"""Key of additional_config: of a profile that ``auto`` was asked for, what was asked, what was taken and from where."""
PAIR_WINDOW_KEY = "kvtuner_pair_window"
"""Key of additional_config that holds the window that a pair alone has in this engine (engine/pair_window.py): its
tokens, its bits and its sink tokens, and why it has no better one."""
REQUEST_TOKENS_KEY = "kvtuner_request_tokens"
"""Key of additional_config: tokens of the requests that a pair's window is chosen for, instead of max_model_len. So
an engine for short texts measures what one for long requests serves."""
RECENT_SUFFIX = ".recent"
"""What follows an attention layer's name in that of its recent window."""
DRAFT_PREFIXES = ("draft_model.", "mtp.")
"""How names of a draft model's layers begin, where their numbers are no others than the target's."""


def resolved_profile(config: VllmConfig) -> ResolvedProfile:
    """The profile of a checked configuration, resolved against its model."""
    additional = config.additional_config
    attend, window = additional.get(ATTEND_KEY), tuple(additional.get(PAIR_WINDOW_KEY) or ())
    return _resolve(additional[PROFILE_KEY], config.model_config.model, attend, window, _Model(config.model_config))


def uses_kvtuner(config: VllmConfig) -> bool:
    """Whether the run's cache is ours."""
    return config.cache_config is not None and config.cache_config.cache_dtype == KV_CACHE_DTYPE


def is_calibration(config: VllmConfig) -> bool:
    """Whether the run's layers can be switched to other pairs and transforms."""
    return bool(config.additional_config.get(CALIBRATION_KEY))


def layer_precision(config: VllmConfig, layer_name: str) -> LayerPrecision | None:
    """What the profile says of an attention layer of the target model, or None for one that it does not know."""
    index = layer_index(config, layer_name)
    for layer in resolved_profile(config).layers:
        if layer.index == index:
            return layer
    return None


def mixes_attention_kinds(config: VllmConfig) -> bool:
    """Whether the model has sliding-window layers beside full ones, whose pages cannot share one group."""
    text = config.model_config.hf_text_config
    return len(set(getattr(text, "layer_types", None) or ())) > 1 or num_loops(text) > 1


def reads_others_tokens(config: VllmConfig) -> bool:
    """Whether some layers attend to keys and values that another layer, or pass over the layers, has just stored."""
    text = config.model_config.hf_text_config
    return num_loops(text) > 1 or bool(getattr(text, "num_kv_shared_layers", 0))


def needs_packed_blocks(config: VllmConfig, resolved: ResolvedProfile) -> bool:
    """Whether pages of unequal size lie in different KV cache groups, which only a block-outermost layout packs."""
    return mixes_attention_kinds(config) or config.model_config.is_hybrid or bool(resolved.recent_windows)


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
    pool, windows = window_bytes(config, resolved_profile(config), window)
    block_size = config.cache_config.block_size
    return layout.recent_block_size(block_size, pool * block_size, windows)


def window_bytes(config: VllmConfig, resolved: ResolvedProfile, window: RecentWindow) -> tuple[int, int]:
    """Bytes of one token on a rank: in the packed pages that make a block, and in all layers' windows of this kind."""
    ranks = config.parallel_config.tensor_parallel_size
    sliding = sliding_layers(config, resolved)
    pool = windows = 0
    for layer in resolved.layers:
        # Groups of sliding-window layers share the blocks that the full layers' pages make.
        pool += 0 if layer.index in sliding else _token_bytes(config, layer)
        if layer.recent == window:
            heads = max(1, layer.shape.num_kv_heads // ranks)
            windows += heads * layer.recent_content_bytes * _widen(config, window.pair)
    return pool, windows


class _Model:
    """vLLM's configuration of a model as part of a cache key: those of one Hugging Face configuration are equal."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Model) and self.config.hf_config is other.config.hf_config

    def __hash__(self) -> int:
        return id(self.config.hf_config)


def with_pair_window(profile: Profile, chosen: Sequence[Any]) -> Profile:
    """A pair's profile with the window that PAIR_WINDOW_KEY holds."""
    tokens, bits, sink_tokens, reason = chosen
    changes = {"recent_window": tokens, "recent_window_bits": bits, "sink_tokens": sink_tokens}
    return profile.without(reason, **changes) if reason else dataclasses.replace(profile, **changes)


@functools.lru_cache(maxsize=8)
def _resolve(
    spec: str, model: str, attend_cached_prefill: bool | None, pair_window: tuple[Any, ...], config: _Model
) -> ResolvedProfile:
    profile = load_profile(spec)
    if pair_window:
        profile = with_pair_window(profile, pair_window)
    if attend_cached_prefill is not None:
        profile = dataclasses.replace(profile, attend_cached_prefill=bool(attend_cached_prefill))
    return profile.resolve(model_shape(config.config))
