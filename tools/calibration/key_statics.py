"""Static tensors of keys from a capture: means before RoPE, and equalization factors per RoPE pair.

With factors f, a logit is sum_d (q_d f_d)(k_d / f_d). Where the errors of a quantized row are of one size in all
channels, as after a Hadamard rotation, that size goes with sum_d (k_d / f_d)^2, and the logit's squared error with it
times sum_d (q_d f_d)^2. By the Cauchy-Schwarz inequality the product is least at f^2 = std(k) / rms(q); f^2 = std(k) is
the same for queries that are alike in all channels.

Round feedback shapes errors as the queries ask by itself: at many bits, a row's error goes with sum_d (k_d / f_d)^2 and
the geometric mean of the metric, whatever f. The product of both is least at f = std(k), where all channels of the
quantized row are alike. At few bits, numbers that take up what others lack leave the range, the more the wider the
metric, so that factors between both are best: f^2 = std(k)^(1 + w) / rms(q)^(1 - w).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvtuner_tools.calibration.captured import Window
from kvtuner_tools.calibration.rotation import undo_rotary
from vllm_kvtuner.pages.transforms import RotaryTable
from vllm_kvtuner.profile.statics import rope_pairs

WHITENING = {"mostly keys": 0.5, "nearly keys alone": 0.75}
"""Name -> w of factors for rows with round feedback; in between, none was better on three models."""
_SMALLEST = 1e-3
"""A channel below this share of its head's root mean square counts as this; a dead one would get a factor of 0."""


@dataclass(frozen=True)
class PairLayout:
    """Which channels share a factor.

    Args:
        rotary_dim: leading channels that RoPE rotates.
        is_neox: as in RotaryTable.
    """

    rotary_dim: int
    is_neox: bool

    @property
    def metadata(self) -> dict[str, str]:
        """What a statics file says of it."""
        return {"rotary_dim": str(self.rotary_dim), "rope_style": self._style}

    @property
    def _style(self) -> str:
        return "neox" if self.is_neox else "interleaved"

    def largest_pairs(self, offset: torch.Tensor, count: int) -> torch.Tensor:
        """The offset [num_kv_heads, head_size] in the ``count`` pairs where it is largest over all heads, else 0.

        Channels that RoPE does not rotate are kept: they cost nothing, since their logit is the same for all keys.
        """
        first, second = map(torch.from_numpy, rope_pairs(offset.shape[1], self.rotary_dim, self._style))
        energy = (offset[:, first].square() + offset[:, second].square()).sum(0)
        dropped = energy.cpu().argsort(descending=True)[count:]
        kept = offset.clone()
        kept[:, first[dropped]] = kept[:, second[dropped]] = 0.0
        return kept

    def pooled(self, square: torch.Tensor) -> torch.Tensor:
        """Mean squares [num_kv_heads, head_size], each replaced by its pair's mean."""
        first, second = rope_pairs(square.shape[1], self.rotary_dim, self._style)
        pooled = square.clone()
        pooled[:, first] = pooled[:, second] = (square[:, first] + square[:, second]) / 2
        return pooled


@dataclass(frozen=True)
class KeyStatics:
    """Moments of a layer's keys and queries before RoPE, fp32.

    Args:
        mean: [num_kv_heads, head_size] of the keys.
        variance: likewise, about the mean.
        query_square: likewise, mean square of the queries over a KV head's query heads.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    query_square: torch.Tensor

    @classmethod
    def of(cls, windows: Iterable[Window], rotary: RotaryTable | None) -> "KeyStatics":
        """Over all windows but their first tokens, whose keys, where attention sinks, are unlike all others.

        Holds one window at a time.

        Args:
            windows: the layer's.
            rotary: rotated row t of each; None if nothing did.
        """
        keys = queries = 0
        key_sum = key_square = query_square = torch.zeros((), dtype=torch.float64)
        for window in windows:
            positions = torch.arange(window.key.shape[0], device=window.key.device)
            key = window.key if rotary is None else undo_rotary(window.key, positions, rotary)
            key = key[1:].double()
            query, at = window.query, window.query_position
            query = (query if rotary is None else undo_rotary(query, at, rotary)).double()
            grouped = query.view(query.shape[0], key.shape[1], -1, key.shape[2])
            keys, queries = keys + key.shape[0], queries + grouped.shape[0] * grouped.shape[2]
            key_sum, key_square = key_sum + key.sum(0), key_square + key.square().sum(0)
            query_square = query_square + grouped.square().sum((0, 2))
        mean = key_sum / keys
        variance = (key_square / keys - mean.square()).clamp(min=0)
        return cls(mean.float(), variance.float(), (query_square / queries).float())

    def factors(self, layout: PairLayout) -> dict[str, torch.Tensor | None]:
        """Factors [num_kv_heads, head_size] by what they follow from, of geometric mean 1 per head."""
        key, query = self._pooled(layout)
        return {"keys": _normalized(key**0.25), "keys and queries": _normalized((key / query) ** 0.25)}

    def factors_with_feedback(self, layout: PairLayout) -> dict[str, torch.Tensor]:
        """The same for rows that are rounded with feedback."""
        key, query = self._pooled(layout)
        return {name: _normalized((key ** (1 + w) / query ** (1 - w)) ** 0.25) for name, w in WHITENING.items()}

    def _pooled(self, layout: PairLayout) -> tuple[torch.Tensor, torch.Tensor]:
        return _floored(layout.pooled(self.variance)), _floored(layout.pooled(self.query_square))


def _floored(square: torch.Tensor) -> torch.Tensor:
    floor = (_SMALLEST**2 * square.mean(1, keepdim=True)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(square, floor)


def _normalized(factors: torch.Tensor) -> torch.Tensor:
    return factors / factors.log().mean(1, keepdim=True).exp()
