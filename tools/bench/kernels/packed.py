"""Decode attention kernels that can be measured: one small class each, by name in ``decode_kernels``."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvtuner_tools.bench.kernel_inputs import Batch, NewTokens, newest_tokens, random_pages
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair, content_bytes
from vllm_kvtuner.pages.transforms import LayerTransforms


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


def packed_format(pair: PrecisionPair, head_size: int) -> CacheFormat:
    """The format of a packed page."""
    return CacheFormat(pair.name, float(pair.nominal_bits), content_bytes(pair, head_size), pair)


@dataclass(frozen=True)
class Launches:
    """A kernel set up on a batch.

    Args:
        calls: one per copy of the batch; each fills ``output`` and may be captured in a CUDA graph.
        stores: one per copy, which store the tokens of the queries as the layer does before it attends.
        output: [num_tokens, num_heads, head_size].
        query: what the kernel is given, of that shape.
        rows: keys and values of the first copy, each [total tokens, num_kv_heads, head_size], as the cache holds them.
    """

    calls: tuple[Callable[[], None], ...]
    stores: tuple[Callable[[], None], ...]
    output: torch.Tensor
    query: torch.Tensor
    rows: Callable[[], tuple[torch.Tensor, torch.Tensor]]


class DecodeKernel(ABC):
    """One implementation of decode attention over a paged cache."""

    transformed: ClassVar[bool]
    """Whether it serves transforms; others are measured without, once."""

    @abstractmethod
    def skip_reason(self, head_size: int) -> str | None:
        """Why it cannot run here, or None."""

    @abstractmethod
    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        """What it stores; packed kernels take ``pairs``."""

    @abstractmethod
    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        """A random cache for the batch, and the calls on it.

        Raises:
            Unsupported: the kernel does not serve such a batch.
        """


def packed_stores(
    package: str, tokens: NewTokens, kv_cache: torch.Tensor, layout: PageLayout, transforms: LayerTransforms
) -> tuple[Callable[[], None], ...]:
    """A call of the package's ``reshape_and_cache`` per slot mapping."""
    reshape_and_cache = importlib.import_module(f"{package}.reshape_and_cache").reshape_and_cache

    def store(slots: torch.Tensor) -> Callable[[], None]:
        return lambda: reshape_and_cache(
            tokens.key, tokens.value, kv_cache, slots, tokens.positions, layout, transforms
        )

    return tuple(map(store, tokens.slot_mappings))


class PackedKernel(DecodeKernel):
    """Kernels on this project's packed pages: ``paged_attention`` and ``reshape_and_cache`` of one package."""

    transformed = True
    package: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}

    @property
    def module(self) -> str:
        return f"{self.package}.paged_attention"

    def skip_reason(self, head_size: int) -> str | None:
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            return str(error)
        return None

    @abstractmethod
    def workspace(self, module: Any, batch: Batch) -> Any:
        """The scratch that the kernel needs for the batch."""

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        return [packed_format(pair, head_size) for pair in pairs]

    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        assert cache_format.pair is not None
        layout = PageLayout(cache_format.pair, batch.shape.head_size, batch.block_size)
        kv_cache = random_pages(layout, batch.num_blocks, batch.shape.num_kv_heads, batch.device, batch.key_scale)
        module = importlib.import_module(self.module)
        workspace = self.workspace(module, batch)
        output = torch.empty_like(batch.query)

        def call(block_table: torch.Tensor) -> Callable[[], None]:
            return lambda: module.paged_attention(
                batch.query, kv_cache, block_table, batch.seq_lens, batch.query_start_loc, batch.query_tokens,
                batch.scale, layout, transforms, output, workspace=workspace, **self.options,
            )  # fmt: skip

        def rows() -> tuple[torch.Tensor, torch.Tensor]:
            total = sum(batch.lengths)
            keys = torch.empty(total, batch.shape.num_kv_heads, batch.shape.head_size, device=batch.device)
            values = torch.empty_like(keys)
            ends = torch.cat([batch.seq_lens.new_zeros(1), batch.seq_lens.cumsum(0, dtype=torch.int32)])
            gather_cache_ref(
                kv_cache, batch.block_tables[0], ends, torch.zeros_like(batch.seq_lens), keys, values, layout,
                transforms, num_tokens=total,
            )  # fmt: skip
            return keys, values

        stores = packed_stores(self.package, newest_tokens(batch), kv_cache, layout, transforms)
        return Launches(tuple(map(call, batch.block_tables)), stores, output, batch.query, rows)


class TritonKernel(PackedKernel):
    package = "vllm_kvtuner.kernels"

    def workspace(self, module: Any, batch: Batch) -> Any:
        tokens, shape = batch.query.shape[0], batch.shape
        return module.decode_workspace(tokens, shape.num_heads, shape.head_size, batch.device)


def cuda_skip_reason() -> str | None:
    """Why this project's CUDA kernels cannot run here, or None."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs an NVIDIA GPU"
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        return f"needs compute capability 8.0, and the card has {capability[0]}.{capability[1]}"
    return None


class CudaKernel(PackedKernel):
    package = "vllm_kvtuner.kernels.cuda"
    options: ClassVar[dict[str, Any]] = {"dependent": True}

    def skip_reason(self, head_size: int) -> str | None:
        return cuda_skip_reason() or super().skip_reason(head_size)

    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        assert cache_format.pair is not None
        layout = PageLayout(cache_format.pair, batch.shape.head_size, batch.block_size)
        if reason := importlib.import_module(self.module).unsupported(layout, transforms):
            raise Unsupported(reason)
        return super().build(batch, cache_format, transforms)

    def workspace(self, module: Any, batch: Batch) -> Any:
        shape = batch.shape
        return module.decode_workspace(
            batch.num_reqs, batch.query_tokens, shape.num_heads, shape.num_kv_heads, shape.head_size, batch.device
        )


def decode_kernels() -> dict[str, DecodeKernel]:
    """Every implementation, by the names of ``points.IMPLEMENTATIONS``."""
    from kvtuner_tools.bench.kernels.vllm import FlashAttention3, Int4PerTokenHead

    return {
        "fa3_bf16": FlashAttention3(fp8=False),
        "fa3_fp8": FlashAttention3(fp8=True),
        "int4_per_token_head": Int4PerTokenHead(),
        "triton": TritonKernel(),
        "cuda": CudaKernel(),
    }
