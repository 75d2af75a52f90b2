"""What was asked of ``auto``: a budget in stored bits, or by need, and whether to calibrate where nothing is known."""

import re
from dataclasses import dataclass

from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE
from vllm_kvtuner.profile.problems import ProfileError, show
from vllm_kvtuner.profile.profile import ResolvedProfile

DEFAULT_BITS = 4.5
"""Stored bits of ``auto`` alone: four-bit codes with their scales, in heads of 64 and more."""
MOST_BITS = 16.0
CALIBRATE = "calibrate"
MORE = f"with ,{CALIBRATE} behind it or nothing"

_BITS = re.compile(r"[0-9]{1,2}(\.[0-9]{1,4})?")
_NEED = re.compile(r"fit=([0-9]{1,9})x([0-9]{1,6})")


@dataclass(frozen=True)
class Need:
    """Requests that must fit at once.

    Args:
        context: tokens of each.
        requests: how many.
    """

    context: int
    requests: int

    def __str__(self) -> str:
        return f"{self.requests:,} requests of {self.context:,} tokens"

    def bytes_of(self, resolved: ResolvedProfile) -> int:
        """Bytes that these requests take over all layers and KV heads, recent windows included."""
        tokens = -(-self.context // BLOCK_SIZE_MULTIPLE) * BLOCK_SIZE_MULTIPLE
        return self.requests * (tokens * resolved.bytes_per_token + resolved.recent_bytes_per_request)


@dataclass(frozen=True)
class AutoRequest:
    """A spec of ``auto``, read.

    Args:
        bits: stored bits at most; what does not matter where ``need`` is given.
        need: what must fit instead.
        calibrate: whether to calibrate where nobody has.
    """

    bits: float = DEFAULT_BITS
    need: Need | None = None
    calibrate: bool = False


def parse_request(spec: str) -> AutoRequest:
    """Read ``auto``, ``auto:3.5``, ``auto:fit=32768x64``, ``auto:calibrate`` or a budget with ``,calibrate``.

    Raises:
        ProfileError: no such budget.
    """
    if ":" not in spec:
        return AutoRequest()
    text = spec.partition(":")[2]
    budget, _, more = text.partition(",")
    calibrate = CALIBRATE in (budget.lower() if not more else None, more.lower() or None)
    if calibrate and not more:
        return AutoRequest(calibrate=True)
    if calibrate or "," not in text:
        if _BITS.fullmatch(budget) and 0 < float(budget) <= MOST_BITS:
            return AutoRequest(bits=float(budget), calibrate=calibrate)
        if (match := _NEED.fullmatch(budget.lower())) and int(match[1]) and int(match[2]):
            return AutoRequest(MOST_BITS, Need(int(match[1]), int(match[2])), calibrate)
    rule = f"a budget must be at most {MOST_BITS:g} stored bits, such as auto:3.5, or a need, such as auto:fit=32768x64"
    raise ProfileError([f"{spec}: {rule} (tokens of a request x requests), {MORE}, but got {show(text)}"])


@dataclass(frozen=True)
class Budget:
    """What a profile must be within.

    Args:
        request: what was asked for.
        memory: bytes of all layers' keys and values; None where bits were asked for.
    """

    request: AutoRequest
    memory: int | None = None

    def __str__(self) -> str:
        if self.request.need is None:
            return f"at most {self.request.bits:g} stored bits"
        return f"{self.request.need} in {self.memory or 0:,} bytes"

    @property
    def arguments(self) -> str:
        """Those of ``kvtuner calibrate`` that give it."""
        need = self.request.need
        if need is None:
            return f"--max-bits {self.request.bits:g}"
        memory, rest = divmod(self.memory or 0, 1 << 30)
        size = self.memory if rest else f"{memory}GiB"
        return f"--memory {size} --context {need.context} --concurrency {need.requests}"

    def exceeded_by(self, resolved: ResolvedProfile) -> str | None:
        """Why a profile is not within the budget; None where it is."""
        need = self.request.need
        if need is not None:
            assert self.memory is not None
            takes = need.bytes_of(resolved)
            return f"takes {takes:,} bytes of {self.memory:,}" if takes > self.memory else None
        if resolved.stored_bits > self.request.bits:
            return f"takes {resolved.stored_bits:g} stored bits of {self.request.bits:g}"
        return None

    def fits_in(self, resolved: ResolvedProfile) -> str:
        """What would fit of a profile that a need is too much for."""
        need = self.request.need
        assert need is not None and self.memory is not None
        one = Need(need.context, 1).bytes_of(resolved)
        each = self.memory // need.requests - resolved.recent_bytes_per_request
        tokens = max(0, each // (resolved.bytes_per_token * BLOCK_SIZE_MULTIPLE) * BLOCK_SIZE_MULTIPLE)
        return f"{self.memory // one:,} requests of {need.context:,} tokens, or {need.requests:,} of {tokens:,}"
