"""Kernels that write the cache and read it back as a whole: store of new tokens, gather of a cached prefix."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_kvtuner.layout import PageLayout, PrecisionPair
from vllm_kvtuner.transforms import LayerTransforms

from .decode_kernels import CacheFormat, cuda_skip_reason, packed_format
from .kernel_inputs import Batch, random_pages
from .points import AttentionShape
from .vllm_kernels import FP8, vllm_skip_reason

STORE_COPIES = 8
"""Sets of slots that a graph's calls store to."""


ROW_KERNELS = {"triton": "vllm_kvtuner.kernels", "cuda": "vllm_kvtuner.kernels.cuda"}
"""Packages whose modules reshape_and_cache and gather_cache move rows, by implementation."""


def row_kernels_skip_reason(name: str) -> str | None:
    """Why one of ``ROW_KERNELS`` cannot run here, or None."""
    return cuda_skip_reason() if name == "cuda" else None


@dataclass(frozen=True)
class NewTokens:
    """Tokens to store.

    Args:
        key: [num_tokens, num_kv_heads, head_size] bf16.
        value: as key.
        positions: [num_tokens] int64.
        num_blocks: blocks of the cache.
        slot_mappings: per call [num_tokens] int64, random blocks.
    """

    shape: AttentionShape
    block_size: int
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    num_blocks: int
    slot_mappings: tuple[torch.Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return self.key.shape[0]

    def moved_bytes(self, cache_format: CacheFormat) -> int:
        """Bytes a store reads and writes."""
        shape = self.shape
        return self.num_tokens * shape.num_kv_heads * (4 * shape.head_size + cache_format.content_bytes)


def new_tokens(
    shape: AttentionShape, block_size: int, num_tokens: int, decode: bool, device: torch.device
) -> NewTokens:
    """Random tokens: one of each of ``num_tokens`` requests if ``decode``, else consecutive ones of one request."""
    blocks_per_copy = num_tokens if decode else -(-num_tokens // block_size)
    blocks = 1 + torch.randperm(STORE_COPIES * blocks_per_copy, device=device)
    token = torch.arange(num_tokens, device=device)
    slots = []
    for part in blocks.split(blocks_per_copy):
        if decode:
            slots.append(part * block_size + torch.randint(block_size, (num_tokens,), device=device))
        else:
            slots.append(part[token // block_size] * block_size + token % block_size)
    key, value = torch.randn(2, num_tokens, shape.num_kv_heads, shape.head_size, device=device).bfloat16()
    positions = torch.full_like(token, 1000) if decode else token
    return NewTokens(shape, block_size, key, value, positions, int(blocks.max()) + 1, tuple(slots))


class StoreKernel(ABC):
    """One implementation of storing new tokens."""

    transformed = False

    @abstractmethod
    def skip_reason(self) -> str | None:
        """Why it cannot run here, or None."""

    @abstractmethod
    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        """What it stores."""

    @abstractmethod
    def build(
        self, tokens: NewTokens, cache_format: CacheFormat, transforms: LayerTransforms
    ) -> list[Callable[[], None]]:
        """One call per slot mapping."""


class PackedStore(StoreKernel):
    """Kernels to this project's packed pages: ``reshape_and_cache`` of one of ``ROW_KERNELS``."""

    transformed = True

    def __init__(self, name: str) -> None:
        self.name = name

    def skip_reason(self) -> str | None:
        return row_kernels_skip_reason(self.name)

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        return [packed_format(pair, head_size) for pair in pairs]

    def build(
        self, tokens: NewTokens, cache_format: CacheFormat, transforms: LayerTransforms
    ) -> list[Callable[[], None]]:
        assert cache_format.pair is not None
        layout = PageLayout(cache_format.pair, tokens.shape.head_size, tokens.block_size)
        pages = (tokens.num_blocks, tokens.shape.num_kv_heads, tokens.block_size, layout.content_bytes)
        kv_cache = torch.zeros(pages, dtype=torch.uint8, device=tokens.key.device)
        store = importlib.import_module(f"{ROW_KERNELS[self.name]}.reshape_and_cache").reshape_and_cache

        def call(slots: torch.Tensor) -> Callable[[], None]:
            return lambda: store(tokens.key, tokens.value, kv_cache, slots, tokens.positions, layout, transforms)

        return list(map(call, tokens.slot_mappings))


class ReshapeAndCacheFlash(StoreKernel):
    """vLLM's ``reshape_and_cache_flash``, as FlashAttentionImpl.do_kv_cache_update calls it; all scales are 1."""

    def __init__(self, kv_cache_dtype: str) -> None:
        self.kv_cache_dtype = kv_cache_dtype

    def skip_reason(self) -> str | None:
        return vllm_skip_reason()

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        size = FP8.itemsize if self.kv_cache_dtype == "fp8" else torch.bfloat16.itemsize
        return [CacheFormat("fp8" if size == 1 else "bf16", 8.0 * size, 2 * head_size * size)]

    def build(
        self, tokens: NewTokens, cache_format: CacheFormat, transforms: LayerTransforms
    ) -> list[Callable[[], None]]:
        from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

        shape, device = tokens.shape, tokens.key.device
        pages = (tokens.num_blocks, tokens.block_size, shape.num_kv_heads, 2 * shape.head_size)
        dtype = torch.uint8 if self.kv_cache_dtype == "fp8" else torch.bfloat16
        keys, values = torch.zeros(pages, dtype=dtype, device=device).split(shape.head_size, dim=-1)
        scale = torch.ones((), device=device)

        def call(slots: torch.Tensor) -> Callable[[], None]:
            return lambda: reshape_and_cache_flash(
                tokens.key, tokens.value, keys, values, slots, self.kv_cache_dtype, scale, scale
            )

        return list(map(call, tokens.slot_mappings))


STORE_KERNELS: dict[str, StoreKernel] = {
    "reshape_and_cache_flash auto": ReshapeAndCacheFlash("auto"),
    "reshape_and_cache_flash fp8": ReshapeAndCacheFlash("fp8"),
    **{name: PackedStore(name) for name in ROW_KERNELS},
}


def build_gather(name: str, batch: Batch, pair: PrecisionPair, transforms: LayerTransforms) -> list[Callable[[], None]]:
    """Calls of one of ``ROW_KERNELS`` that gather the whole of a batch's one request, a call per copy."""
    gather_cache = importlib.import_module(f"{ROW_KERNELS[name]}.gather_cache").gather_cache
    shape, (length,) = batch.shape, batch.lengths
    layout = PageLayout(pair, shape.head_size, batch.block_size)
    kv_cache = random_pages(layout, batch.num_blocks, shape.num_kv_heads, batch.device)
    keys, values = torch.empty(2, length, shape.num_kv_heads, shape.head_size, device=batch.device).bfloat16()
    ends = torch.tensor([0, length], dtype=torch.int32, device=batch.device)
    starts = torch.zeros(1, dtype=torch.int32, device=batch.device)

    def call(block_table: torch.Tensor) -> Callable[[], None]:
        return lambda: gather_cache(
            kv_cache, block_table, ends, starts, keys, values, layout, transforms, num_tokens=length
        )

    return list(map(call, batch.block_tables))
