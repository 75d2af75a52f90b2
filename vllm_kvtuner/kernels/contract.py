"""Records that every kernel takes, whichever implements it."""

from typing import NamedTuple

import torch

from vllm_kvtuner.pages.layout import ALIGNMENT, PageLayout


class RecentRows(NamedTuple):
    """Where the recent window of a layer keeps new tokens as they are.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size] of the keys' dtype, each key beside its value.
        slot_mapping: [at least the slots of the packed pages] int64, -1 for tokens that the window does not keep.
    """

    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor

    def check(self, key: torch.Tensor, num_slots: int) -> None:
        """The contract of every kernel that stores ``num_slots`` tokens of ``key`` [..., num_kv_heads, head_size]."""
        cache = self.kv_cache
        assert cache.dtype == key.dtype and cache.dim() == 4, (cache.dtype, cache.shape)
        assert (cache.shape[1], cache.shape[3]) == (key.shape[1], 2 * key.shape[2]), (cache.shape, key.shape)
        assert cache.stride(3) == 1 and cache.data_ptr() % ALIGNMENT == 0, "rows must be contiguous and aligned"
        assert all(stride * cache.element_size() % ALIGNMENT == 0 for stride in cache.stride()[:3]), cache.stride()
        slots = self.slot_mapping
        assert slots.shape[0] >= num_slots and slots.is_contiguous() and slots.dtype == torch.int64, slots.shape


def check_cache(kv_cache: torch.Tensor, layout: PageLayout) -> None:
    """The contract of every kernel on a layer's cache: contiguous, aligned chunks of ``layout``."""
    assert kv_cache.dtype == torch.uint8 and kv_cache.dim() == 4, (kv_cache.dtype, kv_cache.shape)
    assert kv_cache.shape[2:] == (layout.block_size, layout.content_bytes), (kv_cache.shape, layout)
    assert kv_cache.stride(3) == 1 and kv_cache.stride(2) == layout.content_bytes, "a chunk must be contiguous"
    assert kv_cache.stride(0) % ALIGNMENT == 0 and kv_cache.stride(1) % ALIGNMENT == 0, kv_cache.stride()
    assert kv_cache.data_ptr() % ALIGNMENT == 0, "chunks must be aligned"
