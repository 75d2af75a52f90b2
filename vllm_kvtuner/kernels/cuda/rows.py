"""What the kernels on whole rows share: store and gather of keys and values, each row in several lanes of a warp."""

import torch

from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

NUM_WARPS = 4
NUMBER_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Types of numbers in memory, as device.cuh counts them."""


def unsupported(layout: PageLayout) -> str | None:
    """Why the kernels do not serve a layer, or None if they do."""
    if layout.head_size % 32:
        return f"head_size {layout.head_size} is no multiple of 32"
    return None


def row_lanes(head_size: int, bits: int, most: int) -> int:
    """Lanes that share a row: a power of two up to ``most``, each with whole bytes of the packed row."""
    row_bytes = head_size * bits // 8
    return min(most, row_bytes & -row_bytes)


def wide_lanes(head_size: int) -> int:
    """``most`` of :func:`row_lanes` where rows abound: about 16 numbers a lane, which takes the least work per row."""
    return 8 if head_size <= 128 else 16


def row_defines(
    layout: PageLayout, num_kv_heads: int, dtype: torch.dtype, transforms: LayerTransforms, most_lanes: int
) -> dict[str, int]:
    """Macros of both kernels.

    Args:
        layout: the layer's page.
        num_kv_heads: of the layer.
        dtype: of keys and values in model space.
        transforms: the layer's transforms.
        most_lanes: that share a row.
    """
    rotary = transforms.rotary if transforms.key_offset is not None else None
    lanes = [row_lanes(layout.head_size, bits, most_lanes) for bits in (layout.k_bits, layout.v_bits)]
    moved = transforms.key_offset is not None or transforms.key_equalization is not None
    # Where a lane holds many numbers, fewer warps with more registers each, rather than spills.
    crowded = layout.head_size // min(lanes) > (8 if moved else 16)
    return {
        "HEAD_SIZE": layout.head_size,
        "K_BITS": layout.k_bits,
        "V_BITS": layout.v_bits,
        "BLOCK_SIZE": layout.block_size,
        "NUM_KV_HEADS": num_kv_heads,
        "NUMBERS": NUMBER_TYPES[dtype],
        "K_LANES": lanes[0],
        "V_LANES": lanes[1],
        "MIN_CTAS": 5 if crowded else 8,
        "KEY_OFFSET": int(transforms.key_offset is not None),
        "ROTARY_DIM": rotary.rotary_dim if rotary else 0,
        "IS_NEOX": int(rotary.is_neox) if rotary else 1,
        "ROTARY_NUMBERS": NUMBER_TYPES[rotary.cos_sin.dtype] if rotary else 0,
        "KEY_EQUALIZATION": int(transforms.key_equalization is not None),
        "KEY_HADAMARD": int(transforms.key_hadamard),
        "VALUE_HADAMARD": int(transforms.value_hadamard),
    }


def transform_addresses(transforms: LayerTransforms) -> tuple[int, int, int, int]:
    """Addresses of key offset, its partner, the rotary table and key equalization; 0 for what the layer has not."""
    rotary = transforms.rotary if transforms.key_offset is not None else None
    table = rotary.cos_sin if rotary else None
    arrays = (transforms.key_offset, transforms.offset_partner, table, transforms.key_equalization)
    addresses = []
    for array in arrays:
        assert array is None or (array.is_contiguous() and array.data_ptr() % 16 == 0), (
            "statics are loaded 16 bytes wide"
        )
        addresses.append(0 if array is None else array.data_ptr())
    return addresses[0], addresses[1], addresses[2], addresses[3]


def check_rows(rows: torch.Tensor, head_size: int) -> None:
    """The contract on keys and values in model space, [num_tokens, num_kv_heads, head_size]."""
    assert rows.stride(2) == 1 and rows.stride(1) == head_size, "a token's heads must be contiguous"
    assert rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0, "rows are moved 16 bytes wide"


def byte_stride(tensor: torch.Tensor, dim: int = 0) -> int:
    """Bytes between neighbours along ``dim``, which the kernels take in 32 bits."""
    stride = tensor.stride(dim) * tensor.element_size()
    assert 0 <= stride < 1 << 32, stride
    return stride
