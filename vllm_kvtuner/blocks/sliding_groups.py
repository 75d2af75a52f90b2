"""Cache groups of sliding-window layers whose pages are unequal.

vLLM splits sliding-window layers into groups that fit the block the other layers need, and takes their pairs for a
repeating pattern: where one pair is in more layers than another, it leaves layers out, or ends in a StopIteration.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec, SlidingWindowSpec, UniformTypeKVCacheSpecs

Specs = dict[str, KVCacheSpec]


def unequal_buckets(specs: Mapping[str, KVCacheSpec]) -> list[Specs]:
    """Sliding-window layers that may share a group, where unequal pages are in unequal numbers of layers."""
    return [
        bucket
        for bucket in uniform_buckets(specs)
        if all(isinstance(spec, SlidingWindowSpec) for spec in bucket.values())
        and len(set(Counter(spec.page_size_bytes for spec in bucket.values()).values())) > 1
    ]


def uniform_buckets(specs: Mapping[str, KVCacheSpec]) -> list[Specs]:
    """Layers that may share a group, put together as vLLM does."""
    buckets: list[Specs] = []
    for name, spec in specs.items():
        for bucket in buckets:
            if UniformTypeKVCacheSpecs.is_uniform_type({**bucket, name: spec}):
                bucket[name] = spec
                break
        else:
            buckets.append({name: spec})
    return buckets


def whole_group(bucket: Specs) -> KVCacheGroupSpec:
    spec = UniformTypeKVCacheSpecs.from_specs(bucket)
    assert spec is not None
    return KVCacheGroupSpec(list(bucket), spec)


def split_to_fit(bucket: Specs, block_bytes: int) -> list[KVCacheGroupSpec]:
    """As few groups of a bucket's layers as leave each within ``block_bytes``, about equally full.

    Args:
        bucket: of layers that may share a group.
        block_bytes: of a block of the pool, or 0 where no other group sets it: all layers share one then.
    """
    pages = {name: spec.page_size_bytes for name, spec in bucket.items()}
    count = min(len(pages), cdiv(sum(pages.values()), block_bytes)) if block_bytes else 1
    while True:
        shares: list[list[str]] = [[] for _ in range(count)]
        sizes = [0] * count
        for name in sorted(pages, key=lambda name: -pages[name]):
            least = sizes.index(min(sizes))
            shares[least].append(name)
            sizes[least] += pages[name]
        if not block_bytes or max(sizes) <= block_bytes or count == len(pages):
            return [whole_group({name: bucket[name] for name in bucket if name in share}) for share in shares]
        count += 1


def block_bytes(groups: Sequence[KVCacheGroupSpec]) -> int:
    return max((group.kv_cache_spec.page_size_bytes for group in groups), default=0)
