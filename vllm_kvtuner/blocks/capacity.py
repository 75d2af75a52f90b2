"""What a KV cache holds: the start-up line that says so, and pools in which one request could not go on."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheGroupSpec, MambaSpec

from vllm_kvtuner.engine.config import AUTO_KEY, DRAFT_PREFIXES, RECENT_SUFFIX, layer_precision, resolved_profile
from vllm_kvtuner.engine.profile_search import asked_need
from vllm_kvtuner.pages.layout import UNQUANTIZED, content_bytes
from vllm_kvtuner.profile.auto_request import Need
from vllm_kvtuner.profile.problems import format_layers
from vllm_kvtuner.profile.profile import Profile, ResolvedProfile

logger = logging.getLogger("vllm.kvtuner")


def check_capacity(config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Refuse a pool in which one request alone could not go on, which would then wait for ever.

    vLLM makes room for what a request holds while it decodes; a prompt in flight holds more of its recent windows.

    Raises:
        ValueError: a request of max_model_len tokens does not fit with its prompt in flight.
    """
    length = config.model_config.max_model_len
    needed = windows = 0
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if all(name.endswith(RECENT_SUFFIX) for name in group.layer_names):
            windows += spec.max_admission_blocks_per_request(config.max_in_flight_tokens, length)
        else:
            needed += -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
    # The pool keeps one block to itself.
    if windows and kv_cache_config.num_blocks - 1 < needed + windows:
        raise ValueError(
            f"the KV cache must have at least {needed + windows + 1} blocks for a prompt of max_model_len ({length}) "
            f"tokens, {windows} of them for its {_windows(resolved_profile(config))}, but got "
            f"{kv_cache_config.num_blocks}; decrease max_model_len or increase gpu_memory_utilization"
        )
    if (need := asked_need(config)) is not None:
        _check_need(config, kv_cache_config, need)


def _check_need(config: VllmConfig, kv_cache_config: KVCacheConfig, need: Need) -> None:
    """Compare the requests that ``auto`` was asked to have room for with the pool, now that its size is known.

    Raises:
        ValueError: fewer fit.
    """
    of_need = copy.copy(config)
    of_need.model_config = copy.copy(config.model_config)
    of_need.model_config.max_model_len = need.context
    requests = get_kv_cache_capacity(of_need, kv_cache_config)[1]
    if requests < need.requests:
        asked = config.additional_config[AUTO_KEY][0]
        raise ValueError(
            f"{asked}: the KV cache must hold {need}, but got room for {requests:.1f} of them: less memory is left "
            "beside weights and activations than was estimated; ask for fewer, or increase gpu_memory_utilization"
        )


def log_capacity(config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Say once what the cache holds: profile, bits, tokens, and how many times bf16's that is."""
    resolved = resolved_profile(config)
    found = _against_bf16(config, kv_cache_config)
    logger.info(
        "kvtuner profile %s: %.3f nominal bits, %.3f stored bits, %s bytes per token%s%s%s; %s KV tokens fit, %.2f "
        "times as many as bf16; %d of %d attention layers packed%s",
        _named(resolved.profile, config.additional_config.get(AUTO_KEY)),
        resolved.nominal_bits,
        resolved.stored_bits,
        f"{resolved.bytes_per_token:,}",
        f", up to {found.recent_bytes:,} more per request for {_windows(resolved)}" if found.recent_bytes else "",
        f", {found.state_bytes:,} more per request for states of linear-attention layers, {found.state_padding:.1%} of "
        "them padding"
        if found.state_bytes
        else "",
        f" and {found.padding:.1%} padding between unequal pages" if found.padding > 0.001 else "",
        f"{config.cache_config.kv_cache_size_tokens or 0:,}",
        found.times,
        *packed_layers(config, kv_cache_config),
        f"; without {' and without '.join(resolved.profile.left_out)}" if resolved.profile.left_out else "",
    )


def _named(profile: Profile, auto: Sequence[str] | None) -> str:
    """Its file or name, with what was asked for if that was auto, and of a pair alone what it means."""
    name = str(profile.source or profile.name)
    if auto is not None:
        asked, _, source = auto
        name = f"{asked} -> {name} ({source})"
    return f"{name} with {profile.transforms.described}" if profile.adapts else name


def packed_layers(config: VllmConfig, kv_cache_config: KVCacheConfig) -> tuple[int, int]:
    """How many attention layers of the target model have packed pages, and how many there are, as vLLM allocates them.

    Raises:
        ValueError: smaller pages than the profile's pair needs, or layers that have none, with all names.
    """
    ranks, pages = config.parallel_config.tensor_parallel_size, _page_bytes(kv_cache_config)
    packed, found, wrong = 0, set(), []
    for group in kv_cache_config.kv_cache_groups:
        for name in filter(_is_of_target, group.layer_names):
            layer = layer_precision(config, name)
            # Groups of one type of specs hold one for each of their layers.
            spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
            if layer is None or not isinstance(spec, AttentionSpec):
                continue
            found.add(layer.index)
            if not layer.pair.is_quantized:
                continue
            packed += 1
            heads = max(1, layer.shape.num_kv_heads // ranks)
            expected = group.kv_cache_spec.block_size * heads * content_bytes(layer.pair, layer.shape.head_size)
            # More is padding: layers of groups that share the pool's blocks get pages of the largest of them.
            if pages[name] < expected:
                rule = f"pages must have at least {expected:,} bytes at {layer.pair}"
                wrong.append(f"{name}: {rule}, but vLLM allocates {pages[name]:,}")
    missing = sorted({layer.index for layer in resolved_profile(config).layers} - found)
    if missing and config.parallel_config.pipeline_parallel_size == 1:
        wrong.append(f"layers {format_layers(missing)} must have pages, but vLLM allocates none")
    if wrong:
        raise ValueError("\n".join(wrong))
    return packed, len(found)


def _page_bytes(kv_cache_config: KVCacheConfig) -> dict[str, int]:
    """Of each layer by its name: one of the two strides is a page, and the other holds many of them."""
    tensors = kv_cache_config.kv_cache_tensors
    return {name: min(tensor.layer_stride, tensor.block_stride) for tensor in tensors for name in tensor.layers}


def _is_of_target(name: str) -> bool:
    """Whether a cache is that of one of the target model's layers: no recent window, and no draft model's."""
    return not name.startswith(DRAFT_PREFIXES) and not name.endswith(RECENT_SUFFIX)


def _windows(resolved: ResolvedProfile) -> str:
    return "recent windows of " + ", ".join(str(window) for window in resolved.recent_windows)


@dataclass(frozen=True)
class _Capacity:
    """What a pool holds.

    Args:
        times: how many times the tokens of a bf16 cache fit.
        padding: bytes over what the layers of all groups store, as a fraction of that; states and windows aside.
        recent_bytes: of the blocks that one request's recent windows hold at most while it decodes.
        state_bytes: of the blocks that the states of its linear-attention layers hold then.
        state_padding: the part of these that is no state.
    """

    times: float
    padding: float
    recent_bytes: int
    state_bytes: int
    state_padding: float


def _against_bf16(config: VllmConfig, kv_cache_config: KVCacheConfig) -> _Capacity:
    """What the pool holds. A draft model's layers count as they are, and states as if bf16 took as much for them.

    Cache groups overlay each other in the pool's blocks, so the largest group of bf16 pages sets what bf16 would take.
    """
    ranks = config.parallel_config.tensor_parallel_size
    pages = _page_bytes(kv_cache_config)
    bf16 = stored = windows = state_blocks = states = 0
    packed, state_groups = [], []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if all(name.endswith(RECENT_SUFFIX) for name in group.layer_names):
            windows += spec.decode_blocks
            continue
        if isinstance(spec, MambaSpec):
            held = spec.max_memory_usage_bytes(config) // spec.page_size_bytes
            state_blocks += held
            states += held * len(group.layer_names) * spec.real_page_size_bytes
            state_groups.append(group)
            continue
        packed.append(group)
        group_bf16 = group_stored = 0
        for name in group.layer_names:
            layer = None if name.startswith(DRAFT_PREFIXES) else layer_precision(config, name)
            if layer is None:
                group_bf16 += pages[name]
                group_stored += pages[name]
                continue
            tokens = spec.block_size * max(1, layer.shape.num_kv_heads // ranks)
            row_bytes = 2 * layer.shape.head_size * config.model_config.dtype.itemsize
            group_bf16 += tokens * content_bytes(UNQUANTIZED, layer.shape.head_size)
            group_stored += tokens * (
                content_bytes(layer.pair, layer.shape.head_size) if layer.pair.is_quantized else row_bytes
            )
        bf16, stored = max(bf16, group_bf16), stored + group_stored
    block_bytes = kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks

    def capacity(groups: Sequence[KVCacheGroupSpec]) -> int:
        part = copy.copy(kv_cache_config)
        part.kv_cache_groups = groups
        return get_kv_cache_capacity(config, part)[0]

    # Bytes per token are as 1 / capacity, here of packed pages alone and with states.
    pages_alone, with_states = capacity(packed), capacity(packed + state_groups)
    times = ((bf16 / block_bytes - 1) / pages_alone + 1 / with_states) * capacity(kv_cache_config.kv_cache_groups)
    return _Capacity(
        times=times,
        padding=block_bytes * len(packed) / stored - 1,
        recent_bytes=windows * block_bytes,
        state_bytes=state_blocks * block_bytes,
        state_padding=1 - states / (state_blocks * block_bytes) if state_blocks else 0.0,
    )
