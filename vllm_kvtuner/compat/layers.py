"""Which attention backend a layer has, and what it learns once the model is loaded."""

import copy
import functools
from typing import Any

from vllm.compilation import backends as compilation_backends
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import registry
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvtuner.attention.backend import backend_for
from vllm_kvtuner.attention.impl import LayerSettings
from vllm_kvtuner.attention.window_cache import give_window
from vllm_kvtuner.compat.patching import after
from vllm_kvtuner.engine.causality import own_way_of_attending
from vllm_kvtuner.engine.config import (
    BACKEND_NAME,
    is_calibration,
    layer_precision,
    needs_packed_blocks,
    resolved_profile,
    uses_kvtuner,
)
from vllm_kvtuner.engine.statics import bind_statics


def register_backend() -> None:
    """Resolve the name of our backends.

    Symptom: vLLM looks up ``AttentionBackendEnum[backend.get_name()]`` and fails. Cause: a name has no class until a
    plugin registers one. Not a patch; stays. The name is our own, so that another plugin can have CUSTOM.
    """
    registry.register_backend(BACKEND_NAME, "vllm_kvtuner.attention.backend.KVTunerBackend")


def give_layers_their_backend() -> None:
    """Give each attention layer the backend of its own pair.

    Symptom: one backend for all layers. Cause: selection (``get_attn_backend``) is per model; the constructor takes
    ``attn_backend``, but models do not pass it. Layers that the profile leaves at K16V16, and those of a draft model,
    see a cache configuration of dtype "auto". Can go when selection is per layer.
    """
    original = Attention.__init__

    @functools.wraps(original)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config()
        if not uses_kvtuner(config) or kwargs.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER:
            return original(self, *args, **kwargs)
        # A layer that shares another's cache reads that one's pages.
        name = kwargs.get("kv_sharing_target_layer_name") or kwargs["prefix"]
        precision = None if _builds_draft_model() else layer_precision(config, name)
        if precision is None or not precision.pair.is_quantized:
            if kwargs.get("cache_config") is not None:
                kwargs["cache_config"] = copy.copy(kwargs["cache_config"])
                kwargs["cache_config"].cache_dtype = "auto"
            return original(self, *args, **kwargs)
        _refuse_own_way(self, name, kwargs.get("attn_backend"))
        resolved = resolved_profile(config)
        kwargs["attn_backend"] = backend_for(
            precision.pair, needs_packed_blocks(config, resolved), is_calibration(config), precision.recent
        )
        kwargs["settings"] = LayerSettings(precision, resolved.attend_cached_prefill)
        original(self, *args, **kwargs)
        if precision.recent is not None:
            give_window(self, precision.recent, kwargs.get("kv_sharing_target_layer_name"))

    Attention.__init__ = init


def _refuse_own_way(layer: Attention, name: str, backend: type | None) -> None:
    """Raise ValueError for a layer of a kind that :func:`own_way_of_attending` refuses."""
    kind = type(layer)
    own_spec = kind.get_kv_cache_spec is not Attention.get_kv_cache_spec
    if refusal := own_way_of_attending(name, kind.__name__, getattr(backend, "__name__", None), own_spec):
        raise ValueError(refusal)


def _builds_draft_model() -> bool:
    """Whether vLLM is building what drafts tokens, rather than the model that is served.

    A draft model may lie in the target's own folder, and the layers of multi-token prediction heads are counted from 0
    as the target's are, so neither the folder nor a layer's name tells. Every proposer of both versions builds under a
    tag of its own, while the target is built under "backbone".
    """
    return compilation_backends.model_tag != "backbone"


def bind_statics_after_loading() -> None:
    """Bind statics and rotary tables once the model is there.

    Symptom: an implementation sees neither its layer's name nor the model. Cause: its constructor gets neither. Can
    go when implementations can reach their model.
    """

    def bind(_: None, worker: Worker, **__: Any) -> None:
        if uses_kvtuner(worker.vllm_config):
            bind_statics(worker)

    after(Worker, "load_model", bind)
