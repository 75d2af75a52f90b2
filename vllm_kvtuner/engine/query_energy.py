"""Round feedback of keys that follows from a model's own weights: what queries are expected to read of a key.

An error e of a key moves the logit of a query q by q . e, so that it costs e^T E[q q^T] e. Two things are known of E
without any text. Inputs of the projection come from a norm, so that their channels have mean square 1 but for its gains
g; taken as independent of one another they give channel c of a query

    E[q_c^2] = sum_x (W_cx g_x)^2 + b_c^2

And RoPE turns a pair of channels by all angles as positions go by. So the mean over positions has no products of
different pairs, nor of the two channels of one, which count the same. What is left is a diagonal matrix of one number
for each pair: their *query energy*. Measured in docs/notes/feedback-from-weights.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvtuner.engine.key_bias import find_projection, projected
from vllm_kvtuner.engine.modules import Modules
from vllm_kvtuner.pages.feedback import RoundFeedback, triangular_factors
from vllm_kvtuner.pages.transforms import RotaryTable, hadamard

DAMPING = 0.1
"""Part of a head's mean energy that is added to that of each pair: inputs are not independent."""
RANGES: Mapping[int, tuple[float, ...]] = {2: (0.8,), 4: (1.0,)}
"""Bits -> factors on a key's range that are tried. Three cost the store three times the work, and gain nothing here."""
ROWS_AT_ONCE = 1024
"""Input channels that go through the projection at once, so that wide models need little memory."""

_QUERY_PROJECTIONS = ("q_proj", "query_proj", "query", "wq")
_QUERY_NORM = re.compile("(q|query|qk)_?(layer)?_?norm|norm_?q")
_INPUT_NORMS = ("input_layernorm", "attention_norm", "ln_1", "norm1", "operator_norm")


def query_projection(parent: torch.nn.Module) -> tuple[Any, bool]:
    """As :func:`find_projection`, of queries."""
    return find_projection(parent, _QUERY_PROJECTIONS, "one q projection beside the attention layer")


def input_norm(layer: torch.nn.Module | None, input_size: int) -> torch.nn.Module | None:
    """The norm whose outputs a decoder layer's projections take; None where the layer has none of a known name.

    Args:
        layer: the decoder layer that holds the attention module; None where there is none.
        input_size: channels of the projections' inputs.
    """
    for name in _INPUT_NORMS:
        norm = getattr(layer, name, None)
        if _has_gains(norm, input_size):
            return norm
    return None


def layer_energy(layer: Any, modules: Modules, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """Query energy of an attention layer, of this rank's query heads, and whether it counts an input norm's gains.

    Args:
        layer: of vLLM's.
        modules: of its model.
        dtype: of the model.

    Raises:
        ValueError: as :func:`query_energy`.
    """
    parent, impl = modules.parent(layer), layer.impl
    projection, _ = query_projection(parent)
    norm = input_norm(modules.decoder_layer(layer), projection.input_size)
    device = next(projection.parameters()).device
    heads = QueryHeads(impl.num_heads, impl.num_kv_heads, impl.head_size, dtype, device)
    return query_energy(parent, norm, heads), norm is not None


@dataclass(frozen=True)
class QueryHeads:
    """An attention layer's heads of this rank.

    Args:
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_size: numbers per head.
        dtype: of the model.
        device: of its weights.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device


def query_energy(parent: torch.nn.Module, norm: torch.nn.Module | None, heads: QueryHeads) -> torch.Tensor:
    """E[q_c^2] of this rank's query heads, before RoPE.

    It is what the norm and the projection make of an input of zeros and of each channel alone. So nothing depends on
    how quantized weights are kept, nor on how a norm keeps its gains. Takes, beside the model, some rows of
    ROWS_AT_ONCE, and 2 input_size^2 outputs multiply-adds.

    Args:
        parent: the module that holds the attention layer and its projections, loaded.
        norm: of the projections' inputs; None where none is known, whose gains then count as 1.
        heads: of the layer.

    Returns:
        [num_kv_heads, head_size] fp32, summed over the query heads of each KV head.

    Raises:
        ValueError: what is needed, and what the model has: no projection of the known kinds, queries that are neither
            those of the projection nor normalized head by head.
    """
    projection, is_fused = query_projection(parent)
    gains = _head_gains(parent, heads)
    size, outputs = projection.input_size, heads.num_heads * heads.head_size
    with torch.inference_mode():
        middle = _normalized(norm, torch.zeros(1, size, dtype=heads.dtype, device=heads.device))
        mean = projected(projection, middle)
        queries = projection.num_heads * projection.head_size if is_fused else mean.shape[1]
        if queries != outputs:
            rule = f"a q projection of {heads.num_heads} heads of {heads.head_size}"
            raise ValueError(f"{rule}, but the model's {type(parent).__name__} has another")
        energy = mean[0, :outputs].double().square()
        for begin in range(0, size, ROWS_AT_ONCE):
            count = min(ROWS_AT_ONCE, size - begin)
            rows = torch.zeros(count, size, dtype=heads.dtype, device=heads.device)
            rows[:, begin : begin + count].fill_diagonal_(1.0)
            if norm is not None:  # it makes sqrt(size) of a 1 among zeros, more than some quantized inputs reach
                rows = middle + (_normalized(norm, rows) - middle) / size**0.5
            energy += (projected(projection, rows) - mean)[:, :outputs].double().square().sum(0)
        energy = energy.view(heads.num_heads, heads.head_size)
        if gains is not None:
            smallest = torch.finfo(torch.float32).tiny
            energy = gains * energy / energy.mean(-1, keepdim=True).clamp(min=smallest)
        return energy.view(heads.num_kv_heads, -1, heads.head_size).sum(1).float()


def _head_gains(parent: torch.nn.Module, heads: QueryHeads) -> torch.Tensor | None:
    """[head_size] fp64, squares of the gains of a norm of each query head; None where there is no norm."""
    norms = {name: child for name, child in parent.named_children() if _QUERY_NORM.search(name)}
    if not norms:
        return None
    name, norm = next(iter(norms.items()))
    if len(norms) > 1 or not _has_gains(norm, heads.head_size):
        rule = "queries as their projection gives them, or normalized head by head"
        raise ValueError(f"{rule}, but the model's {type(parent).__name__} normalizes them otherwise ({name})")
    with torch.inference_mode():
        rows = torch.eye(heads.head_size, dtype=heads.dtype).to(heads.device)
        given = _normalized(norm, rows) - _normalized(norm, torch.zeros_like(rows))
        return given.diagonal().double().square() / heads.head_size


def _has_gains(norm: Any, size: int) -> bool:
    weight = getattr(norm, "weight", None)
    return isinstance(norm, torch.nn.Module) and isinstance(weight, torch.Tensor) and weight.shape == (size,)


def _normalized(norm: Any, rows: torch.Tensor) -> torch.Tensor:
    # The plain implementation: nothing is compiled for this.
    return rows if norm is None else getattr(norm, "forward_native", norm)(rows)


def over_ranks(energy: torch.Tensor, own: slice, num_kv_heads: int) -> torch.Tensor:
    """Energy of a rank's KV heads from the query heads of all ranks, which share a KV head where there are few.

    Args:
        energy: [KV heads of this rank, head_size] fp32, of its query heads.
        own: its KV heads among all.
        num_kv_heads: of all ranks.

    Raises:
        ValueError: a rank's is not finite. All ranks say so then, since none may wait for another.
    """
    from vllm.distributed import tensor_model_parallel_all_reduce

    whole = energy.new_zeros(num_kv_heads, energy.shape[1])
    whole[own] = energy
    whole = tensor_model_parallel_all_reduce(whole)
    if not whole.isfinite().all():
        raise ValueError("finite numbers, but the q projection gives others")
    return whole[own]


def key_feedback(energy: torch.Tensor, rotary: RotaryTable | None, equalization: torch.Tensor | None) -> RoundFeedback:
    """Round feedback of keys that queries of some energy read, and that key_hadamard rotates.

    Args:
        energy: [num_kv_heads, head_size] fp32, before RoPE.
        rotary: of the layer; None where nothing is rotated, and each channel counts by itself.
        equalization: [num_kv_heads, head_size] that keys are divided by, or None.
    """
    diagonal = energy.double()
    if rotary is not None:
        first, second = rotary.pairs(energy.device)
        diagonal = diagonal.clone()
        diagonal[:, first] = diagonal[:, second] = (diagonal[:, first] + diagonal[:, second]) / 2
    level = diagonal.mean(-1, keepdim=True)
    diagonal = torch.where(level > 0, diagonal + DAMPING * level, 1.0)  # what nothing reads is rounded to the nearest
    if equalization is not None:
        diagonal = diagonal * equalization.double().square()
    turn = hadamard(energy.shape[-1], energy.device, torch.float64)
    metric = turn @ torch.diag_embed(diagonal) @ turn
    return RoundFeedback(triangular_factors((metric + metric.mT) / 2), RANGES)
