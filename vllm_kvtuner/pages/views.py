"""Views of a layer's cache, chunk by chunk."""

from typing import NamedTuple

import torch

from vllm_kvtuner.pages.codes import UniformCodes, code_format
from vllm_kvtuner.pages.layout import META_BYTES, PageLayout


class Side(NamedTuple):
    """The keys or the values of all chunks of a cache.

    Args:
        format: of the codes.
        codes: [num_blocks, num_kv_heads, block_size, row bytes] uint8.
        meta: [num_blocks, num_kv_heads, block_size, 2] fp16, scale and minimum.
    """

    format: UniformCodes
    codes: torch.Tensor
    meta: torch.Tensor


def page_sides(kv_cache: torch.Tensor, layout: PageLayout) -> tuple[Side, Side]:
    """Keys and values of a layer's cache [num_blocks, num_kv_heads, block_size, content_bytes] uint8, as views."""
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    assert block_size == layout.block_size and content == layout.content_bytes, (kv_cache.shape, layout)
    assert kv_cache.stride(3) == 1 and kv_cache.stride(2) == content, "a chunk must be contiguous"

    def part(offset: int, row_bytes: int) -> torch.Tensor:
        return kv_cache.as_strided(
            (num_blocks, num_kv_heads, block_size, row_bytes),
            (kv_cache.stride(0), kv_cache.stride(1), row_bytes, 1),
            kv_cache.storage_offset() + offset,
        )

    def side(bits: int, codes: int, row_bytes: int, meta: int) -> Side:
        return Side(code_format(bits), part(codes, row_bytes), part(meta, META_BYTES).view(torch.float16))

    return (
        side(layout.k_bits, layout.k_codes_offset, layout.k_row_bytes, layout.k_meta_offset),
        side(layout.v_bits, layout.v_codes_offset, layout.v_row_bytes, layout.v_meta_offset),
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
