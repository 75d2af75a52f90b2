"""Which attention backend a layer has, and what it learns once the model is loaded."""

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

from vllm.compilation import backends as compilation_backends
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import registry
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvtuner.attention.backend import backend_for
from vllm_kvtuner.attention.impl import LayerSettings
from vllm_kvtuner.attention.window_cache import give_window
from vllm_kvtuner.compat.patching import after
from vllm_kvtuner.engine.config import (
    BACKEND_NAME,
    is_calibration,
    layer_precision,
    needs_packed_blocks,
    resolved_profile,
    uses_kvtuner,
)
from vllm_kvtuner.engine.layer_names import MetLayer, layer_index, layers_of_rank, problems_of
from vllm_kvtuner.engine.statics import bind_statics
from vllm_kvtuner.profile.model_shape import LayerShape
from vllm_kvtuner.profile.problems import ProfileError

MET = "kvtuner_met"
"""Attribute of the target model's attention layers: what was built, a MetLayer."""
SERVED_ARGUMENTS = frozenset({"sinks"})
"""What models may tell of a layer beyond the arguments of vLLM's Attention, and packed pages serve."""


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
    see a cache configuration of dtype "auto", and so does, until the model is refused, what packed pages do not serve.
    Can go when selection is per layer.
    """
    original = Attention.__init__
    own = inspect.signature(original).parameters

    @functools.wraps(original)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config()
        if not uses_kvtuner(config) or kwargs.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER:
            return original(self, *args, **kwargs)
        # A layer that shares another's cache reads that one's pages.
        owner = kwargs.get("kv_sharing_target_layer_name")
        is_target = not _builds_draft_model()
        precision = layer_precision(config, owner or kwargs["prefix"]) if is_target else None
        unlike = _unlike(self, kwargs, own)
        if precision is None or not precision.pair.is_quantized or unlike is not None:
            _leave_to_vllm(kwargs)
            original(self, *args, **kwargs)
        else:
            resolved = resolved_profile(config)
            kwargs["attn_backend"] = backend_for(
                precision.pair, needs_packed_blocks(config, resolved), is_calibration(config), precision.recent
            )
            kwargs["settings"] = LayerSettings(precision, resolved.attend_cached_prefill)
            original(self, *args, **kwargs)
            if precision.recent is not None:
                give_window(self, precision.recent, owner)
        if is_target:
            index = layer_index(config, owner or self.layer_name)
            shape = LayerShape(self.num_kv_heads, self.head_size)
            setattr(self, MET, MetLayer(self.layer_name, index, shape, self.head_size_v, unlike, owner is not None))

    Attention.__init__ = init


def _leave_to_vllm(kwargs: dict[str, Any]) -> None:
    """Let a layer have vLLM's own cache, in the model's dtype.

    Where the checkpoint brings a scheme, vLLM takes a dtype of "auto" for it. So the layer does not hear of the scheme;
    the scales that the checkpoint has are still loaded as the scheme lays them out.
    """
    if kwargs.get("cache_config") is not None:
        kwargs["cache_config"] = copy.copy(kwargs["cache_config"])
        kwargs["cache_config"].cache_dtype = "auto"
    quantization = kwargs.get("quant_config")
    if quantization is not None and getattr(quantization, "kv_cache_scheme", None) is not None:
        kwargs["quant_config"] = plain = copy.copy(quantization)
        plain.kv_cache_scheme, plain.get_quant_method = None, quantization.get_quant_method


def _unlike(layer: Attention, kwargs: dict[str, Any], own: Mapping[str, Any]) -> str | None:
    """What sets a layer apart from causal attention over its own keys and values, or None; takes out what does not."""
    if kwargs.get("chunk_lookback", 0) < 0:  # no chunks
        del kwargs["chunk_lookback"]
    if further := sorted(kwargs.keys() - own.keys() - SERVED_ARGUMENTS):
        return f"the arguments {', '.join(further)}"
    if type(layer) is not Attention:
        return f"a {type(layer).__name__}"
    if kwargs.get("attn_backend") is not None:
        return f"an attention backend of its own, {kwargs['attn_backend'].get_name()}"
    return None


def check_layers_are_met() -> None:
    """Refuse a model whose attention layers are not, one for one, those that the profile was resolved for.

    Symptom: layers that vLLM names otherwise, or builds otherwise than the model's configuration says, stay
    unquantized, or have another layer's pair, without a word. Cause: names are known only once the model is built. So
    it is checked between that and the loading of weights; and once more after it, since loaders that share weights
    between processes build models in their own way. Can go when vLLM numbers the layers of a cache.
    """
    original = BaseModelLoader.create_model

    @functools.wraps(original)
    def create_model(self: BaseModelLoader, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        model = original(self, vllm_config, *args, **kwargs)
        if not _builds_draft_model():
            refuse_unmet_layers(vllm_config)
        return model

    BaseModelLoader.create_model = create_model
    after(Worker, "load_model", lambda _, worker, **__: refuse_unmet_layers(worker.vllm_config))


def refuse_unmet_layers(config: VllmConfig) -> None:
    """Raises:
    ProfileError: layers of the profile that no attention layer is, and the other way round, all at once.
    """
    if not uses_kvtuner(config):
        return
    layers = config.compilation_config.static_forward_context.values()
    met = [getattr(layer, MET) for layer in layers if hasattr(layer, MET)]
    resolved, ranks = resolved_profile(config), config.parallel_config.tensor_parallel_size
    if problems := problems_of(met, resolved, ranks, layers_of_rank(config, resolved)):
        raise ProfileError(f"{config.model_config.model}: {problem}" for problem in problems)


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
