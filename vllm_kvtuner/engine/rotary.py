"""The rotary embedding of an attention layer, in a model of vLLM's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def rotary_module(parent: torch.nn.Module, config: VllmConfig) -> torch.nn.Module | None:
    """That beside an attention layer, None if the layer rotates nothing.

    Args:
        parent: the module that holds the attention layer.
        config: of the engine.

    Raises:
        ValueError: what is needed, and what the model has: it has RoPE, but keeps it elsewhere (Transformers' own
            modelling code does).
    """
    if not hasattr(parent, "rotary_emb") and getattr(config.model_config.hf_text_config, "rope_parameters", None):
        raise ValueError(
            f"the rotary embedding beside the attention layer, but the model's {type(parent).__name__} has none"
        )
    return getattr(parent, "rotary_emb", None)


def table_of(module: torch.nn.Module) -> tuple[torch.Tensor, bool]:
    """Its table of the contexts in use, [max_position, rotary_dim], and whether RotaryTable.is_neox.

    Raises:
        ValueError: what is needed, and what the model has.
    """
    if hasattr(module, "long_short_cos_sin_cache"):  # Phi-3 keeps the tables of short and long contexts in one
        table, split = module.long_short_cos_sin_cache, module.original_max_position_embeddings
        table = table[split:] if module.use_long_rope else table[:split]
    else:
        table = getattr(module, "cos_sin_cache", None)
    if table is None or table.ndim != 2 or table.is_complex():
        raise ValueError(f"a rotary table with one row per position, but the model's {type(module).__name__} has none")
    return table, getattr(module, "is_neox_style", True)
