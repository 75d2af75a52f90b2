"""Give layers their static tensors, what follows from their weights, and the rotary table once the model is loaded."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvtuner.engine.config import resolved_profile
from vllm_kvtuner.engine.key_bias import key_bias, largest_pairs
from vllm_kvtuner.engine.modules import Modules
from vllm_kvtuner.engine.mrope import MRope
from vllm_kvtuner.engine.query_feedback import Feedbacks
from vllm_kvtuner.engine.rotary import rotary_module, table_of
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.transforms import LayerTransforms, RotaryTable, linear_rotary
from vllm_kvtuner.profile.problems import format_layers
from vllm_kvtuner.profile.profile import FROM_WEIGHTS
from vllm_kvtuner.profile.statics import LayerStatics, load_statics

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.profile import ResolvedProfile
    from vllm_kvtuner.profile.statics import FeedbackStatics

logger = logging.getLogger("vllm.kvtuner")


def bind_statics(worker: Any, resolved: ResolvedProfile | None = None) -> None:
    """Complete the transforms of every layer that needs the model for them: statics, weights, rotary table.

    Under tensor parallelism a rank takes the rows of its own KV heads.

    Args:
        worker: of vLLM's, its model loaded.
        resolved: what the layers were switched to in calibration mode; by default the engine's profile.

    Raises:
        ValueError: the statics file is missing, unreadable or does not fit, a layer's rotary embedding is of a kind
            whose table is not one row per position, or its projections of a kind whose bias or weights cannot be told.
            A profile that adapts goes without the offset, or with nearest codes, there.
    """
    config = worker.vllm_config
    layers = {
        name: layer
        for name, layer in config.compilation_config.static_forward_context.items()
        if getattr(getattr(layer, "impl", None), "needs_model", False)
    }
    if not layers:
        return
    from vllm.distributed import get_tensor_model_parallel_rank

    model = worker.get_model()
    resolved = resolved or resolved_profile(config)
    path = resolved.profile.statics
    assert path is not None or not any(layer.transforms.needs_statics for layer in resolved.layers)
    statics = {} if path is None else load_statics(path, resolved)
    modules = Modules(model)
    offsets, mrope = Offsets(), MRope.of(worker.model_runner, config)
    feedbacks = Feedbacks(modules, config, resolved.profile.adapts)
    for layer in layers.values():
        precision = layer.impl.settings.precision
        device = next(model.parameters()).device
        heads = heads_of_layer(layer)

        chosen, static = precision.transforms, statics.get(precision.index, LayerStatics())
        tensor = functools.partial(_on_device, heads=heads, device=device)
        feedback = functools.partial(_feedback, heads=heads, device=device)
        offset, rotary = tensor(static.key_offset), None
        if chosen.key_offset:
            parent = modules.parent(layer)
            try:
                rotary = layer_rotary(parent, config, precision.index, mrope)
                if chosen.key_offset == FROM_WEIGHTS:
                    offset = offsets.of(layer, parent, rotary)
            except ValueError as error:
                if not resolved.profile.adapts:
                    raise
                offsets.left_out.setdefault(str(error).partition(": ")[2], []).append(precision.index)
        refuse_sharded(offset, config, precision.index)
        equalization = tensor(static.key_equalization) if chosen.key_equalization else None
        key_feedback = feedback(static.key_round_feedback) if chosen.key_round_feedback is True else None
        if chosen.key_round_feedback == FROM_WEIGHTS:
            key_feedback = feedbacks.of(layer, heads, equalization)
        layer.impl.bind_statics(
            LayerTransforms(
                key_offset=offset,
                rotary=None if offset is None else rotary,
                key_equalization=equalization,
                key_hadamard=chosen.key_hadamard,
                value_hadamard=chosen.value_hadamard,
                range_search=chosen.range_search,
                key_feedback=key_feedback,
                value_feedback=feedback(static.value_round_feedback) if chosen.value_round_feedback else None,
            )
        )
    if get_tensor_model_parallel_rank() == 0:
        offsets.log()
        feedbacks.log()


def refuse_sharded(offset: torch.Tensor | None, config: VllmConfig, layer: int) -> None:
    """Raises:
    ValueError: an offset where a token's place on a rank is not that in its request, by which it is given back. Whether
        a layer has one is known once its weights are.
    """
    size = config.parallel_config.decode_context_parallel_size
    if offset is not None and size > 1:
        raise ValueError(
            f"layer {layer}: key_offset must be false with decode_context_parallel_size={size}, but the model's k "
            "projection has a bias that needs one"
        )


@dataclass
class Offsets:
    """Key offsets that were made of weights.

    Args:
        pairs: layers by the number of RoPE pairs that their offset has; 0 where biases are small.
        left_out: layers that go without by the reason.
    """

    pairs: dict[int, list[int]] = field(default_factory=dict)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def of(self, layer: Any, parent: torch.nn.Module, rotary: RotaryTable | None) -> torch.Tensor | None:
        """That of an attention layer, [num_kv_heads, head_size] of this rank, or None where there is no bias.

        Raises:
            ValueError: as :func:`key_bias` and :func:`largest_pairs`, with the layer.
        """
        impl, index = layer.impl, layer.impl.settings.precision.index
        try:
            bias = key_bias(parent, impl.num_kv_heads, impl.head_size, impl.dtype)
            offset, count = (None, 0) if bias is None else largest_pairs(bias, rotary)
        except ValueError as error:
            raise ValueError(f"layer {index}: key_offset needs {error}") from None
        self.pairs.setdefault(count, []).append(index)
        return offset

    def log(self) -> None:
        """Say what the layers got, in a line each."""
        for count, layers in sorted(self.pairs.items(), reverse=True):
            what = f"in {count} RoPE pairs" if count else "none in RoPE pairs, since biases are small"
            logger.info("kvtuner key offset from weights, layers %s: %s", format_layers(layers), what)
        for reason, layers in self.left_out.items():
            logger.warning("kvtuner key offset from weights, layers %s: none, since %s", format_layers(layers), reason)


def _on_device(array: Any, heads: slice, device: torch.device) -> torch.Tensor | None:
    return None if array is None else torch.from_numpy(array[heads].copy()).to(device)


def _feedback(static: FeedbackStatics | None, heads: slice, device: torch.device) -> RoundFeedback | None:
    if static is None:
        return None
    factors = _on_device(static.factors, heads, device)
    assert factors is not None
    return RoundFeedback(factors, static.ranges)


def heads_of_layer(layer: Any) -> slice:
    """The KV heads of an attention layer that this rank has."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return _heads_of_rank(layer.impl.settings.precision.shape.num_kv_heads, layer.num_kv_heads, rank, world_size)


def _heads_of_rank(total: int, local: int, rank: int, world_size: int) -> slice:
    """The KV heads of a tensor-parallel rank; with fewer heads than ranks, each is on several."""
    first = rank * local if total >= world_size else rank * total // world_size
    return slice(first, first + local)


def layer_rotary(
    parent: torch.nn.Module, config: VllmConfig, layer: int, mrope: MRope | None = None
) -> RotaryTable | None:
    """The table of the rotary embedding beside an attention layer, None if the layer rotates nothing.

    Args:
        parent: the module that holds the attention layer.
        config: of the engine.
        layer: its index.
        mrope: of an engine whose tokens have several positions; None where all of a token's are equal, as in text.

    Raises:
        ValueError: the model has RoPE, but keeps it elsewhere (Transformers' own modelling code does), or as
            :func:`rotary_table`.
    """
    try:
        module = rotary_module(parent, config)
    except ValueError as error:
        raise ValueError(f"layer {layer}: key_offset needs {error}") from None
    return rotary_table(module, config, layer, mrope)


def rotary_table(
    module: torch.nn.Module | None, config: VllmConfig, layer: int, mrope: MRope | None = None
) -> RotaryTable | None:
    """The table of a model's rotary embedding, None if the layer has none."""
    if module is None:
        return None
    try:
        table, is_neox = table_of(module)
    except ValueError as error:
        raise ValueError(f"layer {layer}: key_offset needs {error}") from None
    # In the dtype the model rotates in, so that exactly what it added is subtracted.
    rounded = RotaryTable(cos_sin=table.to(config.model_config.dtype), is_neox=is_neox)
    if mrope is not None and getattr(module, "mrope_section", None):
        try:
            return mrope.table(module, rounded)
        except ValueError as error:
            raise ValueError(f"layer {layer}: key_offset needs {error}") from None
    # Phi-3 computes its tables from arguments, and has no cos_sin_cache.
    if hasattr(module, "cos_sin_cache") and hasattr(module, "_compute_cos_sin_cache"):
        rows = table.shape[0]
        if hasattr(module, "mrope_section"):  # whose table is longer than any request, for videos
            longest = (config.model_config.hf_text_config.max_position_embeddings, config.model_config.max_model_len)
            rows = min(rows, max(longest))
        linear = _linear_rotary(module, rows)
        if linear is not None:
            return linear
    return rounded


@functools.cache
def _linear_rotary(module: torch.nn.Module, rows: int) -> RotaryTable | None:
    """Of the first ``rows`` positions. Computed once for all layers that share the module, from its table before any
    rounding to the model's dtype."""
    with torch.device("cpu"):
        table = module._compute_cos_sin_cache().float().cpu()
    if table.shape != module.cos_sin_cache.shape:
        return None
    return linear_rotary(table[:rows], getattr(module, "is_neox_style", True), module.cos_sin_cache.device)
