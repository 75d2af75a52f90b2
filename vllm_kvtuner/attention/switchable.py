"""Calibration mode: what the layers of a running engine store can be switched, pair and transforms alike.

Pages keep the size of the pair that the engine was built with. A smaller pair's chunk takes the first bytes of each
(block, KV head) chunk, in the very layout and by the very kernels that serve it.
"""

from dataclasses import replace
from typing import Any

import torch

from vllm_kvtuner.attention.impl import KVTunerImpl
from vllm_kvtuner.engine.config import resolved_profile
from vllm_kvtuner.engine.statics import bind_statics
from vllm_kvtuner.pages.layout import PageLayout, content_bytes
from vllm_kvtuner.pages.views import chunks_of
from vllm_kvtuner.profile.profile import LayerPrecision, ResolvedProfile


class SwitchableImpl(KVTunerImpl):
    """A layer whose pages may hold a smaller pair than they have room for."""

    def view(self, kv_cache: torch.Tensor, layout: PageLayout) -> torch.Tensor:
        """The first bytes of each chunk."""
        return chunks_of(kv_cache, layout)


def switch(worker: Any, resolved: ResolvedProfile) -> None:
    """Make every layer store what a profile says; what it stored before has no meaning any more.

    For vLLM's ``collective_rpc``; the caller empties the prefix cache.

    Args:
        worker: of an engine in calibration mode.
        resolved: pairs, transforms and statics, resolved against the engine's model.

    Raises:
        ValueError: a pair that needs more room than its layer's pages have, K16V16 where the engine was built with a
            quantized layer, or the other way round, or another recent window than it was built with;
            nothing is switched then. Or the statics do not fit.
    """
    room = {layer.index: layer for layer in resolved_profile(worker.vllm_config).layers}
    if refusals := [refusal for layer in resolved.layers if (refusal := _refusal(layer, room[layer.index]))]:
        raise ValueError("\n".join(refusals))
    precisions = {layer.index: layer for layer in resolved.layers}
    for layer in worker.vllm_config.compilation_config.static_forward_context.values():
        if isinstance(impl := getattr(layer, "impl", None), SwitchableImpl):
            impl.configure(replace(impl.settings, precision=precisions[impl.settings.precision.index]))
    bind_statics(worker, resolved)


def _refusal(layer: LayerPrecision, built: LayerPrecision) -> str | None:
    """Why a layer cannot store what a profile says in the pages it was built with, or None if it can."""
    room = built.pair
    if layer.recent != built.recent:
        rule = f"must have the recent window that this engine was built with ({built.recent or 'none'})"
        return f"layers.{layer.index}: {rule}, but got {layer.recent or 'none'}"
    if layer.pair.is_quantized != room.is_quantized:
        rule = "must be quantized in this engine" if room.is_quantized else "must be K16V16 in this engine"
    elif content_bytes(layer.pair, layer.shape.head_size) > content_bytes(room, layer.shape.head_size):
        rule = f"must fit pages made for {room}"
    else:
        return None
    return f"layers.{layer.index}: {rule}, but got {layer.pair}"
