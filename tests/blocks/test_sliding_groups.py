"""Cache groups of sliding-window layers: every layer in one, and none larger than a block."""

import random

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_kvtuner.blocks.sliding_groups import block_bytes, split_to_fit, unequal_buckets


def sliding(heads, window=64, block_size=16):
    return SlidingWindowSpec(
        block_size=block_size, num_kv_heads=heads, head_size=64, dtype=torch.uint8, sliding_window=window
    )


def full(heads):
    return FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=64, dtype=torch.uint8)


def test_only_unequal_numbers_of_unequal_pages_are_taken_from_vllm():
    equal = {"a": sliding(1), "b": sliding(1), "c": full(2)}
    balanced = {"a": sliding(1), "b": sliding(2), "c": full(1), "d": full(1), "e": full(2)}
    assert unequal_buckets(equal) == unequal_buckets(balanced) == []
    unequal = {**balanced, "f": sliding(2), "g": sliding(4, window=128)}
    assert [set(bucket) for bucket in unequal_buckets(unequal)] == [{"a", "b", "f"}]


@pytest.mark.parametrize("seed", range(20))
def test_all_layers_are_in_groups_that_fit(seed):
    numbers = random.Random(seed)
    bucket = {f"layer {index}": sliding(numbers.choice([1, 2, 3, 5])) for index in range(numbers.randrange(2, 40))}
    room = numbers.randrange(5, 40) * sliding(1).page_size_bytes
    groups = split_to_fit(bucket, room)
    names = [name for group in groups for name in group.layer_names]
    assert sorted(names) == sorted(bucket)
    assert block_bytes(groups) <= room
    total = sum(spec.page_size_bytes for spec in bucket.values())
    assert len(groups) <= -(-total // room) + 1
    for group in groups:
        assert group.kv_cache_spec.kv_cache_specs == {name: bucket[name] for name in group.layer_names}
        assert group.layer_names == [name for name in bucket if name in group.layer_names]


def test_layers_alone_share_one_group_and_a_page_too_large_stands_by_itself():
    bucket = {"a": sliding(1), "b": sliding(1), "c": sliding(9)}
    assert [group.layer_names for group in split_to_fit(bucket, 0)] == [["a", "b", "c"]]
    small = split_to_fit(bucket, sliding(1).page_size_bytes)
    assert sorted(group.layer_names for group in small) == [["a"], ["b"], ["c"]]
