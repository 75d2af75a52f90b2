"""What follows from a model's weights, once others have been loaded into a running engine.

That is the key offset and the round feedback of keys of a layer whose profile says ``from_weights``. Any offset is
given back exactly, so that the one of before is right for all pages that were stored with it, and only costs quality
where biases have moved away from it. It is kept while it leaves little of the new ones. Else it is made anew, and no
page that was stored with the one of before may be read again. Feedback is always made anew: nothing that reads pages
needs it. Statics of a file stay as they are: they were calibrated, and right for any weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_kvtuner.engine.config import is_calibration, resolved_profile, uses_kvtuner
from vllm_kvtuner.engine.key_bias import key_bias, rest_of_bias
from vllm_kvtuner.engine.modules import Modules
from vllm_kvtuner.engine.query_feedback import Feedbacks
from vllm_kvtuner.engine.statics import bind_statics, heads_of_layer
from vllm_kvtuner.profile.problems import format_layers
from vllm_kvtuner.profile.profile import FROM_WEIGHTS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KEPT_REST = 0.5
"""Root mean square of what an offset in use may leave of a layer's bias. A new one leaves LARGEST_REST at most; between
the two, biases that move a little in each update do not ask for another each time."""


def follows_weights(config: VllmConfig) -> bool:
    """Whether layers of an engine take their key offset or round feedback from its weights."""
    if not uses_kvtuner(config) or is_calibration(config):
        return False
    return any(layer.transforms.follows_weights for layer in resolved_profile(config).layers)


def renew_transforms(worker: Any) -> bool:
    """Make anew the key offsets of layers whose k biases have moved away from them, and all round feedback of weights;
    run in every worker by the engine core once weights were loaded, and before a step is scheduled.

    Args:
        worker: of vLLM's, its weights whole.

    Returns:
        Whether some have changed: pages stored before must not be read again.

    Raises:
        ValueError: offsets must change, and cannot: CUDA graphs hold those of before, or a KV connector has pages
            that were stored with them. Nothing has changed then, and the offsets of before are still exact. Or as
            :func:`vllm_kvtuner.engine.statics.bind_statics`.
    """
    moved = [layer for layer, rest in _rests(worker) if not rest <= KEPT_REST]
    if moved:
        _renew_offsets(worker, moved)
    _renew_feedback(worker, moved)
    return bool(moved)


def _renew_offsets(worker: Any, moved: list[Any]) -> None:
    config, why = worker.vllm_config, None
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


def _renew_feedback(worker: Any, bound: list[Any]) -> None:
    """Of all layers that have it but those that were bound just now."""
    config = worker.vllm_config
    layers = [
        layer
        for layer in _layers(config, "key_round_feedback")
        if layer not in bound and layer.impl.transforms.key_feedback is not None
    ]
    if not layers:
        return
    feedbacks = Feedbacks(Modules(worker.get_model()), config, resolved_profile(config).profile.adapts)
    in_place = config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    for layer in layers:
        impl = layer.impl
        made = feedbacks.of(layer, heads_of_layer(layer), impl.transforms.key_equalization)
        if made is None:  # weights that cannot be read any more, such as numbers that are not finite: as before
            continue
        if in_place:
            impl.transforms.key_feedback.take_over(made)
        else:  # kernels may hold copies
            impl.bind_statics(replace(impl.transforms, key_feedback=made))


def _layers(config: VllmConfig, transform: str) -> list[Any]:
    """Those that make a transform of weights."""
    return [
        layer
        for layer in config.compilation_config.static_forward_context.values()
        if hasattr(getattr(layer, "impl", None), "settings")
        and getattr(layer.impl.settings.precision.transforms, transform) == FROM_WEIGHTS
    ]


def _rests(worker: Any) -> list[tuple[Any, float]]:
    """Layers whose offset follows the weights, and what theirs leaves of the bias; the same on all ranks of a layer."""
    modules = Modules(worker.get_model())
    found = []
    for layer in _layers(worker.vllm_config, "key_offset"):
        impl, parent = layer.impl, modules.parent(layer)
        try:
            bias = key_bias(parent, impl.num_kv_heads, impl.head_size, impl.dtype)
        except ValueError:  # a layer of a profile that adapts, which was left without an offset when it was loaded
            continue
        if bias is not None:
            found.append((layer, rest_of_bias(bias, impl.transforms.key_offset)))
    return found
