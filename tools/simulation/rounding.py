"""Uniform rounding between minimum and maximum, as many methods share it."""

import torch


def round_between(
    rows: torch.Tensor,
    bits: int,
    dims: int | tuple[int, ...],
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows by codes of ``bits`` between a group's minimum and maximum, both kept in fp16 with the step.

    Args:
        rows: fp32 of any shape.
        bits: of a code.
        dims: along which a group lies.
        low: of each group, with its dims of size 1; by default its minimum.
        high: likewise; by default its maximum.
    """
    low = rows.amin(dims, keepdim=True) if low is None else low
    high = rows.amax(dims, keepdim=True) if high is None else high
    minimum = low.half().float()
    step = ((high - low) / (2**bits - 1)).half().float()
    codes = ((rows - minimum) / step.clamp(min=1e-10)).round().clamp(0, 2**bits - 1)
    return codes * step + minimum
