"""Refuse, before any weight is loaded, an engine configuration that packed pages do not work with.

``check_config`` asks every check; each problem is one line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from typing import TYPE_CHECKING

from vllm_kvtuner import envs
from vllm_kvtuner.engine.causality import causality, pictures_read_back
from vllm_kvtuner.engine.config import (
    ATTEND_KEY,
    CALIBRATION_KEY,
    DIGEST_KEY,
    KV_CACHE_DTYPE,
    PAIR_WINDOW_KEY,
    PROFILE_KEY,
    is_calibration,
    mixes_attention_kinds,
    needs_packed_blocks,
    reads_others_tokens,
    resolved_profile,
)
from vllm_kvtuner.engine.layer_names import sliding_layers
from vllm_kvtuner.engine.mrope import unserved_positions
from vllm_kvtuner.engine.page_facts import refused_transfers
from vllm_kvtuner.engine.pair_window import CPU_BLOCK_SIZE, choose_window
from vllm_kvtuner.engine.profile_search import look_for, other_weights
from vllm_kvtuner.engine.verdict import model_shape
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PAGE_FORMAT, UNQUANTIZED
from vllm_kvtuner.profile.checkpoint import checkpoint_scheme
from vllm_kvtuner.profile.fitting import advice
from vllm_kvtuner.profile.load import AUTO, load_profile
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError, UnknownProfileError, format_layers
from vllm_kvtuner.profile.statics import load_statics

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

    from vllm_kvtuner.profile.profile import Profile, ResolvedProfile

OFFLOADING = "OffloadingConnector"
NIXL_PULL = ("NixlConnector", "NixlPullConnector")
"""Two names of the connector whose decoding engine reads."""
EXAMPLE = "ExampleConnector"
logger = logging.getLogger("vllm.kvtuner")


def check_config(config: VllmConfig) -> None:
    """Resolve the profile of a new engine configuration, or refuse, before any weight is loaded.

    Raises:
        ValueError: a profile without ``kvtuner``, or (ProfileError) one that cannot be read or does not fit the model,
            with all problems.
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
    spec = additional.get(PROFILE_KEY) or envs.profile() or AUTO
    if not isinstance(config.additional_config, dict):
        raise ValueError(f"additional_config must be a dict to carry {PROFILE_KEY!r}, but got a custom object")
    additional[PROFILE_KEY] = str(spec)
    if problems := settings(config):
        raise ProfileError(problems)
    look_for(config, _shape(config))
    resolved = _resolved(config)
    problems = other_weights(config, resolved.profile) + draft_model(config, resolved)
    problems += captured_stores(config, resolved) + shared_tokens(config, resolved)
    problems += context_parallel(config, resolved) + files_of_ranks(config)
    problems += unserved_positions(config, resolved) + pictures_read_back(config, resolved)
    if resolved.recent_windows:
        problems += recent_windows(config, resolved)
    if problems:
        raise ProfileError(problems)
    additional[DIGEST_KEY] = _digest(config, resolved)
    _say_scheme(config, resolved)
    _say_context_parallel(config)
    if config.model_config.is_mm_prefix_lm:
        # Pictures that attend in both directions are computed in one step. On a GPU vLLM says so itself.
        config.scheduler_config.disable_chunked_mm_input = True


def _say_scheme(config: VllmConfig, resolved: ResolvedProfile) -> None:
    """Say what becomes of the cache that the checkpoint asks for, which is not what it gets."""
    scheme = checkpoint_scheme(config.model_config.hf_config)
    if scheme is None:
        return
    plain = [layer.index for layer in resolved.layers if not layer.pair.is_quantized]
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    kept = f"; layers {format_layers(plain)} at {UNQUANTIZED} stay in {dtype}" if plain else ""
    logger.info(
        "kvtuner: the KV cache scheme of the checkpoint (%s) and its scales are not used; layers store what the "
        "profile says%s",
        scheme,
        kept,
    )


def _say_context_parallel(config: VllmConfig) -> None:
    """Its ranks were compared with one rank on CPUs alone so far."""
    if (size := config.parallel_config.decode_context_parallel_size) > 1:
        logger.warning(
            "kvtuner: decode_context_parallel_size=%d has not been tried on GPUs yet; compare some answers with those "
            "of size 1 before you rely on them",
            size,
        )


def _resolved(config: VllmConfig) -> ResolvedProfile:
    """The profile, or a refusal that names others where there is no such profile."""
    try:
        adapt(config)
        return resolved_profile(config)
    except UnknownProfileError as error:
        raise UnknownProfileError([f"{problem}; {advice(_shape(config))}" for problem in error.problems]) from None


def _shape(config: VllmConfig) -> ModelShape:
    return model_shape(config.model_config)


def adapt(config: VllmConfig) -> None:
    """Choose what a profile leaves to the engine: blocks that a recent window fills, and the window of a pair alone."""
    additional = config.additional_config
    additional.pop(PAIR_WINDOW_KEY, None)
    profile = load_profile(additional[PROFILE_KEY])
    if is_calibration(config):
        return
    if not profile.adapts:
        # Beside K16V16 layers, those of a draft among them, pages on a CPU are as large as theirs in any case.
        if _has_window(profile) and config.speculative_config is None and not profile.keeps_layers_unquantized:
            _use_smaller_blocks(config)
        return

    def problems(resolved: ResolvedProfile) -> tuple[str, ...]:
        return (
            *recent_windows(config, resolved),
            *draft_model(config, resolved),
            *shared_tokens(config, resolved),
            *context_parallel(config, resolved),
        )

    shape = _shape(config)
    if shape.unsupported:  # refused by resolving
        return
    profile = dataclasses.replace(profile, attend_cached_prefill=bool(additional.get(ATTEND_KEY)))
    given = config.cache_config.block_size
    _use_smaller_blocks(config)
    choice = choose_window(config, profile, shape, problems)
    if not choice[0]:
        config.cache_config.block_size = given
    additional[PAIR_WINDOW_KEY] = list(choice)


def _has_window(profile: Profile) -> bool:
    return bool(profile.recent_window or any(profile.recent_window_overrides.values()))


def _use_smaller_blocks(config: VllmConfig) -> None:
    """On a CPU, take blocks that a recent window fills, unless somebody has given a size.

    A request holds whole blocks of its window. Blocks of a model with linear-attention layers are as large as a state.
    """
    from vllm.platforms import current_platform

    cache = config.cache_config
    if current_platform.is_cpu() and not cache.user_specified_block_size and not config.model_config.is_hybrid:
        cache.block_size = CPU_BLOCK_SIZE


def _digest(config: VllmConfig, resolved: ResolvedProfile) -> str:
    """Digest of all that says what a cache's bytes mean: format and layers' settings, the model's dtype, which windows
    and K16V16 layers have, and the statics' bytes. Also reads the statics, so that errors come early."""
    digest = hashlib.sha256(repr((PAGE_FORMAT, config.model_config.dtype, resolved.layers)).encode())
    if resolved.profile.statics is not None:
        load_statics(resolved.profile.statics, resolved)
        digest.update(resolved.profile.statics.read_bytes())
    return digest.hexdigest()[:16]


def settings(config: VllmConfig) -> tuple[str, ...]:
    """What can be checked before the profile is read."""
    problems = []
    parallel = config.parallel_config
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        problems.append(
            "prefill_context_parallel_size must be 1 with --kv-cache-dtype kvtuner, but got "
            f"{parallel.prefill_context_parallel_size}"
        )
    if config.cache_config.user_specified_block_size and config.cache_config.block_size % BLOCK_SIZE_MULTIPLE:
        problems.append(
            f"block_size must be a multiple of {BLOCK_SIZE_MULTIPLE} with --kv-cache-dtype kvtuner, but got "
            f"{config.cache_config.block_size}"
        )
    if config.cache_config.kv_cache_dtype_skip_layers:
        problems.append(
            "kv_cache_dtype_skip_layers must be empty with --kv-cache-dtype kvtuner, where the profile's K16V16 layers "
            f"are skipped, but got {config.cache_config.kv_cache_dtype_skip_layers}"
        )
    if is_calibration(config) and config.compilation_config.cudagraph_mode.name != "NONE":
        problems.append(
            f"cudagraph_mode must be NONE with {CALIBRATION_KEY} (such as by enforce_eager), since a graph "
            f"replays the pair it was captured with, but got {config.compilation_config.cudagraph_mode.name}"
        )
    problems += speculation(config) + mamba2_on_cpu(config) + context_parallel_on_cpu(config) + causality(config)
    problems += refused_transfers(config)
    return tuple(problems)


def mamba2_on_cpu(config: VllmConfig) -> list[str]:
    """vLLM 0.32.0's CPU kernel returns a state per prompt where its prefix cache asks for one per chunk.

    The first batch then ends the engine in an IndexError, with any cache.
    """
    from vllm.platforms import current_platform

    text = config.model_config.hf_text_config
    has_mamba2 = any(getattr(text, key, None) for key in ("mamba_n_heads", "n_mamba_heads", "mamba_num_heads"))
    if not current_platform.is_cpu() or not has_mamba2 or not config.cache_config.enable_prefix_caching:
        return []
    return [
        "enable_prefix_caching must be false on a CPU (--no-enable-prefix-caching) for a model with Mamba-2 layers, "
        "whose states vLLM's CPU kernels do not keep, but got true"
    ]


def speculation(config: VllmConfig) -> list[str]:
    """Of speculative decoding, whatever drafts."""
    from vllm.v1.attention.backend import max_decode_query_len

    speculative = config.speculative_config
    if speculative is None:
        return []
    problems = []
    # Longer verifications would be planned on the host, which under asynchronous scheduling does not know how many
    # drafted tokens were accepted, and would be frozen in a CUDA graph.
    if (tokens := max_decode_query_len(config)) > MAX_DECODE_QUERY_LEN:
        most = (MAX_DECODE_QUERY_LEN - 1) * speculative.num_speculative_tokens // (tokens - 1)
        problems.append(
            f"num_speculative_tokens must be at most {most} with --kv-cache-dtype kvtuner, whose decode kernel takes "
            f"{MAX_DECODE_QUERY_LEN} tokens of a request at once, but got {speculative.num_speculative_tokens}"
        )
    if speculative.kv_cache_dtype == KV_CACHE_DTYPE:
        problems.append(
            "kv_cache_dtype of the speculative configuration must be one of vLLM's own, since the profile is the "
            f"target's, whose draft model is not quantized, but got {KV_CACHE_DTYPE}"
        )
    return problems


def draft_model(config: VllmConfig, resolved: ResolvedProfile) -> tuple[str, ...]:
    """vLLM's model runner V1 hands a draft model the block table of the first KV cache group, whichever its own is.

    It then writes its keys into other requests' blocks, with any cache: ``spec_decode_common_attn_metadata`` in
    ``_build_attention_metadata`` asks for the drafter's own group (kv_cache_gid) for other kinds of drafters only.
    """
    speculative = config.speculative_config
    if speculative is None or not speculative.uses_draft_model() or config.use_v2_model_runner:
        return ()
    if not needs_packed_blocks(config, resolved):
        return ()
    return (
        "speculative decoding must do without a draft model (n-gram and EAGLE serve) where the model mixes kinds of "
        "layers or the profile has a recent_window, since vLLM's model runner V1 then mixes up their blocks, but got "
        f"{speculative.model}",
    )


def context_parallel_on_cpu(config: VllmConfig) -> list[str]:
    """vLLM's CPU build computes slots of one rank alone, and stops with an assertion once weights are loaded."""
    from vllm.platforms import current_platform

    size = config.parallel_config.decode_context_parallel_size
    if size == 1 or not current_platform.is_cpu():
        return []
    return [f"decode_context_parallel_size must be 1 on a CPU, where vLLM does not serve it, but got {size}"]


def context_parallel(config: VllmConfig, resolved: ResolvedProfile) -> tuple[str, ...]:
    """What does not work where the ranks of a KV head store a part of a request's tokens each.

    Places of tokens on a rank are not those in their request, so that nothing is served that asks for the latter
    (attention/context_parallel.py).
    """
    size = config.parallel_config.decode_context_parallel_size
    if size == 1:
        return ()
    source = resolved.profile.source or resolved.profile.name
    with_size = f"with decode_context_parallel_size={size}"
    problems = []
    if resolved.recent_windows:
        windows = "/".join(str(window.tokens) for window in resolved.recent_windows)
        problems.append(f"{source}: recent_window must be 0 {with_size}, but got {windows}")
    if offsets := [layer.index for layer in resolved.layers if layer.transforms.key_offset is True]:
        problems.append(
            f"{source}: key_offset must be false {with_size}, but got true for layers {format_layers(offsets)}"
        )
    if resolved.attend_cached_prefill:
        problems.append(f"{source}: attend_cached_prefill must be false {with_size}, but got true")
    if config.speculative_config is not None:
        problems.append(f"speculative_config must be left out {with_size}, but got {config.speculative_config.method}")
    if is_calibration(config):
        problems.append(f"{CALIBRATION_KEY} must be false {with_size}, but got true")
    if mixes_attention_kinds(config) or config.model_config.is_hybrid or sliding_layers(config, resolved):
        problems.append(
            f"{config.model_config.model}: all layers must attend to all tokens {with_size}, but the model has "
            "sliding-window or linear-attention layers"
        )
    if reads_others_tokens(config) or config.model_config.is_mm_prefix_lm:
        problems.append(
            f"{config.model_config.model}: layers must attend causally to keys of their own {with_size}, but the "
            "model's read those of others, or of later tokens"
        )
    return tuple(problems)


STORE_OP = "vllm::unified_kv_cache_update"
"""The custom op that calls a backend's ``do_kv_cache_update``."""


def captured_stores(config: VllmConfig, resolved: ResolvedProfile) -> tuple[str, ...]:
    """Where piecewise CUDA graphs hold the stores, these replay what they were captured with.

    That is right for slots, which stay in one place, and wrong for the window's slots and the tokens' positions, which
    a batch with prompts brings anew.
    """
    from vllm import envs as vllm_envs

    compilation = config.compilation_config
    if not compilation.cudagraph_mode.has_piecewise_cudagraphs():
        return ()
    if not resolved.recent_windows and not any(layer.transforms.key_offset for layer in resolved.layers):
        return ()
    got = None
    if vllm_envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        got = "VLLM_USE_BREAKABLE_CUDAGRAPH=1, which vLLM also sets by itself for some models (=0 turns it off)"
    elif STORE_OP not in (compilation.splitting_ops or ()):
        partition = "use_inductor_graph_partition" if compilation.use_inductor_graph_partition else "splitting_ops"
        got = f"{partition} that leaves {STORE_OP} in them"
    if got is None:
        return ()
    source = resolved.profile.source or resolved.profile.name
    return (
        f"{source}: piecewise CUDA graphs must leave stores out with a recent_window or a key_offset "
        f"(cudagraph_mode FULL_DECODE_ONLY does too), but got {got}",
    )


def shared_tokens(config: VllmConfig, resolved: ResolvedProfile) -> tuple[str, ...]:
    """Attention that is handed no keys reads a step's tokens back from the pages, where a window's are not."""
    if not resolved.recent_windows or not reads_others_tokens(config):
        return ()
    windows = "/".join(str(window.tokens) for window in resolved.recent_windows)
    rule = "must be 0 for a model whose layers also read what another pass or layer has stored in the same step"
    return (f"{resolved.profile.source or resolved.profile.name}: recent_window {rule}, but got {windows}",)


def files_of_ranks(config: VllmConfig) -> tuple[str, ...]:
    """ExampleConnector names a file by layer and prompt alone, so that each rank's heads overwrite the others'."""
    transfer, ranks = config.kv_transfer_config, config.parallel_config.tensor_parallel_size
    if transfer is None or transfer.kv_connector != EXAMPLE or transfer.kv_connector_module_path is not None:
        return ()
    if ranks == 1:
        return ()
    return (f"tensor_parallel_size must be 1 with {EXAMPLE}, whose ranks write to the same files, but got {ranks}",)


def _loses_sink_tokens(transfer: KVTransferConfig | None) -> str | None:
    """A connector that does not bring sink tokens back, as it was asked for.

    Those that do: compat/offloading.py, compat/transfers.py.
    """
    if transfer is None:
        return None
    if transfer.kv_connector in NIXL_PULL and transfer.kv_connector_module_path is None:
        return None
    if transfer.kv_connector != OFFLOADING or transfer.kv_connector_module_path is not None:
        return str(transfer.kv_connector)
    extra = transfer.kv_connector_extra_config
    if "block_size" in extra:
        return f"{OFFLOADING} and a block_size of its own"
    if int(extra.get("blocks_per_chunk") or 1) != 1:
        return f"{OFFLOADING} and blocks_per_chunk={extra['blocks_per_chunk']}"
    return None


def recent_windows(config: VllmConfig, resolved: ResolvedProfile) -> tuple[str, ...]:
    """What a profile with recent windows does not work with."""
    from vllm.platforms import current_platform

    problems = []
    source = resolved.profile.source or resolved.profile.name
    bits, sink_tokens = resolved.profile.recent_window_bits, resolved.profile.sink_tokens
    if sink_tokens and bits != UNQUANTIZED.k_bits and not current_platform.is_cpu():
        problems.append(
            f"{source}: sink_tokens must be 0 on a GPU with recent_window_bits: {bits}, which serves them in "
            f"{UNQUANTIZED.k_bits} bits, but got {sink_tokens}"
        )
    if sink_tokens and (connector := _loses_sink_tokens(config.kv_transfer_config)):
        problems.append(
            f"{source}: sink_tokens must be 0 with a KV connector, which brings back a window's newest tokens alone "
            f"(NixlConnector serves, and OffloadingConnector with one block per chunk), but got {sink_tokens} with "
            f"{connector}"
        )
    if not current_platform.is_cpu() and resolved.attend_cached_prefill and bits != UNQUANTIZED.k_bits:
        problems.append(
            f"{source}: recent_window_bits must be {UNQUANTIZED.k_bits} with attend_cached_prefill on a GPU, where a "
            f"chunk's own newest tokens are read as they are, but got {bits}"
        )
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        problems.append(
            "disable_hybrid_kv_cache_manager must be false with a recent_window, which would be kept of all tokens, "
            "but got true (a KV connector without support for it sets it too)"
        )
    return tuple(problems)
