"""Launch keep_rows.cu: new tokens to a recent window alone, as they are."""

import functools
import math

import torch

from vllm_kvtuner.kernels import arguments
from vllm_kvtuner.kernels.arguments import Arguments
from vllm_kvtuner.kernels.checks import check_rows
from vllm_kvtuner.kernels.contract import WindowRows
from vllm_kvtuner.kernels.cuda.build import Source, build
from vllm_kvtuner.kernels.cuda.rows import (
    NUM_WARPS,
    NUMBER_TYPES,
    STORE_FIELDS,
    byte_stride,
    check_alignment,
    window_addresses,
)
from vllm_kvtuner.pages.layout import ALIGNMENT

_OF_PAGES = ("kv_cache", "slot_mapping", "positions", "offset", "partner", "cos_sin", "equalization")
ARGUMENTS = Arguments(
    *(field for field in STORE_FIELDS if field.name not in (*_OF_PAGES, "block_stride", "head_stride"))
)


@functools.cache
def source(head_size: int, num_kv_heads: int, dtype: torch.dtype, window_block_size: int) -> Source:
    """What is compiled for rows and a window of these sizes."""
    macros = {
        "HEAD_SIZE": head_size,
        "NUM_KV_HEADS": num_kv_heads,
        "NUMBERS": NUMBER_TYPES[dtype],
        "WINDOW_BLOCK_SIZE": window_block_size,
    }
    return Source("keep_rows", tuple(macros.items()), ((arguments.HEADER, ARGUMENTS.declaration),))


def keep_rows(key: torch.Tensor, value: torch.Tensor, window: WindowRows) -> None:
    """As :class:`vllm_kvtuner.kernels.contract.KeepRows`. The first call of a variant compiles it."""
    num_slots = min(key.shape[0], window.slot_mapping.shape[0])
    assert value.shape == key.shape and value.dtype == key.dtype, (key.shape, value.shape, key.dtype, value.dtype)
    for rows in (key, value):
        check_rows(rows)
        check_alignment(rows)
    window.check(key, num_slots)
    if num_slots == 0:
        return
    _, heads, size = key.shape
    kernel = build(source(size, heads, key.dtype, window.kv_cache.shape[2]), 32 * NUM_WARPS, 0, key.device)
    parts = num_slots * 2 * heads * (size * key.element_size() // ALIGNMENT)
    given = ARGUMENTS.structure(
        key=key.data_ptr(),
        value=value.data_ptr(),
        key_stride=byte_stride(key),
        value_stride=byte_stride(value),
        num_slots=num_slots,
        window_slots=window.slot_mapping.data_ptr(),
        **window_addresses(window),
    )
    kernel.launch(min(math.ceil(parts / (32 * NUM_WARPS)), kernel.max_ctas), given)
