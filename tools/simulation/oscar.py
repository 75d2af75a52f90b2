"""OSCAR (arXiv 2605.17757): two bits in a basis that attention itself gives."""

from collections.abc import Sequence

import torch

from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View, first, newest
from kvtuner_tools.simulation.rounding import round_between
from vllm_kvtuner.pages.transforms import hadamard

SINKS, RECENT = 64, 256
KEY_CLIP, VALUE_CLIP = 0.96, 0.92
"""Place among a row's sorted magnitudes, as a share of its numbers, at which it is clipped."""


class Oscar(Method):
    """Rows after RoPE in the eigenvectors of what attention makes of them, then rotated, clipped and rounded to 2 bits.

    One rotation a layer and side. Of keys they are the eigenvectors of the queries' second moment, the mean over heads;
    of values those of the values' second moment, each weighted by k^T (Q^T Q) k of its key. Rows are rounded between
    minimum and maximum with scale and zero point in 16 bits. The first 64 and the newest 256 tokens are kept.

    Args:
        bits: of a code.
    """

    calibrates = True

    def __init__(self, bits: int = 2) -> None:
        self.label = f"oscar:{bits}"
        self._bits = bits

    def prepare(self, layer: Layer, texts: Sequence[Rows]) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotations of keys and of values, [head_size, head_size]; a row times one is in the basis."""
        size = layer.head_size
        queries = torch.zeros(size, size, dtype=torch.float64, device=texts[0].key.device)
        for rows in texts:
            flat = rows.query.reshape(-1, size).double()
            queries += flat.T @ flat / layer.num_heads
        values = torch.zeros_like(queries)
        for rows in texts:
            key, value = (each.reshape(-1, size).double() for each in (rows.key, rows.value))
            weights = ((key @ queries) * key).sum(-1, keepdim=True)
            values += (value * weights).T @ value
        turn = hadamard(size, queries.device)
        return tuple(torch.linalg.eigh(each).eigenvectors.float() @ turn for each in (queries, values))

    def view(self, layer: Layer, statics: tuple[torch.Tensor, torch.Tensor], rows: Rows) -> View:
        key, value = (
            round_clipped(side @ turn, self._bits, clip) @ turn.T
            for side, turn, clip in zip((rows.key, rows.value), statics, (KEY_CLIP, VALUE_CLIP), strict=True)
        )
        tokens = rows.num_tokens
        exact = newest(tokens, RECENT, key.device) | first(tokens, SINKS, key.device)
        return View(key, value, Storage(self._bits + 32 / layer.head_size, SINKS + RECENT), exact, exact)


def round_clipped(rows: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """Rows [..., head_size] in codes of ``bits``, after clipping at one of their own magnitudes."""
    size = rows.shape[-1]
    limit = rows.abs().sort(-1).values[..., min(int(clip * size), size - 1), None]
    return round_between(rows.clamp(-limit, limit), bits, -1)
