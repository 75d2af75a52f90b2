"""This project's kernels on packed pages: those of ``kernels.triton`` and those of ``kernels.cuda``.

Both packages have modules ``paged_attention``, ``reshape_and_cache`` and ``gather_cache``. They are imported when a
kernel is set up, so that one package can be measured where the other cannot be imported.
"""

import importlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from kvtuner_tools.bench.kernel_inputs import Batch, NewTokens, StoredTokens, newest_tokens, random_pages
from kvtuner_tools.bench.kernels.base import (
    CacheFormat,
    Calls,
    DecodeKernel,
    GatherKernel,
    Launches,
    StoreKernel,
    Unsupported,
)
from kvtuner_tools.bench.points import LayerHeads
from vllm_kvtuner.kernels.choice import MIN_CAPABILITY
from vllm_kvtuner.kernels.contract import CachedTokens, Launch, Pages, Queries, Span
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair, content_bytes
from vllm_kvtuner.pages.transforms import LayerTransforms

TRITON, CUDA = "vllm_kvtuner.kernels.triton", "vllm_kvtuner.kernels.cuda"


def packed_format(pair: PrecisionPair, head_size: int) -> CacheFormat:
    """The format of a packed page."""
    return CacheFormat(pair.name, float(pair.nominal_bits), content_bytes(pair, head_size), pair)


def cuda_skip_reason() -> str | None:
    """Why this project's CUDA kernels cannot run here, or None."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs an NVIDIA GPU"
    if (capability := torch.cuda.get_device_capability()) < MIN_CAPABILITY:
        least = ".".join(map(str, MIN_CAPABILITY))
        return f"needs compute capability {least}, and the card has {capability[0]}.{capability[1]}"
    return None


def _layout(cache_format: CacheFormat, head_size: int, block_size: int) -> PageLayout:
    assert cache_format.pair is not None
    return PageLayout(cache_format.pair, head_size, block_size)


def _gather_arguments(batch: Batch, block_table: torch.Tensor) -> CachedTokens:
    """All tokens of a batch in one of its copies."""
    ends = torch.cat([batch.seq_lens.new_zeros(1), batch.seq_lens.cumsum(0, dtype=torch.int32)])
    return CachedTokens(block_table, ends, torch.zeros_like(batch.seq_lens), sum(batch.lengths))


def _stores(package: str, tokens: NewTokens, pages: Pages) -> Calls:
    """A call of the package's ``reshape_and_cache`` per slot mapping."""
    reshape_and_cache = importlib.import_module(f"{package}.reshape_and_cache").reshape_and_cache

    def store(slots: torch.Tensor) -> Callable[[], None]:
        return lambda: reshape_and_cache(tokens.key, tokens.value, slots, tokens.positions, pages)

    return tuple(map(store, tokens.slot_mappings))


class PackedKernel(DecodeKernel):
    """``paged_attention`` of one package, with its ``reshape_and_cache`` before it where a layer is measured."""

    transformed = True
    package: ClassVar[str]
    dependent: ClassVar[bool] = False
    """Whether it begins before the kernel before it has ended, as in a model."""

    def skip_reason(self, heads: LayerHeads, block_size: int) -> str | None:
        try:
            self.module()
        except ImportError as error:
            return str(error)
        return None

    def module(self) -> Any:
        return importlib.import_module(f"{self.package}.paged_attention")

    @abstractmethod
    def workspace(self, batch: Batch) -> Any:
        """The scratch that the kernel needs for the batch."""

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        return [packed_format(pair, head_size) for pair in pairs]

    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        pages = random_pages(batch, _layout(cache_format, batch.heads.head_size, batch.block_size), transforms)
        paged_attention = self.module().paged_attention
        # A layer's passes have room for as many query tokens as an engine's requests bring at most.
        most = batch.query_tokens.most
        launch = Launch(self.workspace(batch), pass_query_len=most, dependent=self.dependent)
        shape, span = batch.attention_shape, Span()
        output = torch.empty_like(batch.query)

        def call(block_table: torch.Tensor) -> Callable[[], None]:
            queries = Queries(block_table, batch.seq_lens, batch.query_start_loc, most)
            return lambda: paged_attention(batch.query, queries, pages, shape, span, output, launch=launch)

        def rows() -> tuple[torch.Tensor, torch.Tensor]:
            tokens = _gather_arguments(batch, batch.block_tables[0])
            keys, values = batch.empty_rows(torch.float32)
            gather_cache_ref(pages, tokens, keys, values)
            return keys, values

        stores = _stores(self.package, newest_tokens(batch), pages)
        return Launches(tuple(map(call, batch.block_tables)), stores, output, batch.query, rows)


class TritonKernel(PackedKernel):
    package = TRITON

    def workspace(self, batch: Batch) -> Any:
        tokens, heads = batch.query.shape[0], batch.heads
        return self.module().decode_workspace(tokens, heads.num_heads, heads.head_size, batch.device)


class CudaKernel(PackedKernel):
    package = CUDA
    dependent = True

    def skip_reason(self, heads: LayerHeads, block_size: int) -> str | None:
        return cuda_skip_reason() or super().skip_reason(heads, block_size)

    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        layout = _layout(cache_format, batch.heads.head_size, batch.block_size)
        if reason := self.module().unsupported(layout, transforms, has_sinks=batch.heads.sinks):
            raise Unsupported(reason)
        return super().build(batch, cache_format, transforms)

    def workspace(self, batch: Batch) -> Any:
        heads = batch.heads
        return self.module().decode_workspace(
            batch.num_reqs, batch.query_tokens.most, heads.num_heads, heads.num_kv_heads, heads.head_size, batch.device
        )


class PackedStore(StoreKernel):
    """``reshape_and_cache`` of one package."""

    transformed = True

    def __init__(self, package: str) -> None:
        self.package = package

    def skip_reason(self) -> str | None:
        return cuda_skip_reason() if self.package == CUDA else None

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        return [packed_format(pair, head_size) for pair in pairs]

    def build(self, tokens: StoredTokens, cache_format: CacheFormat, transforms: LayerTransforms) -> Calls:
        layout = _layout(cache_format, tokens.heads.head_size, tokens.block_size)
        cache = (tokens.num_blocks, tokens.heads.num_kv_heads, tokens.block_size, layout.content_bytes)
        kv_cache = torch.zeros(cache, dtype=torch.uint8, device=tokens.key.device)
        return _stores(self.package, tokens, Pages(kv_cache, layout, transforms))


class PackedGather(GatherKernel):
    """``gather_cache`` of one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def skip_reason(self) -> str | None:
        return cuda_skip_reason() if self.package == CUDA else None

    def build(self, batch: Batch, pair: PrecisionPair, transforms: LayerTransforms) -> Calls:
        gather_cache = importlib.import_module(f"{self.package}.gather_cache").gather_cache
        pages = random_pages(batch, PageLayout(pair, batch.heads.head_size, batch.block_size), transforms)
        keys, values = batch.empty_rows(torch.bfloat16)

        def call(block_table: torch.Tensor) -> Callable[[], None]:
            tokens = _gather_arguments(batch, block_table)
            return lambda: gather_cache(pages, tokens, keys, values)

        return tuple(map(call, batch.block_tables))
