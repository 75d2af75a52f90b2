"""Speculation with a fixed acceptance: how many tokens are drafted in a step, and how many of them vLLM keeps.

vLLM's synthetic acceptance keeps a drafted token or not by lot, whatever the model says, so that a model with dummy
weights verifies drafts as a real one does. Tokens are looked up in the request itself (``ngram_gpu``): that needs no
second model, and model runner V2 fills up what it does not find, so that every step verifies as many tokens as asked.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN

MAX_DRAFTED = MAX_DECODE_QUERY_LEN - 1
"""Drafted tokens that the kvtuner cache verifies at once."""
DEVIATIONS = 5
"""Standard deviations of a mean within which what was accepted must lie."""
_FORM = re.compile(r"(\d{1,3}):([01]|[01]?\.\d{1,4})")


@dataclass(frozen=True)
class Speculation:
    """``drafted`` tokens of a request in each step, written DRAFTED:ACCEPTANCE.

    Attributes:
        drafted: tokens, 1 to MAX_DRAFTED.
        acceptance: probability that a drafted token is accepted if all before it are.
    """

    drafted: int
    acceptance: float

    def __str__(self) -> str:
        return f"{self.drafted}:{self.acceptance:g}"

    @classmethod
    def parse(cls, text: str) -> "Speculation":
        """Read ``3:0.7``.

        Raises:
            ValueError: another form, or numbers out of range.
        """
        match = _FORM.fullmatch(text.strip())
        drafted, acceptance = (int(match[1]), float(match[2])) if match else (0, 0.0)
        if not (1 <= drafted <= MAX_DRAFTED and acceptance <= 1):
            rule = f"speculation is written DRAFTED:ACCEPTANCE, such as 3:0.7, of 1 to {MAX_DRAFTED} tokens and 0 to 1"
            raise ValueError(f"{rule}, but got {text!r}")
        return cls(drafted, acceptance)

    @property
    def query_tokens(self) -> int:
        """Tokens of a request that a step computes: its newest and the drafted ones."""
        return 1 + self.drafted

    @property
    def rates(self) -> list[float]:
        """For each drafted token, the probability that it and all before it are accepted."""
        return [self.acceptance**count for count in range(1, self.drafted + 1)]

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a request is to get in a step: the accepted ones and one that the model adds."""
        return 1 + sum(self.rates)

    @property
    def config(self) -> dict[str, Any]:
        """vLLM's ``speculative_config``."""
        return {
            "method": "ngram_gpu",
            "num_speculative_tokens": self.drafted,
            # What is found does not matter, so one token is looked up, which is the quickest.
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 1,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": self.rates,
        }

    def problem(self, tokens_per_step: float, samples: int) -> str | None:
        """Why an engine did not speculate as asked, or None if it did.

        Args:
            tokens_per_step: mean of what a request got in a step.
            samples: requests times steps of that mean.
        """
        # E(x^2) - E(x)^2, where x >= count with probability rates[count - 1].
        accepted = sum(self.rates)
        squares = sum((2 * count - 1) * rate for count, rate in enumerate(self.rates, 1))
        tolerance = 0.01 + DEVIATIONS * math.sqrt(max(0.0, squares - accepted**2) / samples)
        if abs(tokens_per_step - self.tokens_per_step) <= tolerance:
            return None
        rule = f"with --speculate {self} a request must get {self.tokens_per_step:.3f} tokens a step"
        return f"{rule} within {tolerance:.3f}, but got {tokens_per_step:.3f}"


def speculated(result: Mapping[str, Any]) -> str:
    """What a title says of a result's speculation: nothing without, and of a file that is older than it."""
    if not result.get("speculate"):
        return ""
    speculation = Speculation.parse(result["speculate"])
    return f", {speculation.drafted} drafted tokens a step, each accepted with probability {speculation.acceptance:g}"
