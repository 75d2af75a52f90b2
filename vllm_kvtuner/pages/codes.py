"""Code formats: how the numbers of a row become the codes of a packed page, and back, in torch.

A format is one class. triton/codes.py and cuda/src/codes.cuh are its twins in the kernels. All kernels read a number as
scale * code + minimum; what decoding multiplies (q . codes, P . codes) rests on that.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import FP16_MAX, QUANTIZED_BITS

RANGE_FACTORS = tuple(1.0 - 0.05 * step for step in range(11))
"""Factors 1, 0.95, ..., 0.5 that range search shrinks a row's [min, max] by, about its middle."""


@dataclass(frozen=True)
class UniformCodes:
    """Asymmetric uniform codes per row: row ~ scale * code + minimum, scale and minimum fp16.

    Args:
        bits: of a code, 2, 4 or 8.
    """

    bits: int

    @property
    def levels(self) -> int:
        """The largest code, steps between a row's minimum and maximum."""
        return 2**self.bits - 1

    @property
    def fields(self) -> int:
        """Codes of a byte."""
        return 8 // self.bits

    def quantize(
        self, rows: torch.Tensor, range_search: bool = False, feedback: RoundFeedback | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes of rows: the nearest ones, or by round feedback.

        Scale and minimum are rounded to fp16 before the codes are taken, so that codes match what a reader multiplies
        by; a constant row gets scale 0.

        Args:
            rows: [..., head_size], any float dtype; [..., num_kv_heads, head_size] with feedback.
            range_search: among RANGE_FACTORS take the range with the least squared error, if bits < 8.
            feedback: of the layer's side for codes of so many bits, as LayerTransforms.feedback has it. Its ranges then
                stand for those of the search.

        Returns:
            codes uint8 [..., head_size], scale fp16 [...], minimum fp16 [...].
        """
        rows = rows.float()
        if feedback is not None:
            return self._feed_back(rows, feedback)
        low, high = rows.amin(-1), rows.amax(-1)
        best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        best_error = torch.empty(0)
        for factor in RANGE_FACTORS if range_search and self.bits < 8 else (1.0,):
            scale, minimum = self._range(low, high, factor)
            step, base = scale.float()[..., None], minimum.float()[..., None]
            inverse = torch.where(step > 0, 1.0 / step, 0.0)
            codes = ((rows - base) * inverse + 0.5).floor().clamp(0, self.levels)
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

    def _feed_back(
        self, rows: torch.Tensor, feedback: RoundFeedback
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`quantize`; numbers beyond fp16 count as its largest, so that errors stay finite."""
        return self._feed_back_by(rows, feedback, [feedback.ranges[self.bits]])[0]

    def _feed_back_by(
        self, rows: torch.Tensor, feedback: RoundFeedback, candidates: Sequence[Sequence[float]]
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As :meth:`_feed_back` with each candidate's ranges for the feedback's own; each range is tried once."""
        shape = rows.shape
        rows = rows.reshape(-1, *shape[-2:]).clamp(-FP16_MAX, FP16_MAX)
        low, high = rows.amin(-1), rows.amax(-1)
        factors = list(dict.fromkeys(factor for ranges in candidates for factor in ranges))
        ranges = [self._range(low, high, factor) for factor in factors]
        scale, minimum = (torch.stack(each) for each in zip(*ranges, strict=True))
        subsets = [[factors.index(factor) for factor in ranges] for ranges in candidates]
        found = []
        for codes, chosen in feedback.round_by(rows, scale, minimum, self.levels, subsets):
            taken = (each.gather(0, chosen[None])[0].view(shape[:-1]) for each in (scale, minimum))
            found.append((codes.reshape(shape), *taken))
        return found

    def _range(self, low: torch.Tensor, high: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and minimum, fp16, of rows from ``low`` to ``high`` whose range is ``factor`` as wide."""
        shrink = (high - low) * (0.5 * (1.0 - factor))
        scale = ((high - low) * (factor / self.levels)).clamp(max=FP16_MAX).half()
        return scale, (low + shrink).clamp(-FP16_MAX, FP16_MAX).half()

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [..., head_size] to bytes uint8 [..., row bytes], in the order of pages/layout.py."""
        slices = codes.chunk(self.fields, dim=-1)
        packed = slices[0].clone()
        for index, part in enumerate(slices[1:], 1):
            packed |= part << (index * self.bits)
        return packed

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`pack`."""
        if self.bits == 8:
            return packed
        return torch.cat([(packed >> shift) & self.levels for shift in range(0, 8, self.bits)], dim=-1)

    def dequantize(self, packed: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
        """Rows fp32 [..., head_size] of packed codes [..., row bytes] and meta [..., 2] (scale, minimum)."""
        scale, minimum = meta.float().unsqueeze(-1).unbind(-2)
        return self.unpack(packed).float() * scale + minimum

    def round_trip(
        self, rows: torch.Tensor, range_search: bool = False, feedback: RoundFeedback | None = None
    ) -> torch.Tensor:
        """Rows fp32 as a page would give them back; arguments as :meth:`quantize`."""
        return _read(*self.quantize(rows, range_search, feedback))

    def round_trips(
        self, rows: torch.Tensor, feedback: RoundFeedback, candidates: Sequence[Sequence[float]]
    ) -> Iterator[torch.Tensor]:
        """As :meth:`round_trip` with each candidate's ranges in place of the feedback's own, for less than one by one.

        Args:
            rows: as in :meth:`quantize`.
            feedback: whose factors count.
            candidates: factors on a row's range, 1 to 3 each.
        """
        for each in self._feed_back_by(rows.float(), feedback, candidates):
            yield _read(*each)


def _read(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Numbers fp32 of codes [..., head_size], scale and minimum [...]."""
    return codes.float() * scale.float()[..., None] + minimum.float()[..., None]


@functools.cache
def code_format(bits: int) -> UniformCodes:
    """The format of codes of ``bits``."""
    assert bits in QUANTIZED_BITS, bits
    return UniformCodes(bits)
