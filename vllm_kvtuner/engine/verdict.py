"""The one verdict on a model: its shape as vLLM reads its configuration, and why it is not served.

The engine asks it of its own configuration; ``kvtuner profile``, ``doctor``, ``calibrate`` and ``evaluate`` ask it of
one that they make for the purpose (kvtuner_tools.model_files). What follows from the configuration's values alone is
:class:`ModelShape`'s to say, what vLLM adds to them is said here, and what depends on an engine's arguments in
checks.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_kvtuner.profile.model_shape import ModelShape

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def model_shape(model: ModelConfig) -> ModelShape:
    """A model as profiles are matched with it.

    Raises:
        ProfileError: the configuration does not say its shape.
    """
    shape = ModelShape.from_hf_config(model.hf_config, model.model)
    if shape.unsupported:
        return shape
    return dataclasses.replace(shape, unsupported=tuple(_unsupported(model)))


def _unsupported(model: Any) -> Iterator[str]:
    """What vLLM knows of a model beyond what its configuration says, and packed pages do not serve."""
    if getattr(model, "use_mla", False):
        yield f"must cache keys and values per head (MLA is not served), but got model_type={_kind(model)!r}"
    if getattr(model, "is_encoder_decoder", False):
        yield "must be a decoder (encoder-decoder models are not served), but got is_encoder_decoder=True"
    if getattr(model, "is_attention_free", False):
        yield "must have attention layers, but got none"
    elif getattr(model, "attn_type", "decoder") == "encoder_only":
        yield "must be a decoder, but got attn_type='encoder_only', which keeps no KV cache"
    if getattr(model, "uses_alibi", False):
        yield f"must have no ALiBi (not served), but got model_type={_kind(model)!r}"


def _kind(model: Any) -> str:
    return str(getattr(model.hf_text_config, "model_type", "unknown"))
