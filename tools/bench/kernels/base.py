"""What every implementation of a kernel answers, so that all are measured alike."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvtuner_tools.bench.kernel_inputs import Batch, StoredTokens
from kvtuner_tools.bench.points import LayerHeads
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms

Calls = Sequence[Callable[[], None]]
"""Launches of equal work on different data, one per copy of it; each may be captured in a CUDA graph."""


class Unsupported(Exception):
    """A kernel does not serve a case, by its own account."""


@dataclass(frozen=True)
class CacheFormat:
    """How a kernel stores one token of one KV head.

    Args:
        name: a precision pair, or the name of vLLM's format.
        nominal_bits: bits per cached number, scales not counted.
        content_bytes: bytes of its key and value, scales included.
        pair: the precision pair of a packed page.
    """

    name: str
    nominal_bits: float
    content_bytes: int
    pair: PrecisionPair | None = None

    def stored_bits(self, head_size: int) -> float:
        return 8 * self.content_bytes / (2 * head_size)


@dataclass(frozen=True)
class Launches:
    """A decode kernel set up on a batch.

    Args:
        calls: one per copy of the batch; each fills ``output``.
        stores: one per copy, which store the tokens of the queries as the layer does before it attends.
        output: [num_tokens, num_heads, head_size].
        query: what the kernel is given, of that shape.
        rows: keys and values of the first copy, each [total tokens, num_kv_heads, head_size], as the cache holds them.
    """

    calls: Calls
    stores: Calls
    output: torch.Tensor
    query: torch.Tensor
    rows: Callable[[], tuple[torch.Tensor, torch.Tensor]]


class DecodeKernel(ABC):
    """One implementation of decode attention over a paged cache."""

    transformed: ClassVar[bool]
    """Whether it serves transforms; others are measured without, once."""

    @abstractmethod
    def skip_reason(self, heads: LayerHeads, block_size: int) -> str | None:
        """Why it cannot run here, or not on such layers, or None."""

    @abstractmethod
    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        """What it stores; packed kernels take ``pairs``."""

    @abstractmethod
    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        """A random cache for the batch, and the calls on it.

        Raises:
            Unsupported: the kernel does not serve such a batch.
        """


class StoreKernel(ABC):
    """One implementation of storing new tokens."""

    transformed: ClassVar[bool]
    """As of :class:`DecodeKernel`."""

    @abstractmethod
    def skip_reason(self) -> str | None:
        """Why it cannot run here, or None."""

    @abstractmethod
    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        """What it stores; packed kernels take ``pairs``."""

    @abstractmethod
    def build(self, tokens: StoredTokens, cache_format: CacheFormat, transforms: LayerTransforms) -> Calls:
        """One call per slot mapping, to an empty cache."""


class GatherKernel(ABC):
    """One implementation of reading a cached prefix back; only packed pages need it."""

    @abstractmethod
    def skip_reason(self) -> str | None:
        """Why it cannot run here, or None."""

    @abstractmethod
    def build(self, batch: Batch, pair: PrecisionPair, transforms: LayerTransforms) -> Calls:
        """Calls that gather the whole of a batch's one request, from a random cache; one per copy."""
