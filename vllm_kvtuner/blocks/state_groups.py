"""How packed pages share vLLM's pool with the states of linear-attention layers (state-space, delta net, short conv).

A request holds a state per layer however long it is, in blocks of the same pool. vLLM makes blocks so large that the
page of its first attention layer holds a state, pads states to that page, and counts on all attention layers having the
same. With pages of unlike pairs that leaves blocks half empty or makes them many times too large: here the mean page
holds a state, so that a block holds as many states as the model has attention layers, whatever their pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec, MambaSpec, UniformTypeKVCacheSpecs

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import AttentionSpec


def backend_of_mean_page(backend: type[AttentionBackend], token_bytes: int) -> type[AttentionBackend]:
    """What vLLM asks for the page of one token when it sizes blocks.

    Args:
        backend: whose block sizes are to be served.
        token_bytes: of one token in the mean attention layer of a rank.
    """

    class MeanPage(backend):
        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            return replace(spec, num_kv_heads=1, dtype=torch.uint8, state_content_bytes=token_bytes)

    return MeanPage


def group_states(groups: Sequence[KVCacheGroupSpec]) -> list[KVCacheGroupSpec]:
    """Cache groups of unequal pages, with as many states to a group as a block holds.

    vLLM splits states as the attention layers' pattern repeats, which for two layers of unlike pairs is one state to a
    block, and wraps their specs, behind which it does not recognize them where it picks kernels and checkpoints.

    Args:
        groups: of a block-outermost layout.
    """
    layers: defaultdict[KVCacheSpec, list[str]] = defaultdict(list)
    result = []
    for group in groups:
        spec = group.kv_cache_spec
        wrapped = isinstance(spec, UniformTypeKVCacheSpecs)
        specs = spec.kv_cache_specs if wrapped else dict.fromkeys(group.layer_names, spec)
        if not all(isinstance(each, MambaSpec) for each in specs.values()):
            result.append(group)
            continue
        for name, each in specs.items():
            layers[each].append(name)
    block_bytes = max(group.kv_cache_spec.page_size_bytes for group in result)
    for spec, names in layers.items():
        count = cdiv(len(names), max(1, block_bytes // spec.page_size_bytes))
        result += [KVCacheGroupSpec(names[index::count], spec) for index in range(count)]
    return result
