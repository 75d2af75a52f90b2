"""How far kernels may be off in a self-test, and by how much the rows are that they have stored."""

import math
from dataclasses import dataclass

import torch

from vllm_kvtuner.pages.codes import RANGE_FACTORS
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import FP16_MAX
from vllm_kvtuner.pages.views import Side

STORE_LIMIT = 1.0
"""Steps of a row's scale; rounding takes half of one, fp16's of scale and minimum and the kernels' the rest."""
FEEDBACK_LIMIT = 0.03
"""Over the reference's weighted error. A number that lies between two codes moves others of its row, which may be
better or worse for it; nearest codes are about self_test_cases.FEEDBACK worse."""
WORST_ROW = 100
"""What the worst row's counts less than that of all: it may have 1 + FEEDBACK_LIMIT WORST_ROW times the reference's."""
GATHER_LIMIT = 1e-2
"""Over the largest number: bf16 rounds what is read by 2^-9 of it, the kernels' arithmetic by less."""
DECODE_LIMIT = 5e-3
"""Over the largest value: weights of 11 bits and queries of 16 move outputs by 1e-3 at most."""
LSE_LIMIT = 3e-2
"""Of log-sum-exps: what queries in 16 bits move logits by, key offsets of several units included."""


@dataclass(frozen=True)
class Errors:
    """Largest errors of one case.

    Args:
        store: in steps of the row's scale, clipping by range search left out; of sides without round feedback.
        gather: over the largest key or value.
        decode: over the largest value, what the output's type rounds left out; 0 where decoding is not tested.
        lse: of log-sum-exps; 0 where there are none.
        stray: numbers that were written where nothing belongs, or differ from what was to be copied, or from what a
            store in one part has written.
        seconds: for all, compiling included.
        feedback: by how much the weighted error of sides with round feedback is above the reference's, over that.
    """

    store: float
    gather: float
    decode: float
    lse: float
    stray: int
    seconds: float
    feedback: float = 0.0

    @property
    def problem(self) -> str | None:
        """Which of them are too large, or None."""
        limits = {"store": STORE_LIMIT, "feedback": FEEDBACK_LIMIT, "gather": GATHER_LIMIT, "decode": DECODE_LIMIT}
        limits |= {"lse": LSE_LIMIT, "stray": 0}
        # Written so that NaN is too large.
        wrong = [name for name, limit in limits.items() if not getattr(self, name) <= limit]
        return ", ".join(f"{name} error {getattr(self, name):.3g} above {limits[name]:.3g}" for name in wrong) or None

    @property
    def passed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class StoredRows:
    """Rows as one side of the pages keeps them.

    Args:
        side: keys or values of the whole cache.
        rows: [num_tokens, num_kv_heads, head_size] fp32.
        meta: [num_tokens, num_kv_heads, 2], scale and minimum of each row.
    """

    side: Side
    rows: torch.Tensor
    meta: torch.Tensor

    def steps(self, wanted: torch.Tensor, range_search: bool) -> float:
        """Largest error in steps, that of clipping left out, unless it is more than range search may clip.

        A range shrunk by f loses (1 - f) / 2 of what it was at either end, and its ``levels`` steps are f of that.
        """
        levels = self.side.format.levels
        scale, minimum = self.meta.float().unsqueeze(-1).unbind(-2)
        rounding = (wanted.clamp(minimum, minimum + levels * scale) - self.rows).abs() / scale
        factor = min(RANGE_FACTORS) if range_search and self.side.format.bits < 8 else 1.0
        beyond = (wanted - self.rows).abs() / scale - (1 - factor) / (2 * factor) * levels
        return torch.maximum(rounding, beyond).max().item()

    def excess(self, wanted: torch.Tensor, feedback: RoundFeedback) -> float:
        """By how much the weighted error is above that of the reference's rounding: of all rows, or of the worst."""
        exact = wanted.clamp(-FP16_MAX, FP16_MAX)
        reference = self.side.format.round_trip(wanted, feedback=feedback)
        ours, theirs = (feedback.weighted_error(exact - rows) for rows in (self.rows, reference))
        total, worst = ours.sum() / theirs.sum() - 1, (ours / theirs).max() - 1
        return torch.maximum(total, worst / WORST_ROW).item()


def nan_last(error: float) -> float:
    """Order of errors, in which NaN is the largest."""
    return math.inf if math.isnan(error) else error


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).abs().max() / want.abs().max()).item()
