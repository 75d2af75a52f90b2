"""KL divergence of next-token distributions, per token and summarized."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

ROWS, GPU_ROWS = 64, 512
"""Positions compared at once: bounds the float32 temporaries to a few times ROWS x vocabulary."""


@dataclass(frozen=True)
class TokenScores:
    """What one setting did at each of n predicted positions; arrays of shape [n].

    Attributes:
        kl: KL(reference || setting) in nats, float32.
        nll_reference: negative log-likelihood of the true next token under the reference in nats, float32.
        nll: the same under the setting.
        agree: whether both distributions have the same most likely token, bool.
    """

    kl: np.ndarray
    nll_reference: np.ndarray
    nll: np.ndarray
    agree: np.ndarray

    @classmethod
    def join(cls, parts: "list[TokenScores]") -> "TokenScores":
        return cls(**{each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(cls)})

    def part(self, start: int, stop: int) -> "TokenScores":
        """Scores of positions start to stop."""
        return TokenScores(**{each.name: getattr(self, each.name)[start:stop] for each in fields(self)})

    def summary(self) -> dict[str, float]:
        """Mean, standard error of the mean and 99th percentile of the KL (nats per token), top-1 agreement (a share),
        and the perplexities. The standard error takes tokens as independent, which neighbours are not quite."""
        return {
            "kl_mean": float(self.kl.mean(dtype=np.float64)),
            "kl_stderr": float(self.kl.std(dtype=np.float64) / len(self.kl) ** 0.5),
            "kl_p99": float(np.percentile(self.kl, 99)),
            "top1_agreement": float(self.agree.mean()),
            "perplexity": float(np.exp(self.nll.mean(dtype=np.float64))),
            "perplexity_reference": float(np.exp(self.nll_reference.mean(dtype=np.float64))),
        }

    def window_means(self, lengths: Sequence[int]) -> list[float]:
        """Mean KL of each window of so many positions, for paired differences between settings."""
        ends = np.cumsum(lengths)
        return [float(each.mean(dtype=np.float64)) for each in np.split(self.kl, ends[:-1])]


def compare(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Compare two next-token distributions given as logits.

    Args:
        reference: [n, vocabulary] of any float dtype.
        logits: the same of the setting, on the same device.
        targets: [n] int64, the true next tokens.
    """
    count = GPU_ROWS if logits.is_cuda else ROWS
    parts = []
    for start in range(0, len(targets), count):
        rows = slice(start, start + count)
        target = targets[rows, None]
        log_p = reference[rows].float().log_softmax(-1)
        log_q = logits[rows].float().log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        agree = log_p.argmax(-1) == log_q.argmax(-1)
        nll_reference, nll = (-each.gather(-1, target)[:, 0] for each in (log_p, log_q))
        parts.append({"kl": kl, "nll_reference": nll_reference, "nll": nll, "agree": agree})
    # Read back once, since a GPU stands still meanwhile.
    return TokenScores(**{name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]})
