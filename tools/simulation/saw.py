"""SAW-INT4 (arXiv 2604.19157): int4 per token and head, after a block-diagonal Hadamard rotation."""

import torch

from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View
from kvtuner_tools.simulation.rounding import round_between
from vllm_kvtuner.pages.transforms import hadamard

BLOCK = 16
"""Order of the blocks that the authors use."""
BITS = 4


class Saw(Method):
    """Rows after RoPE, rotated, each rounded between its minimum and maximum with scale and zero point in 16 bits.

    Args:
        rotation: ``blocks`` for blocks of 16 on keys alone, the authors' default, ``full`` for whole heads of keys and
            values, or ``none``.
    """

    def __init__(self, rotation: str = "blocks") -> None:
        if rotation not in ("blocks", "full", "none"):
            raise ValueError(f"saw: rotation must be blocks, full or none, but got {rotation!r}")
        self.label = f"saw:{rotation}"
        self._rotation = rotation

    def view(self, layer: Layer, statics: object, rows: Rows) -> View:
        size, device = layer.head_size, rows.key.device
        identity = torch.eye(size, device=device)
        key_turn = {
            "blocks": torch.block_diag(*[hadamard(BLOCK, device)] * (size // BLOCK)),
            "full": hadamard(size, device),
            "none": identity,
        }[self._rotation]
        value_turn = hadamard(size, device) if self._rotation == "full" else identity
        key, value = (
            round_between(side @ turn, BITS, -1) @ turn.T
            for side, turn in ((rows.key, key_turn), (rows.value, value_turn))
        )
        return View(key, value, Storage(BITS + 32 / size))
