"""Kernels that write the cache and read it back as a whole: store of new tokens, gather of a cached prefix."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvtuner_tools.bench.kernel_inputs import Batch, NewTokens, random_pages
from kvtuner_tools.bench.kernels.packed import CacheFormat, cuda_skip_reason, packed_format, packed_stores
from kvtuner_tools.bench.kernels.vllm import FP8, flash_stores, vllm_skip_reason
from kvtuner_tools.bench.points import AttentionShape
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms

STORE_COPIES = 8
"""Sets of slots that a graph's calls store to."""


ROW_KERNELS = {"triton": "vllm_kvtuner.kernels", "cuda": "vllm_kvtuner.kernels.cuda"}
"""Packages whose modules reshape_and_cache and gather_cache move rows, by implementation."""


def row_kernels_skip_reason(name: str) -> str | None:
    """Why one of ``ROW_KERNELS`` cannot run here, or None."""
    return cuda_skip_reason() if name == "cuda" else None


@dataclass(frozen=True)
class StoredTokens(NewTokens):
    """Tokens to store in random blocks.

    Args:
        shape: heads of the layer.
        block_size: tokens per block.
        num_blocks: blocks of the cache.
    """

    shape: AttentionShape
    block_size: int
    num_blocks: int

    @property
    def num_tokens(self) -> int:
        return self.key.shape[0]

    def moved_bytes(self, cache_format: CacheFormat) -> int:
        """Bytes a store reads and writes."""
        shape = self.shape
        return self.num_tokens * shape.num_kv_heads * (4 * shape.head_size + cache_format.content_bytes)


def new_tokens(
    shape: AttentionShape, block_size: int, num_tokens: int, decode: bool, device: torch.device
) -> StoredTokens:
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
    return StoredTokens(key, value, positions, tuple(slots), shape, block_size, int(blocks.max()) + 1)


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
        self, tokens: StoredTokens, cache_format: CacheFormat, transforms: LayerTransforms
    ) -> Sequence[Callable[[], None]]:
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
        self, tokens: StoredTokens, cache_format: CacheFormat, transforms: LayerTransforms
    ) -> Sequence[Callable[[], None]]:
        assert cache_format.pair is not None
        layout = PageLayout(cache_format.pair, tokens.shape.head_size, tokens.block_size)
        pages = (tokens.num_blocks, tokens.shape.num_kv_heads, tokens.block_size, layout.content_bytes)
        kv_cache = torch.zeros(pages, dtype=torch.uint8, device=tokens.key.device)
        return packed_stores(ROW_KERNELS[self.name], tokens, kv_cache, layout, transforms)


class ReshapeAndCacheFlash(StoreKernel):
    """vLLM's ``reshape_and_cache_flash``."""

    def __init__(self, kv_cache_dtype: str) -> None:
        self.kv_cache_dtype = kv_cache_dtype

    def skip_reason(self) -> str | None:
        return vllm_skip_reason()

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        size = FP8.itemsize if self.kv_cache_dtype == "fp8" else torch.bfloat16.itemsize
        return [CacheFormat("fp8" if size == 1 else "bf16", 8.0 * size, 2 * head_size * size)]

    def build(
        self, tokens: StoredTokens, cache_format: CacheFormat, transforms: LayerTransforms
    ) -> Sequence[Callable[[], None]]:
        shape = tokens.shape
        pages = (tokens.num_blocks, tokens.block_size, shape.num_kv_heads, 2 * shape.head_size)
        dtype = FP8 if self.kv_cache_dtype == "fp8" else torch.bfloat16
        return flash_stores(tokens, torch.zeros(pages, dtype=dtype, device=tokens.key.device))


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
