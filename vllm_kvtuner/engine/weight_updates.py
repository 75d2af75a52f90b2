"""What follows from a model's weights, once others have been loaded into a running engine.

That is the key offset of a layer whose profile says ``from_weights``. Any offset is given back exactly, so that the one
of before is right for all pages that were stored with it, and only costs quality where biases have moved away from it.
It is kept while it leaves little of the new ones. Else it is made anew, and no page that was stored with the one of
before may be read again. Statics of a file stay as they are: they were calibrated, and right for any weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvtuner.engine.config import is_calibration, resolved_profile, uses_kvtuner
from vllm_kvtuner.engine.key_bias import key_bias, rest_of_bias
from vllm_kvtuner.engine.statics import bind_statics
from vllm_kvtuner.profile.problems import format_layers
from vllm_kvtuner.profile.profile import FROM_WEIGHTS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEPT_REST = 0.5
"""Root mean square of what an offset in use may leave of a layer's bias. A new one leaves LARGEST_REST at most; between
the two, biases that move a little in each update do not ask for another each time."""


def follows_weights(config: VllmConfig) -> bool:
    """Whether layers of an engine take their key offset from its weights."""
    if not uses_kvtuner(config) or is_calibration(config):
        return False
    return any(layer.transforms.key_offset == FROM_WEIGHTS for layer in resolved_profile(config).layers)


def renew_offsets(worker: Any) -> bool:
    """Make the key offsets anew of layers whose k biases have moved away from them; run in every worker by the engine
    core once weights were loaded, and before a step is scheduled.

    Args:
        worker: of vLLM's, its weights whole.

    Returns:
        Whether some have changed: pages stored before must not be read again.

    Raises:
        ValueError: offsets must change, and cannot: CUDA graphs hold those of before, or a KV connector has pages
            that were stored with them. Nothing has changed then, and the offsets of before are still exact. Or as
            :func:`vllm_kvtuner.engine.statics.bind_statics`.
    """
    config = worker.vllm_config
    moved = [layer for layer, rest in _rests(worker) if not rest <= KEPT_REST]
    if not moved:
        return False
    why = None
    if config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        why = (
            "full CUDA graphs hold them; start the engine with weights of such biases (not load_format dummy), or with "
            "cudagraph_mode PIECEWISE or NONE"
        )
    elif config.kv_transfer_config is not None:
        why = "a KV connector may bring pages back that were stored with them; start the engine anew"
    if why is not None:
        layers = format_layers([layer.impl.settings.precision.index for layer in moved])
        raise ValueError(
            f"key_offset from_weights of layers {layers} must change for the loaded weights, whose k biases are others "
            f"(root mean square of the rest above {KEPT_REST}), but {why}"
        )
    for layer in moved:
        layer.impl.configure(layer.impl.settings)
    bind_statics(worker)
    return True


def _rests(worker: Any) -> list[tuple[Any, float]]:
    """Layers whose offset follows the weights, and what theirs leaves of the bias; the same on all ranks of a layer."""
    layers = {
        name: layer
        for name, layer in worker.vllm_config.compilation_config.static_forward_context.items()
        if hasattr(getattr(layer, "impl", None), "settings")
        and layer.impl.settings.precision.transforms.key_offset == FROM_WEIGHTS
    }
    model = worker.get_model()
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    found = []
    for layer in layers.values():
        impl = layer.impl
        parent = modules.get(names.get(id(layer), "").rpartition(".")[0], model)
        try:
            bias = key_bias(parent, impl.num_kv_heads, impl.head_size, impl.dtype)
        except ValueError:  # a layer of a profile that adapts, which was left without an offset when it was loaded
            continue
        if bias is not None:
            found.append((layer, rest_of_bias(bias, impl.transforms.key_offset)))
    return found
