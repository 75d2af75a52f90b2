"""Round feedback: rounding in which each number of a row takes up the errors of those rounded before it.

Nearest codes make the error e of a row small in |e|^2. What counts is e^T M e, with M the sensitivity of the model's
output to errors of such rows. With M = R^T R, R upper triangular, this is the sum over channels i of

    (R_ii)^2 (e_i + sum_{j > i} C_ij e_j)^2,    C_ij = R_ij / R_ii

so that channels are rounded from the last to the first, each to the code nearest to z_i + sum_{j > i} C_ij e_j. Rows z
are those that are packed: after all transforms. Where M is a multiple of the identity, this is nearest rounding.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

BLOCK = 16
"""Channels that are rounded one after the other, before a matrix product takes their errors to all that follow."""
TOKENS_AT_ONCE = 1024
"""Of rows in up to RANGES_AT_ONCE ranges: bounds the memory of a call, and keeps it near the processor."""
RANGES_AT_ONCE = 3
GPU_TOKENS_AT_ONCE = 8192
"""On a GPU, where a call takes as long for these as for a few: its launches do."""


@dataclass(frozen=True, eq=False)
class RoundFeedback:
    """What rounding knows of the rows of one side of a layer.

    Args:
        factors: [num_kv_heads, head_size, head_size] fp16, as :func:`triangular_factors` makes them: above the diagonal
            C_ij, on it R_ii but for a factor per head, below it 0.
        ranges: per bits of a code, the factors on a row's maximum - minimum, 1 to 3, that are tried. The range is
            shrunk, or stretched, about its middle.
    """

    factors: torch.Tensor
    ranges: Mapping[int, tuple[float, ...]]

    @functools.cached_property
    def coefficients(self) -> torch.Tensor:
        """C above the diagonal and 0 elsewhere, [num_kv_heads, head_size, head_size] fp32."""
        return self.factors.float().triu(1)

    @functools.cached_property
    def weights(self) -> torch.Tensor:
        """Squares of the diagonal, [num_kv_heads, head_size] fp32: what a channel's distance from its code counts."""
        return self.factors.float().diagonal(dim1=-2, dim2=-1).square()

    @functools.cached_property
    def columns(self) -> torch.Tensor:
        """[num_kv_heads, head_size, head_size] fp16: what ``factors`` has in column j, for the kernels, in row j."""
        return self.factors.mT.contiguous()

    @functools.cached_property
    def range_factors(self) -> dict[int, torch.Tensor]:
        """Per bits [ranges, 2] fp32, factors on a row's maximum - minimum: the step, and what the minimum moves by."""
        return {
            bits: torch.tensor(
                [(factor / (2**bits - 1), 0.5 * (1.0 - factor)) for factor in factors],
                dtype=torch.float32,
                device=self.factors.device,
            )
            for bits, factors in self.ranges.items()
        }

    @torch.inference_mode()  # in which the cached ones may have been computed
    def take_over(self, other: "RoundFeedback") -> None:
        """Round by another's factors from now on, in the tensors that kernels and CUDA graphs have the addresses of."""
        self.factors.copy_(other.factors)
        for name in ("coefficients", "weights", "columns"):
            if name in self.__dict__:  # computed already, and read by somebody perhaps
                self.__dict__[name].copy_(getattr(other, name))

    def weighted_error(self, errors: torch.Tensor) -> torch.Tensor:
        """e^T M e, fp32 [num_tokens, num_kv_heads], of errors [num_tokens, num_kv_heads, head_size] fp32."""
        taken = errors + torch.einsum("hij,thj->thi", self.coefficients, errors)
        return (self.weights * taken.square()).sum(-1)

    def round(
        self, rows: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of rows, by the best of several ranges for each.

        Args:
            rows: [num_tokens, num_kv_heads, head_size] fp32, of numbers that fp16 has room for.
            scale: [ranges, num_tokens, num_kv_heads] fp16, the step of each range.
            minimum: likewise, its least number.
            levels: the largest code.

        Returns:
            codes uint8 [num_tokens, num_kv_heads, head_size], and int64 [num_tokens, num_kv_heads], the range each row
            took: that of least e^T M e, the first of equals.
        """
        return self.round_by(rows, scale, minimum, levels, [range(len(scale))])[0]

    def round_by(
        self,
        rows: torch.Tensor,
        scale: torch.Tensor,
        minimum: torch.Tensor,
        levels: int,
        subsets: Sequence[Sequence[int]],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """As :meth:`round` of some of the ranges alone, for each of several choices of them.

        Rows are rounded in each range once, however many subsets it is in.

        Args:
            rows: as in :meth:`round`, like the next three.
            subsets: numbers of ranges; all of them in order, where there are as many.

        Returns:
            For each subset codes and, among all ranges, the one that each row took.
        """
        at_once = TOKENS_AT_ONCE if rows.device.type == "cpu" else GPU_TOKENS_AT_ONCE
        at_once = max(1, min(at_once, RANGES_AT_ONCE * at_once // len(scale)))
        parts = [
            self._round(*part, levels, subsets)
            for part in zip(
                rows.split(at_once),
                scale.float().split(at_once, dim=1),
                minimum.float().split(at_once, dim=1),
                strict=True,
            )
        ]
        return [
            (torch.cat([codes for codes, _ in of_subset]), torch.cat([chosen for _, chosen in of_subset]))
            for of_subset in zip(*parts, strict=True)
        ]

    def _round(
        self,
        rows: torch.Tensor,
        scale: torch.Tensor,
        minimum: torch.Tensor,
        levels: int,
        subsets: Sequence[Sequence[int]],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        num_ranges, num_tokens, heads = scale.shape
        size = rows.shape[-1]
        # A channel is rounded in all rows at once, so rows stand last: [heads, head_size, ranges * tokens].
        exact = rows.permute(1, 2, 0).repeat(1, 1, num_ranges)
        step = scale.permute(2, 0, 1).reshape(heads, -1)
        base = minimum.permute(2, 0, 1).reshape(heads, -1)
        inverse = torch.where(step > 0, 1.0 / step, 0.0)
        aims, errors = exact.clone(), torch.empty_like(exact)
        codes = torch.empty_like(exact, dtype=torch.uint8)
        cost = torch.zeros_like(step)
        # Views of single channels, made at once: a GPU waits for whoever launches its work, views included.
        wanted, goals, left, taken = (each.unbind(1) for each in (exact, aims, errors, codes))
        weights = self.weights[..., None].unbind(1)
        for begin in reversed(range(0, size, BLOCK)):
            end = min(begin + BLOCK, size)
            for channel in reversed(range(begin, end)):
                aim = goals[channel]
                code = ((aim - base) * inverse + 0.5).floor().clamp(0, levels)
                number = code * step + base
                error = wanted[channel] - number
                cost += weights[channel] * (aim - number).square()
                taken[channel].copy_(code)
                left[channel].copy_(error)
                if channel > begin:
                    aims[:, begin:channel] += self.coefficients[:, begin:channel, channel, None] * error[:, None]
            aims[:, :begin] += self.coefficients[:, :begin, begin:end] @ errors[:, begin:end]
        cost, codes = cost.view(heads, num_ranges, num_tokens), codes.view(heads, size, num_ranges, num_tokens)
        found = []
        for subset in subsets:
            if len(subset) == num_ranges:
                chosen = cost.argmin(1)
            else:
                numbers = torch.tensor(subset, device=rows.device)
                chosen = numbers[cost[:, numbers].argmin(1)]
            index = chosen[:, None, None].expand(heads, size, 1, num_tokens)
            found.append((codes.gather(2, index)[:, :, 0].permute(2, 0, 1), chosen.T))
        return found


def triangular_factors(metric: torch.Tensor) -> torch.Tensor:
    """Factors of :class:`RoundFeedback` from what errors of packed rows cost.

    Args:
        metric: [num_kv_heads, head_size, head_size] fp64, symmetric and positive definite. Add a part of its mean
            eigenvalue to the diagonal where little text stands behind it. Its scale does not matter.

    Returns:
        [num_kv_heads, head_size, head_size] fp16, the diagonal's mean square 1 in each head.

    Raises:
        ValueError: a head's metric is not positive definite, or too near to singular for fp16.
    """
    lower, failed = torch.linalg.cholesky_ex(metric.double())
    if failed.any():
        head = int(failed.nonzero()[0])
        raise ValueError(f"metric must be positive definite, but got another for head {head}")
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    upper = (lower / diagonal[:, None]).mT.triu(1)
    weights = diagonal / diagonal.square().mean(-1, keepdim=True).sqrt()
    factors = (upper + torch.diag_embed(weights)).half()
    singular = ~factors.isfinite().all(dim=(1, 2)) | (factors.diagonal(dim1=-2, dim2=-1) <= 0).any(-1)
    if singular.any():
        head = int(singular.nonzero()[0])
        raise ValueError(f"metric must be damped, so that fp16 holds its factor, but got one beyond it for head {head}")
    return factors
