"""Which layer of a profile an attention layer of vLLM's model is, and that each is met exactly once.

vLLM knows its layers by names, a profile by numbers. Most names hold the decoder layer's number and no other; models
whose names do not are listed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvtuner.profile.model_shape import LayerShape, num_loops
from vllm_kvtuner.profile.problems import format_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.profile import LayerPrecision, ResolvedProfile


def layer_index(config: VllmConfig, layer_name: str) -> int | None:
    """The profile's number of an attention layer of the target model; None for a name without one number.

    Looped models name the passes over their layers on from the last layer, as :class:`ModelShape` counts them.
    """
    numbers = [int(part) for part in layer_name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        return None
    text = config.model_config.hf_text_config
    if getattr(text, "model_type", None) == "zamba2":
        return _zamba2_layer(text, numbers[0])
    return numbers[0]


def _zamba2_layer(text: Any, use: int) -> int | None:
    """Zamba2's attention layers are named by the uses of its shared blocks, one block's after the other's.

    The decoder layers that use them take the blocks in turn (vLLM's Zamba2Attention).
    """
    hybrid, blocks = list(text.hybrid_layer_ids), text.num_mem_blocks
    # Block b counts on from b (uses + blocks - 1) // blocks, which is where the uses of those before it end.
    numbered = {
        block * (len(hybrid) + blocks - 1) // blocks + turn: layer
        for block in range(blocks)
        for turn, layer in enumerate(hybrid[block::blocks])
    }
    return numbered.get(use)


@dataclass(frozen=True)
class MetLayer:
    """An attention layer that vLLM has built for the target model.

    Args:
        name: vLLM's.
        index: the profile's number; None for a name that says none.
        shape: heads on this rank and head size of what it caches.
        value_size: numbers per head of its values.
        unlike: None, or what sets its attention apart from causal attention over its own keys and values.
        shares: whether it reads another layer's cache and has none.
    """

    name: str
    index: int | None
    shape: LayerShape
    value_size: int
    unlike: str | None = None
    shares: bool = False


def problems_of(
    met: Iterable[MetLayer], resolved: ResolvedProfile, ranks: int, expected: Iterable[int]
) -> tuple[str, ...]:
    """Everything that keeps what a profile says from reaching its layers, one line each with the layers' names.

    Args:
        met: attention layers of a rank's model.
        resolved: the profile, for this model.
        ranks: of tensor parallelism.
        expected: numbers of the layers that this rank has.
    """
    known = {layer.index: layer for layer in resolved.layers}
    problems: list[str] = []
    owners: dict[int, list[str]] = {}
    for layer in met:
        precision = None if layer.index is None else known.get(layer.index)
        if precision is None:
            rule = f"must be one of the model's layers with keys and values ({format_layers(known)})"
            got = "a name without one number" if layer.index is None else f"number {layer.index}"
            problems.append(f"attention layer {layer.name} {rule}, but got {got}")
            continue
        problems += _misfits(layer, precision, ranks)
        if not layer.shares:
            owners.setdefault(precision.index, []).append(layer.name)
    for index, names in owners.items():
        if len(names) > 1:
            problems.append(f"layer {index} must have one attention layer, but got {', '.join(names)}")
    if missing := sorted(set(expected) & known.keys() - owners.keys()):
        rule = "must have an attention layer each, to which the profile's pair goes"
        problems.append(f"layers {format_layers(missing)} {rule}, but vLLM's model has none of their numbers")
    return tuple(problems)


def _misfits(layer: MetLayer, precision: LayerPrecision, ranks: int) -> list[str]:
    """In what a layer's own shape and kind differ from those that the profile was resolved for."""
    problems = []
    heads = max(1, precision.shape.num_kv_heads // ranks)
    if layer.shape != LayerShape(heads, precision.shape.head_size):
        rule = f"must have {heads} KV heads of {precision.shape.head_size} on a rank, as the model's configuration says"
        problems.append(f"{layer.name}: {rule}, but got {layer.shape.num_kv_heads} of {layer.shape.head_size}")
    if precision.pair.is_quantized and layer.value_size != layer.shape.head_size:
        rule = f"must have values of the keys' head size {layer.shape.head_size} at {precision.pair}"
        problems.append(f"{layer.name}: {rule}, but got {layer.value_size}")
    if precision.pair.is_quantized and layer.unlike is not None:
        rule = f"must be causal attention over its own keys and values at {precision.pair}"
        problems.append(f"{layer.name}: {rule}, but got {layer.unlike}")
    return problems


def layers_of_rank(config: VllmConfig, resolved: ResolvedProfile) -> list[int]:
    """Numbers of the profile's layers that a pipeline-parallel rank has."""
    if config.parallel_config.pipeline_parallel_size == 1:
        return [layer.index for layer in resolved.layers]
    start, end = config.model_config.get_layers_start_end_indices(config.parallel_config)
    total = config.model_config.get_total_num_hidden_layers()
    # Every pass of a looped model runs through the layers of all ranks.
    return [layer.index for layer in resolved.layers if start <= layer.index % total < end]


def sliding_layers(config: VllmConfig, resolved: ResolvedProfile) -> frozenset[int]:
    """Layers with a sliding window, of a model that has others beside them; none where all are alike."""
    text = config.model_config.hf_text_config
    if num_loops(text) > 1:
        total = config.model_config.get_total_num_hidden_layers()
        return frozenset(layer.index for layer in resolved.layers if layer.index >= total)
    kinds = getattr(text, "layer_types", None) or ()
    if len(set(kinds)) <= 1:
        return frozenset()
    return frozenset(layer.index for layer in resolved.layers if kinds[layer.index] == "sliding_attention")
