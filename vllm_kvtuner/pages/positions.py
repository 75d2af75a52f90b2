"""Positions of cached tokens, where a token has several: time, height and width under M-RoPE.

A token that has one position stands where it is in its request, so nothing has to be kept. Under M-RoPE each rotary
pair turns by one of several positions, an image's tokens share some of them, and text goes on from the largest. They
are the same for all layers and heads: one small table by slot serves all. Whoever stores a token writes its row, all
layers the same numbers; blocks that the prefix cache, preemption or another request bring back bring their rows along.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """Positions by which a model's rotary embedding turns, several to a token.

    Args:
        axes: [rotary_dim / 2] int32, which of a token's positions turns a pair.
        step: [num_axes, at least the tokens of a batch] int64: those of the batch in flight, rows contiguous. The
            engine's own buffer, so that a CUDA graph finds each step's in the same place.
    """

    axes: torch.Tensor
    step: torch.Tensor
    _tables: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def num_axes(self) -> int:
        return self.step.shape[0]

    def table(self, num_blocks: int, block_size: int) -> torch.Tensor:
        """[num_blocks * block_size, num_axes] int32, by slot, of all caches of this many blocks.

        Blocks come from one pool, whichever KV cache group takes them, so caches whose blocks have the same size never
        use the same slot at once.
        """
        table = self._tables.get((num_blocks, block_size))
        if table is None:
            shape = num_blocks * block_size, self.num_axes
            table = torch.zeros(shape, dtype=torch.int32, device=self.step.device)
            self._tables[num_blocks, block_size] = table
        return table
