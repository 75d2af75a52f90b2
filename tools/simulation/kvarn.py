"""KVarN (Mueller et al. 2026, arXiv 2606.03458), as its vLLM fork's store kernel and its reference have it."""

import torch

from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View, first
from vllm_kvtuner.pages.transforms import hadamard

TILE = 128
"""Tokens that are scaled and quantized together."""
SINKS = 128
"""First tokens that are kept in fp16."""
PASSES = 16
LEAST_LOG, MOST_LOG = -0.3, 10.0
LEAST_STD, MOST_STD = 1e-3, 1e3


class KVarN(Method):
    """Rows after RoPE and a Hadamard rotation, in tiles whose variance is evened out over tokens and channels.

    A tile is divided by a factor per token and one per channel, found by turns in logs. Then keys are rounded per
    channel and values per token, between minimum and maximum. Three vectors in fp16 stay with a tile: both factors, of
    which one is joined to the step, and the minimum. A tile that is not full waits in fp16.

    Args:
        key_bits: of a key's code.
        value_bits: of a value's code.
    """

    def __init__(self, key_bits: int = 4, value_bits: int = 2) -> None:
        self.label = f"kvarn:{key_bits}:{value_bits}"
        self._key_bits, self._value_bits = key_bits, value_bits

    def view(self, layer: Layer, statics: object, rows: Rows) -> View:
        size, tokens = layer.head_size, rows.num_tokens
        turn = hadamard(size, rows.key.device)
        whole = tokens // TILE * TILE
        sides = []
        for side, bits, along_tokens in (
            (rows.key, self._key_bits, True),
            (rows.value, self._value_bits, False),
        ):
            tiles = (side[:whole] @ turn).view(-1, TILE, layer.num_kv_heads, size).transpose(1, 2)
            read = round_tiles(tiles.mT if along_tokens else tiles, bits)
            read = read.mT if along_tokens else read
            full = side.clone()
            full[:whole] = read.transpose(1, 2).reshape(whole, layer.num_kv_heads, size) @ turn
            sides.append(full)
        position = rows.positions
        exact = (position[None, :] >= (position[:, None] + 1) // TILE * TILE) | first(tokens, SINKS, rows.key.device)
        vectors = (2 * size + TILE) + (2 * TILE + size)
        bits = (self._key_bits + self._value_bits) / 2 + 16 * vectors / (2 * TILE * size)
        return View(*sides, Storage(bits, SINKS + (TILE - 1) / 2), exact, exact)


def round_tiles(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """Tiles [..., rows, columns] fp32, each row between its minimum and maximum after both factors.

    Of keys, rows are channels and columns tokens; of values the other way round.
    """
    columns, rows = balancing_factors(tiles)
    balanced = tiles / columns / rows
    low, high = balanced.amin(-1, keepdim=True), balanced.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-10)
    codes = ((balanced - low) / step).round().clamp(0, 2**bits - 1)
    return (codes * (rows * step).half().float() + (rows * low).half().float()) * columns.half().float()


def balancing_factors(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors per column [..., 1, columns] and per row [..., rows, 1] that even standard deviations out.

    They are exponentials of sums of logs, each pass taking the deviations of what the one before left. Of all passes,
    and none at all, the one with the least spread is taken: the ratio of the largest to the least deviation, of columns
    plus of rows.
    """
    columns = torch.zeros_like(tiles[..., :1, :])
    rows = torch.zeros_like(tiles[..., :1])
    best_columns, best_rows = columns.exp(), rows.exp()
    current = tiles
    least = _spread(current)
    for _ in range(PASSES):
        columns = (columns + current.std(-2, keepdim=True).clamp(LEAST_STD, MOST_STD).log()).clamp(LEAST_LOG, MOST_LOG)
        current = tiles / columns.exp() / rows.exp()
        rows = (rows + current.std(-1, keepdim=True).clamp(LEAST_STD, MOST_STD).log()).clamp(LEAST_LOG, MOST_LOG)
        current = tiles / columns.exp() / rows.exp()
        spread = _spread(current)
        better = (spread <= least)[..., None, None]
        best_columns = torch.where(better, columns.exp(), best_columns)
        best_rows = torch.where(better, rows.exp(), best_rows)
        least = torch.minimum(spread, least)
    return best_columns, best_rows


def _spread(tiles: torch.Tensor) -> torch.Tensor:
    columns, rows = tiles.std(-2), tiles.std(-1)
    return columns.amax(-1) / columns.amin(-1).clamp(min=1e-8) + rows.amax(-1) / rows.amin(-1).clamp(min=1e-8)
