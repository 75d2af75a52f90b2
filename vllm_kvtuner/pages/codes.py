"""Codes of packed pages: rows quantized, packed and read back, in torch."""

import torch

RANGE_FACTORS = tuple(1.0 - 0.05 * step for step in range(11))
"""Factors 1, 0.95, ..., 0.5 that range search shrinks a row's [min, max] by, about its middle."""
FP16_MAX = 65504.0


def quantize_rows(
    rows: torch.Tensor, bits: int, range_search: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-row asymmetric quantization: row ~ scale * code + minimum.

    Scale and minimum are rounded to fp16 before the codes are taken, so that codes match what a reader multiplies
    by; a constant row gets scale 0.

    Args:
        rows: [..., head_size], any float dtype.
        bits: 2, 4 or 8.
        range_search: among RANGE_FACTORS take the range with the least squared error, if bits < 8.

    Returns:
        codes uint8 [..., head_size], scale fp16 [...], minimum fp16 [...].
    """
    rows = rows.float()
    low, high = rows.amin(-1), rows.amax(-1)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    best_error = torch.empty(0)
    for factor in RANGE_FACTORS if range_search and bits < 8 else (1.0,):
        shrink = (high - low) * (0.5 * (1.0 - factor))
        scale = ((high - low) * (factor / (2**bits - 1))).clamp(max=FP16_MAX).half()
        minimum = (low + shrink).clamp(-FP16_MAX, FP16_MAX).half()
        step, base = scale.float()[..., None], minimum.float()[..., None]
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        codes = ((rows - base) * inverse + 0.5).floor().clamp(0, 2**bits - 1)
        error = (rows - (codes * step + base)).square().sum(-1)
        if best is None:
            best, best_error = (codes, scale, minimum), error
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (
                torch.where(better[..., None], codes, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, minimum, best[2]),
            )
    assert best is not None
    return best[0].to(torch.uint8), best[1], best[2]


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [..., head_size] to bytes uint8 [..., head_size * bits / 8], in layout.py's order."""
    slices = codes.chunk(8 // bits, dim=-1)
    packed = slices[0].clone()
    for index, part in enumerate(slices[1:], 1):
        packed |= part << (index * bits)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_codes`."""
    if bits == 8:
        return packed
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim=-1)


def dequantize(packed: torch.Tensor, meta: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows fp32 [..., head_size] of packed codes [..., row_bytes] and meta [..., 2]."""
    scale, minimum = meta.float().unsqueeze(-1).unbind(-2)
    return unpack_codes(packed, bits).float() * scale + minimum
