"""What the kernels on whole rows share: store and gather of keys and values, each row in several lanes of a warp."""

from typing import NamedTuple

import torch

from vllm_kvtuner.kernels.arguments import Field
from vllm_kvtuner.kernels.contract import WindowRows
from vllm_kvtuner.kernels.cuda import page_layout
from vllm_kvtuner.pages.layout import ALIGNMENT, MAX_HEAD_SIZE, PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

NUM_WARPS = 4
SEVERAL_POSITIONS = "the key offset turns by several positions of a token (M-RoPE)"
"""Why no CUDA kernel serves a layer whose pages have a table of positions."""
NUMBER_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Types of numbers in memory, as device/rows.cuh counts them."""
STATIC_FIELDS = (
    Field("const float*", "offset", "[KV heads][HEAD_SIZE]"),
    Field("const float*", "partner", "[KV heads][HEAD_SIZE], what the sines multiply"),
    Field("const u8*", "cos_sin", "[positions][ROTARY_DIM] of ROTARY_NUMBERS"),
    Field("const float*", "equalization", "[KV heads][HEAD_SIZE]"),
)
"""Arguments that are a layer's statics, as :func:`transform_addresses` gives them."""
STORE_FIELDS = (
    Field("const u8*", "key", "[tokens][KV heads][HEAD_SIZE] of NUMBERS"),
    Field("const u8*", "value", "likewise"),
    Field("u8*", "kv_cache", "chunks"),
    Field("const long long*", "slot_mapping", "[slots]"),
    Field("const long long*", "positions", "[slots]"),
    *STATIC_FIELDS,
    Field("u32", "key_stride", "bytes from token to token"),
    Field("u32", "value_stride", "bytes from token to token"),
    Field("u32", "block_stride", "bytes"),
    Field("u32", "head_stride", "bytes"),
    Field("int", "num_slots", "tokens that have a slot or -1"),
    Field("u8*", "window", "[blocks][KV heads][WINDOW_BLOCK_SIZE][2][HEAD_SIZE] of NUMBERS, a key beside its value"),
    Field("const long long*", "window_slots", "[slots]"),
    Field("u32", "window_block_stride", "bytes"),
    Field("u32", "window_head_stride", "bytes"),
    Field("u32", "window_place_stride", "bytes"),
)
"""Arguments of a store, with round feedback or without."""


class RowVariant(NamedTuple):
    """What compiled store and gather depend on besides the layer's transforms; made at every call, so it hashes fast.

    Args:
        layout: of the pages.
        num_kv_heads: of the layer.
        dtype: of keys and values in model space.
        most_lanes: that share a row.
    """

    layout: PageLayout
    num_kv_heads: int
    dtype: torch.dtype
    most_lanes: int

    @property
    def lanes(self) -> tuple[int, int]:
        """That share a key and a value."""
        size, most = self.layout.head_size, self.most_lanes
        return row_lanes(size, self.layout.k_bits, most), row_lanes(size, self.layout.v_bits, most)

    def macros(self, transforms: LayerTransforms) -> dict[str, int]:
        layout, (k_lanes, v_lanes) = self.layout, self.lanes
        rotary = transforms.rotary if transforms.key_offset is not None else None
        moved = transforms.key_offset is not None or transforms.key_equalization is not None
        # Where a lane holds many numbers, fewer warps with more registers each, rather than spills.
        crowded = layout.head_size // min(k_lanes, v_lanes) > (8 if moved else 16)
        return {
            "HEAD_SIZE": layout.head_size,
            "K_BITS": layout.k_bits,
            "V_BITS": layout.v_bits,
            "NUM_KV_HEADS": self.num_kv_heads,
            "NUMBERS": NUMBER_TYPES[self.dtype],
            "K_LANES": k_lanes,
            "V_LANES": v_lanes,
            "MIN_CTAS": 5 if crowded else 8,
            "KEY_OFFSET": int(transforms.key_offset is not None),
            "ROTARY_DIM": rotary.rotary_dim if rotary else 0,
            "IS_NEOX": int(rotary.is_neox) if rotary else 1,
            "ROTARY_NUMBERS": NUMBER_TYPES[rotary.cos_sin.dtype] if rotary else 0,
            "KEY_EQUALIZATION": int(transforms.key_equalization is not None),
            "KEY_HADAMARD": int(transforms.key_hadamard),
            "VALUE_HADAMARD": int(transforms.value_hadamard),
        }

    def headers(self) -> dict[str, str]:
        return {page_layout.HEADER: page_layout.page_layout(Chunk=self.layout)}


class StoreVariant(NamedTuple):
    """What a compiled store depends on besides the layer's transforms.

    Args:
        rows: as gather has it.
        window_block_size: tokens per block of the recent window that keeps tokens too, 0 for none.
    """

    rows: RowVariant
    window_block_size: int = 0

    def macros(self, transforms: LayerTransforms) -> dict[str, int]:
        search, window = int(transforms.range_search), self.window_block_size
        return {**self.rows.macros(transforms), "RANGE_SEARCH": search, "WINDOW_BLOCK_SIZE": window}


def unsupported(layout: PageLayout, transforms: LayerTransforms) -> str | None:
    """Why the kernels do not serve a layer, or None if they do."""
    if layout.head_size > MAX_HEAD_SIZE:
        return f"head_size {layout.head_size} is above {MAX_HEAD_SIZE}"
    if layout.head_size % 32:
        return f"head_size {layout.head_size} is no multiple of 32"
    if transforms.positions is not None:
        return SEVERAL_POSITIONS
    return None


def row_lanes(head_size: int, bits: int, most: int) -> int:
    """Lanes that share a row: a power of two up to ``most``, each with whole bytes of the packed row."""
    row_bytes = head_size * bits // 8
    return min(most, row_bytes & -row_bytes)


def wide_lanes(head_size: int) -> int:
    """``most`` of :func:`row_lanes` where rows abound: about 16 numbers a lane, which takes the least work per row."""
    return 8 if head_size <= 128 else 16


def transform_addresses(transforms: LayerTransforms) -> dict[str, int]:
    """Arguments of both kernels that are a layer's statics; 0 for what the layer has not."""
    rotary = transforms.rotary if transforms.key_offset is not None else None
    return {
        "offset": _address(transforms.key_offset),
        "partner": _address(transforms.offset_partner),
        "cos_sin": _address(rotary.cos_sin if rotary else None),
        "equalization": _address(transforms.key_equalization),
    }


def window_addresses(window: WindowRows) -> dict[str, int]:
    """Arguments that are a recent window's cache; ``window_slots``, which change from step to step, come on top."""
    cache = window.kv_cache
    return {
        "window": cache.data_ptr(),
        "window_block_stride": byte_stride(cache, 0),
        "window_head_stride": byte_stride(cache, 1),
        "window_place_stride": byte_stride(cache, 2),
    }


def _address(array: torch.Tensor | None) -> int:
    if array is None:
        return 0
    assert array.is_contiguous() and array.data_ptr() % ALIGNMENT == 0, "statics are loaded 16 bytes wide"
    return array.data_ptr()


def check_alignment(rows: torch.Tensor) -> None:
    """Of keys and values in model space, besides the contract: they are moved 16 bytes at a time."""
    assert rows.data_ptr() % ALIGNMENT == 0, "rows are moved 16 bytes wide"
    assert rows.stride(0) * rows.element_size() % ALIGNMENT == 0, rows.stride()


def byte_stride(tensor: torch.Tensor, dim: int = 0) -> int:
    """Bytes between neighbours along ``dim``, which the kernels take in 32 bits."""
    stride = tensor.stride(dim) * tensor.element_size()
    assert 0 <= stride < 1 << 32, stride
    return stride
