"""Reference of the kernels on whole rows, store and gather, in torch; on a CPU, the implementation itself."""

import torch

from vllm_kvtuner.pages.codes import dequantize, pack_codes, quantize_rows
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms, restore_keys, rotate_values, transform_keys
from vllm_kvtuner.pages.views import page_parts


def reshape_and_cache_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    layout: PageLayout,
    transforms: LayerTransforms,
) -> None:
    """Transform, quantize, pack and scatter new tokens to their slots, in place.

    Args:
        key: [num_tokens, num_kv_heads, head_size], after RoPE.
        value: as key.
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] uint8.
        slot_mapping: [num_slots] int64, num_slots <= num_tokens; block * block_size + offset, or -1 for a token that
            is not stored. Tokens beyond num_slots are padding.
        positions: [>= num_slots] int64, the tokens' positions; needed with a key offset only.
        layout: the layer's page.
        transforms: the layer's transforms.
    """
    keep = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[keep]
    block, offset = slots // layout.block_size, slots % layout.block_size
    k_codes, v_codes, k_meta, v_meta = page_parts(kv_cache, layout)
    keys = transform_keys(key[keep], None if positions is None else positions[keep], transforms)
    values = rotate_values(value[keep], transforms)
    for rows, bits, codes_part, meta_part in (
        (keys, layout.k_bits, k_codes, k_meta),
        (values, layout.v_bits, v_codes, v_meta),
    ):
        codes, scale, minimum = quantize_rows(rows, bits, transforms.range_search)
        codes_part[block, :, offset] = pack_codes(codes, bits)
        meta_part[block, :, offset] = torch.stack([scale, minimum], dim=-1)


def read_back_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor | None,
    pair: PrecisionPair,
    transforms: LayerTransforms,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values fp32 in model space that :func:`gather_cache_ref` would give of tokens stored at ``pair``;
    arguments as :func:`reshape_and_cache_ref`."""
    keys, values = (
        codes.float() * scale.float()[..., None] + minimum.float()[..., None]
        for codes, scale, minimum in (
            quantize_rows(transform_keys(key, positions, transforms), pair.k_bits, transforms.range_search),
            quantize_rows(rotate_values(value, transforms), pair.v_bits, transforms.range_search),
        )
    )
    return restore_keys(keys, positions, transforms), rotate_values(values, transforms)


def gather_cache_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    seq_starts: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    layout: PageLayout,
    transforms: LayerTransforms,
    *,
    num_tokens: int,
) -> None:
    """Dequantize a slice of each request's cached tokens back to model space, in place.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] uint8.
        block_table: [num_reqs, max_blocks] int32.
        cu_seq_lens: [num_reqs + 1] int32, rows of the output where each request's slice begins, and the end.
        seq_starts: [num_reqs] int32, the first token of each request's slice.
        key_out: [>= num_tokens, num_kv_heads, head_size], any float dtype.
        value_out: as key_out.
        layout: the layer's page.
        transforms: the layer's transforms.
        num_tokens: tokens gathered, cu_seq_lens[-1], known to the host.
    """
    block, offset, position = _gathered_slots(block_table, cu_seq_lens, seq_starts, num_tokens, layout.block_size)
    k_codes, v_codes, k_meta, v_meta = page_parts(kv_cache, layout)
    keys = dequantize(k_codes[block, :, offset], k_meta[block, :, offset], layout.k_bits)
    values = dequantize(v_codes[block, :, offset], v_meta[block, :, offset], layout.v_bits)
    key_out[:num_tokens] = restore_keys(keys, position, transforms).to(key_out.dtype)
    value_out[:num_tokens] = rotate_values(values, transforms).to(value_out.dtype)


def _gathered_slots(
    block_table: torch.Tensor, cu_seq_lens: torch.Tensor, seq_starts: torch.Tensor, num_tokens: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block, offset in it and position, each [num_tokens] int64, of the tokens that gather_cache_ref takes."""
    lengths = (cu_seq_lens[1:] - cu_seq_lens[:-1]).long()
    requests = torch.arange(lengths.shape[0], device=lengths.device)
    request = torch.repeat_interleave(requests, lengths, output_size=num_tokens)
    row = torch.arange(num_tokens, device=lengths.device)
    position = row - cu_seq_lens[:-1].long()[request] + seq_starts.long()[request]
    return block_table[request, position // block_size].long(), position % block_size, position


def store_rows_ref(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Scatter new tokens to their slots as they are, in place; arguments as :func:`reshape_and_cache_ref`, but

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size] of the keys' dtype, each key beside its value.
    """
    keep = (slot_mapping >= 0).nonzero().squeeze(1)
    slots, block_size = slot_mapping[keep], kv_cache.shape[2]
    kv_cache[slots // block_size, :, slots % block_size] = torch.cat([key[keep], value[keep]], dim=-1)


def gather_rows_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    seq_starts: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    *,
    num_tokens: int,
) -> None:
    """As :func:`gather_cache_ref`, from a cache that :func:`store_rows_ref` wrote."""
    block, offset, _ = _gathered_slots(block_table, cu_seq_lens, seq_starts, num_tokens, kv_cache.shape[2])
    key_out[:num_tokens], value_out[:num_tokens] = kv_cache[block, :, offset].chunk(2, dim=-1)
