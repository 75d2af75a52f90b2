"""Store and gather in torch, on the packed bytes of pages/layout.py and on plain rows."""

from collections.abc import Sequence

import torch

from vllm_kvtuner.kernels.contract import CachedTokens, Pages, StepRows, WindowRows
from vllm_kvtuner.pages.codes import code_format
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import (
    KEY,
    SIDES,
    VALUE,
    LayerTransforms,
    restore_keys,
    rotate_values,
    transform_keys,
)
from vllm_kvtuner.pages.views import page_sides


def reshape_and_cache_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    pages: Pages,
    window: WindowRows | None = None,
) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.ReshapeAndCache`."""
    keep = (slot_mapping >= 0).nonzero().squeeze(1)
    slots, block_size = slot_mapping[keep], pages.layout.block_size
    block, offset = slots // block_size, slots % block_size
    keys = transform_keys(key[keep], None if positions is None else positions[..., keep], pages.transforms)
    if pages.positions is not None:
        assert positions is not None
        pages.positions[slots] = positions[:, keep].T.int()
    values = rotate_values(value[keep], pages.transforms)
    sides = page_sides(pages.kv_cache, pages.layout)
    for name, rows, side in zip(SIDES, (keys, values), sides, strict=True):
        feedback = pages.transforms.feedback(name, side.format.bits)
        codes, scale, minimum = side.format.quantize(rows, pages.transforms.range_search, feedback)
        side.codes[block, :, offset] = side.format.pack(codes)
        side.meta[block, :, offset] = torch.stack([scale, minimum], dim=-1)
    if window is not None:
        store_rows_ref(key, value, window)


def gather_cache_ref(pages: Pages, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.GatherCache`."""
    block, offset, position = _slots(tokens, pages.layout.block_size)
    keys, values = (
        side.format.dequantize(side.codes[block, :, offset], side.meta[block, :, offset])
        for side in page_sides(pages.kv_cache, pages.layout)
    )
    if pages.positions is not None:
        position = pages.positions[block * pages.layout.block_size + offset].T
    key_out[: tokens.num_tokens] = restore_keys(keys, position, pages.transforms).to(key_out.dtype)
    value_out[: tokens.num_tokens] = rotate_values(values, pages.transforms).to(value_out.dtype)


def read_back_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor | None,
    pair: PrecisionPair,
    transforms: LayerTransforms,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values fp32 in model space that :func:`gather_cache_ref` would give of tokens stored at ``pair``;
    arguments as :func:`reshape_and_cache_ref`."""
    search = transforms.range_search
    keys, values = transform_keys(key, positions, transforms), rotate_values(value, transforms)
    key_format, value_format = (code_format(bits) for bits in (pair.k_bits, pair.v_bits))
    keys = key_format.round_trip(keys, search, transforms.feedback(KEY, pair.k_bits))
    values = value_format.round_trip(values, search, transforms.feedback(VALUE, pair.v_bits))
    return restore_keys(keys, positions, transforms), rotate_values(values, transforms)


def store_rows_ref(key: torch.Tensor, value: torch.Tensor, window: WindowRows) -> None:
    """Scatter new tokens [num_tokens, num_kv_heads, head_size] to their slots as they are, in place."""
    keep = (window.slot_mapping >= 0).nonzero().squeeze(1)
    slots, block_size = window.slot_mapping[keep], window.kv_cache.shape[2]
    window.kv_cache[slots // block_size, :, slots % block_size] = torch.cat([key[keep], value[keep]], dim=-1)


def pack_rows_ref(layers: Sequence[StepRows]) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.PackRows`."""
    for layer in layers:
        keep = (layer.slot_mapping >= 0).nonzero().squeeze(1)
        slots, kept = layer.window.slot_mapping[keep], layer.window.kv_cache
        assert (slots >= 0).all(), "the window holds all tokens of the step"
        block_size = kept.shape[2]
        key, value = kept[slots // block_size, :, slots % block_size].chunk(2, dim=-1)
        positions = None if layer.positions is None else layer.positions[..., keep]
        # Contiguous, as a store's own rows are, so that matrix products round alike.
        reshape_and_cache_ref(key.contiguous(), value.contiguous(), layer.slot_mapping[keep], positions, layer.pages)


def gather_rows_ref(rows: torch.Tensor, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor) -> None:
    """As :func:`gather_cache_ref`, from a cache [num_blocks, num_kv_heads, block_size, 2 * head_size] that
    :func:`store_rows_ref` wrote."""
    block, offset, _ = _slots(tokens, rows.shape[2])
    keys, values = rows[block, :, offset].chunk(2, dim=-1)
    key_out[: tokens.num_tokens], value_out[: tokens.num_tokens] = keys, values


def _slots(tokens: CachedTokens, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block, offset in it and position, each [num_tokens] int64, of the tokens of a slice."""
    bounds = tokens.cu_seq_lens
    lengths = (bounds[1:] - bounds[:-1]).long()
    requests = torch.arange(lengths.shape[0], device=lengths.device)
    request = torch.repeat_interleave(requests, lengths, output_size=tokens.num_tokens)
    row = torch.arange(tokens.num_tokens, device=lengths.device)
    position = row - bounds[:-1].long()[request] + tokens.seq_starts.long()[request]
    return tokens.block_table[request, position // block_size].long(), position % block_size, position
