"""What kernels ask of their arguments, which the contract says, before a launch."""

import torch

from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, Pages, Queries, StepRows, WindowRows


def check_store(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor | None,
    pages: Pages,
    window: WindowRows | None,
) -> None:
    """What every GPU kernel asks of a store's arguments."""
    num_tokens, num_kv_heads, head_size = key.shape
    assert head_size == pages.layout.head_size and value.shape == key.shape, (key.shape, value.shape, pages.layout)
    check_rows(key)
    check_rows(value)
    assert pages.num_kv_heads == num_kv_heads and slot_mapping.shape[0] <= num_tokens
    _check_slots(slot_mapping, positions, pages)
    if window is not None:
        window.check(key, slot_mapping.shape[0])


def check_pack(layer: StepRows) -> None:
    """What every GPU kernel asks of a layer whose tokens are packed from its window."""
    pages, window, slot_mapping, positions = layer
    _check_slots(slot_mapping, positions, pages)
    # Keys of a block's first place stand for the rows that were kept.
    window.check(window.kv_cache[:, :, 0, : pages.layout.head_size], slot_mapping.shape[0])
    assert window.kv_cache.shape[1] == pages.num_kv_heads, (window.kv_cache.shape, pages.kv_cache.shape)


def _check_slots(slot_mapping: torch.Tensor, positions: torch.Tensor | None, pages: Pages) -> None:
    pages.check()
    assert slot_mapping.is_contiguous() and slot_mapping.dtype == torch.int64
    if pages.transforms.key_offset is not None:
        assert positions is not None and positions.shape[-1] >= slot_mapping.shape[0], "a position of each slot"
        assert positions.stride(-1) == 1 and positions.dtype == torch.int64
        several = pages.transforms.positions
        assert positions.shape[:-1] == (() if several is None else (several.num_axes,)), positions.shape


def check_gather(pages: Pages, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor) -> None:
    """What every GPU kernel asks of a gather's arguments."""
    pages.check()
    for rows in (key_out, value_out):
        assert rows.shape[0] >= tokens.num_tokens and rows.dtype == key_out.dtype, (rows.shape, rows.dtype)
        assert rows.shape[1:] == (pages.num_kv_heads, pages.layout.head_size), rows.shape
        check_rows(rows)
    tokens.check()


def check_attention(
    query: torch.Tensor, queries: Queries, shape: AttentionShape, output: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """What every GPU kernel asks of queries and outputs, on packed pages or on a window's rows."""
    assert query.shape[1:] == (shape.num_heads, shape.head_size), (query.shape, shape)
    for tokens in (query, output):
        assert tokens.shape == query.shape, (tokens.shape, query.shape)
        check_rows(tokens)
    queries.check()
    if lse is not None:
        assert lse.shape == (shape.num_heads, query.shape[0]) and lse.is_contiguous() and lse.dtype == torch.float32


def check_sinks(pages: Pages, shape: AttentionShape) -> None:
    """What every decode kernel on a GPU asks of a layer's attention sinks."""
    sinks = pages.sinks
    assert (None if sinks is None else sinks.dtype) == shape.sinks, "the layer's shape says whether it has sinks"
    if sinks is not None:
        assert sinks.shape == (shape.num_heads,) and sinks.is_contiguous(), (sinks.shape, shape)


def check_rows(rows: torch.Tensor) -> None:
    """[num_tokens, heads, head_size] in which a token's heads are contiguous, and tokens need not be."""
    assert rows.stride()[1:] == (rows.shape[2], 1), "a token's heads must be contiguous"
