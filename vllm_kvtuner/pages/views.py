"""Views of a layer's cache, chunk by chunk."""

import torch

from vllm_kvtuner.pages.layout import META_BYTES, PageLayout


def page_parts(
    kv_cache: torch.Tensor, layout: PageLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of a layer's cache [num_blocks, num_kv_heads, block_size, content_bytes] uint8, chunk by chunk.

    Returns:
        key codes [num_blocks, num_kv_heads, block_size, k_row_bytes] uint8, value codes likewise, key meta and value
        meta [num_blocks, num_kv_heads, block_size, 2] fp16 (scale, minimum).
    """
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    assert block_size == layout.block_size and content == layout.content_bytes, (kv_cache.shape, layout)
    assert kv_cache.stride(3) == 1 and kv_cache.stride(2) == content, "a chunk must be contiguous"

    def part(offset: int, row_bytes: int) -> torch.Tensor:
        return kv_cache.as_strided(
            (num_blocks, num_kv_heads, block_size, row_bytes),
            (kv_cache.stride(0), kv_cache.stride(1), row_bytes, 1),
            kv_cache.storage_offset() + offset,
        )

    return (
        part(layout.k_codes_offset, layout.k_row_bytes),
        part(layout.v_codes_offset, layout.v_row_bytes),
        part(layout.k_meta_offset, META_BYTES).view(torch.float16),
        part(layout.v_meta_offset, META_BYTES).view(torch.float16),
    )


def chunks_of(kv_cache: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """The first bytes of each chunk of a layer's cache, as the cache of a pair that needs no more.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes of the room] uint8, chunks contiguous.
        layout: of the pair stored, with the same block_size.

    Returns:
        [num_blocks, num_kv_heads, block_size, layout.content_bytes] uint8, a view whose chunks begin where those of
        ``kv_cache`` do.
    """
    assert layout.content_bytes <= kv_cache.shape[3], (layout, kv_cache.shape)
    shape = (*kv_cache.shape[:3], layout.content_bytes)
    return kv_cache.as_strided(shape, (*kv_cache.stride()[:2], layout.content_bytes, 1))
