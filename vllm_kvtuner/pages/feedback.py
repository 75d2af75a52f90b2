"""Round feedback: rounding in which each number of a row takes up the errors of those rounded before it.

Nearest codes make the error e of a row small in |e|^2. What counts is e^T M e, with M the sensitivity of the model's
output to errors of such rows. With M = R^T R, R upper triangular, this is the sum over channels i of

    (R_ii)^2 (e_i + sum_{j > i} C_ij e_j)^2,    C_ij = R_ij / R_ii

so that channels are rounded from the last to the first, each to the code nearest to z_i + sum_{j > i} C_ij e_j. Rows z
are those that are packed: after all transforms. Where M is a multiple of the identity, this is nearest rounding.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

BLOCK = 16
"""Channels that are rounded one after the other, before a matrix product takes their errors to all that follow."""
TOKENS_AT_ONCE = 1024
"""Bounds the memory of a call, whatever its tokens, and keeps it near the processor."""


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
        parts = [
            self._round(*part, levels)
            for part in zip(
                rows.split(TOKENS_AT_ONCE),
                scale.float().split(TOKENS_AT_ONCE, dim=1),
                minimum.float().split(TOKENS_AT_ONCE, dim=1),
                strict=True,
            )
        ]
        codes, chosen = zip(*parts, strict=True)
        return torch.cat(codes), torch.cat(chosen)

    def _round(
        self, rows: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, levels: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
        for begin in reversed(range(0, size, BLOCK)):
            end = min(begin + BLOCK, size)
            for channel in reversed(range(begin, end)):
                aim = aims[:, channel]
                code = ((aim - base) * inverse + 0.5).floor().clamp(0, levels)
                number = code * step + base
                error = exact[:, channel] - number
                cost += self.weights[:, channel, None] * (aim - number).square()
                codes[:, channel], errors[:, channel] = code.to(torch.uint8), error
                before = self.coefficients[:, begin:channel, channel, None]
                aims[:, begin:channel] += before * error[:, None]
            aims[:, :begin] += self.coefficients[:, :begin, begin:end] @ errors[:, begin:end]
        chosen = cost.view(heads, num_ranges, num_tokens).argmin(1)
        index = chosen[:, None, None].expand(heads, size, 1, num_tokens)
        codes = codes.view(heads, size, num_ranges, num_tokens).gather(2, index)[:, :, 0]
        return codes.permute(2, 0, 1), chosen.T


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
