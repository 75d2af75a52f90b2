"""Refuse attention that is not causal in a way that packed pages do not serve, before any weight is loaded.

Packed pages are attended to causally, within a sliding window where the layer has one. What only a layer tells of
itself, compat/layers.py refuses once the model is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.profile import ResolvedProfile


def causality(config: VllmConfig) -> list[str]:
    """What a configuration says of attention that is not causal, each problem in one line."""
    model, problems = config.model_config, []
    if model.is_mm_prefix_lm and config.speculative_config is not None:
        problems.append(
            "speculative decoding must be left out with --kv-cache-dtype kvtuner, or the engine serve text alone "
            f"(--language-model-only), where pictures attend in both directions, but got {model.model} with "
            f"{config.speculative_config.method}"
        )
    if config.attention_config.use_non_causal:
        problems.append(
            "attention must be causal for all requests of a batch with --kv-cache-dtype kvtuner, but got "
            f"attention_config.use_non_causal=True, which {model.model} needs or an argument asks for"
        )
    if config.diffusion_config is not None:
        problems.append(
            "tokens must be generated one after the other with --kv-cache-dtype kvtuner, but got a diffusion_config, "
            f"under which {model.model} attends causally in one step and in both directions in another"
        )
    return problems


def pictures_read_back(config: VllmConfig, resolved: ResolvedProfile) -> tuple[str, ...]:
    """Prefill that reads back what it stored does so causally."""
    if not config.model_config.is_mm_prefix_lm or not resolved.attend_cached_prefill:
        return ()
    source = resolved.profile.source or resolved.profile.name
    return (
        f"{source}: attend_cached_prefill must be false or the engine serve text alone (--language-model-only) where "
        f"pictures attend in both directions, but got true for {config.model_config.model}",
    )
