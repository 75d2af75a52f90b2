"""RoPE and its inverse on captured rows, by the model's own table."""

import torch

from vllm_kvtuner.pages.transforms import RotaryTable


def apply_rotary(rows: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rows after RoPE in fp32, for rows before it [num_tokens, heads, head_size] at ``positions`` [num_tokens]."""
    cos, sin = _factors(positions, table)
    return _turn(rows, cos, sin, table)


def undo_rotary(rows: torch.Tensor, positions: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Inverse of :func:`apply_rotary`.

    A table's pairs of cosine and sine do not lie on the unit circle: they are rounded to the model's dtype, and scaled
    by some RoPE variants (YaRN, LongRoPE). The inverse of the 2 x 2 matrix takes both back.
    """
    cos, sin = _factors(positions, table)
    norm = cos.square() + sin.square()
    return _turn(rows, cos / norm, -sin / norm, table)


def _factors(positions: torch.Tensor, table: RotaryTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [num_tokens, 1, rotary_dim / 2] fp32 each."""
    cos, sin = table.cos_sin[positions].float().chunk(2, dim=-1)
    return cos[:, None], sin[:, None]


def _turn(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    first, second = table.pairs(rows.device)
    turned = rows.float().clone()
    turned[..., first] = rows[..., first] * cos - rows[..., second] * sin
    turned[..., second] = rows[..., second] * cos + rows[..., first] * sin
    return turned
