"""The key offset that follows from a model's own weights: the bias of its k projection.

The bias is what the projection adds to every key before RoPE, and where it is large, rows of few bits are spent on it.
Any constant offset is given back exactly, so a bias that is no good one costs quality, never correctness.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from vllm_kvtuner.pages.transforms import RotaryTable

PAIRS_STEP = 8
"""RoPE pairs of an offset come in so many: one more step of the decode kernel's matrix instructions."""
LARGEST_REST = 0.4
"""Root mean square of the bias in pairs that an offset leaves out, at most. Keys of normalized inputs spread by about 1
about their bias, so that this adds a seventh to the squared error of a rotated row at most (measured layer by layer on
Qwen2.5-Coder-0.5B; docs/notes/key-bias-needs-an-offset.md)."""

_KEY_PROJECTIONS = ("k_proj", "key_proj", "key", "wk")
_KEY_NORM = re.compile("(k|key|qk)_?(layer)?_?norm|norm_?k")


def key_bias(parent: torch.nn.Module, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> torch.Tensor | None:
    """What the k projection beside an attention layer adds to every key of this rank.

    It is what the projection gives for an input of zeros. So nothing depends on how a quantized projection keeps its
    bias (Marlin kernels permute it), how it shares its rows with queries and values, or which rank has which heads.

    Args:
        parent: the module that holds the attention layer and its projections, loaded.
        num_kv_heads: of this rank.
        head_size: numbers per head.
        dtype: of the model.

    Returns:
        [num_kv_heads, head_size] fp32; None where the projection has no bias.

    Raises:
        ValueError: what is needed, and what the model has: no projection of the known kinds, or keys that are not those
            of the projection.
    """
    projection, first = key_projection(parent)
    if projection.bias is None:
        return None
    kind = type(parent).__name__
    if norms := [name for name, _ in parent.named_children() if _KEY_NORM.search(name)]:
        raise ValueError(f"keys as their projection gives them, but the model's {kind} normalizes them ({norms[0]})")
    with torch.inference_mode():
        zeros = torch.zeros(1, projection.input_size, dtype=dtype, device=projection.bias.device)
        row = projected(projection, zeros)[0]
    size = num_kv_heads * head_size
    num_rows = getattr(projection, "num_kv_heads", num_kv_heads) * head_size
    if num_rows != size or row[first:].numel() < size:
        raise ValueError(f"a k projection of {num_kv_heads} heads of {head_size}, but the model's {kind} has another")
    return row[first : first + size].clone().view(num_kv_heads, head_size)


def projected(projection: Any, rows: torch.Tensor) -> torch.Tensor:
    """What a projection gives for rows [num_rows, input_size], its bias added: [num_rows, outputs of this rank] fp32.

    Call it in inference mode.
    """
    given = projection(rows)
    outputs = (given[0] if isinstance(given, tuple) else given).float()
    if projection.bias is not None and projection.skip_bias_add:
        outputs = outputs + projection.bias.float()
    return outputs


def key_projection(parent: torch.nn.Module) -> tuple[Any, int]:
    """The layer that projects keys, and the first of its outputs that is one.

    Raises:
        ValueError: what is needed, and what the model has.
    """
    projection, is_fused = find_projection(parent, _KEY_PROJECTIONS, "one k projection beside the attention layer")
    return projection, projection.num_heads * projection.head_size if is_fused else 0


def find_projection(parent: torch.nn.Module, names: Sequence[str], needed: str) -> tuple[Any, bool]:
    """The layer beside an attention layer that projects to queries, keys and values, or to one of them alone.

    Args:
        parent: the module that holds them.
        names: that a projection to what is looked for alone may have.
        needed: what an error says is needed.

    Returns:
        The projection, beneath an adapter, and whether it gives queries, keys and values, in this order.

    Raises:
        ValueError: what is needed, and what the model has.
    """
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear

    layers = {name: getattr(child, "base_layer", child) for name, child in parent.named_children()}  # beneath LoRA's
    fused = [layer for layer in layers.values() if isinstance(layer, QKVParallelLinear)]
    if len(fused) == 1:
        return fused[0], True
    alone = [layers[name] for name in names if isinstance(layers.get(name), ColumnParallelLinear)]
    if fused or len(alone) != 1:
        kind = type(parent).__name__
        raise ValueError(f"{needed}, but the model's {kind} has {len(fused + alone)}")
    return alone[0], False


def largest_pairs(
    offset: torch.Tensor, rotary: RotaryTable | None, rest: float = LARGEST_REST, step: int = PAIRS_STEP
) -> tuple[torch.Tensor | None, int]:
    """The offset in as few RoPE pairs as leave little of it, over the heads of all ranks, else 0.

    All pairs cost a quarter of the decode kernel's time, and biases are large in few. The choice is the same whatever
    the number of ranks, since engines of other numbers may read each other's pages. What is not rotated is kept: it
    costs nothing, since its logit is the same for all keys.

    Args:
        offset: [num_kv_heads, head_size] of this rank.
        rotary: the layer's; None if it rotates nothing.
        rest: root mean square over all channels of what is left out, at most.
        step: number of pairs that are added at once.

    Returns:
        What is kept, None where that is 0, and the number of its RoPE pairs.

    Raises:
        ValueError: numbers that are not finite.
    """
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    # Asked of all ranks together, so that none waits for another that has gone its own way.
    energy = tensor_model_parallel_all_reduce(offset.square().sum(0))
    if not energy.isfinite().all():
        raise ValueError("finite numbers, but the k projection gives others")
    if not energy.any():
        return None, 0
    if rotary is None:
        return offset, 0
    first, second = rotary.pairs(offset.device)
    of_pair, order = (energy[first] + energy[second]).sort(descending=True)
    # Entry n: mean square of what the first n pairs leave.
    left = torch.cat([of_pair, of_pair.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    left = left / (offset.numel() * get_tensor_model_parallel_world_size())
    count = -(-int((left > rest**2).sum()) // step) * step
    dropped = order[count:]
    energy[first[dropped]] = energy[second[dropped]] = 0.0
    if not energy.any():
        return None, 0
    kept = offset.clone()
    kept[:, first[dropped]] = kept[:, second[dropped]] = 0.0
    return kept, int(of_pair[:count].count_nonzero())


def rest_of_bias(bias: torch.Tensor, offset: torch.Tensor | None) -> float:
    """Root mean square over the channels of all ranks of what an offset leaves of a bias; a NaN for numbers that are
    not finite.

    Args:
        bias: [num_kv_heads, head_size] of this rank.
        offset: as bias, or None for none.
    """
    from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce

    left = bias if offset is None else bias - offset
    energy = tensor_model_parallel_all_reduce(left.square().sum(0))
    return float((energy.sum() / (left.numel() * get_tensor_model_parallel_world_size())).sqrt())
