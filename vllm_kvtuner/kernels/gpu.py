"""The GPU kernels of one layer: which of them serve it, and the scratch that they share with other layers."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_kvtuner.kernels import choice
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN, SHORT_PREFILL_TOKENS
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms

if TYPE_CHECKING:
    from vllm_kvtuner.kernels.contract import RecentRows

WARM_UP_TOKENS = 256
"""Decodes of a batch that takes the kernels' variants for many rows."""
WARM_UP_ROWS = 1 << 15
"""(token, KV head) rows of a prefill that takes the store kernel's variant for many rows."""


class LayerKernels:
    """Store, gather and decode of a layer whose pair and transforms may change between calls.

    Args:
        num_heads: query heads.
        num_kv_heads: of the layer.
        head_size: numbers per row.
        scale: factor on the logits.
        sliding_window: tokens a query sees, or None for all.
        logits_soft_cap: 0 for none.
        max_num_seqs: decodes of a batch.
        max_decode_query_len: query tokens of one decode.
        device: a GPU.
        skip_newest: tokens, the newest that a query sees, that decoding leaves out.
        write_lse: decoding gives the log-sum-exp too.
        skip_first: tokens, a request's first, that decoding leaves out.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        sliding_window: int | None,
        logits_soft_cap: float,
        max_num_seqs: int,
        max_decode_query_len: int,
        device: torch.device,
        skip_newest: int = 0,
        write_lse: bool = False,
        skip_first: int = 0,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.scale = scale
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap
        self.max_num_seqs = max_num_seqs
        self.max_decode_query_len = max_decode_query_len
        self.device = device
        self.skip_newest = skip_newest
        self.write_lse = write_lse
        self.skip_first = skip_first
        self._arrivals: torch.Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Choose anew at the next call: the layer's pair or transforms have changed."""
        self._decode: str | None = None
        self._rows: _RowKernels | None = None

    def reserve(self, pair: PrecisionPair, transforms: LayerTransforms, has_offset: bool) -> None:
        """Take the decode kernel's scratch, so that it is counted before the cache is sized.

        Args:
            pair: of the layer.
            transforms: of the layer, without statics that are bound later.
            has_offset: whether a key offset is, which may leave the layer to the portable kernel.
        """
        layout = PageLayout(pair, self.head_size, BLOCK_SIZE_MULTIPLE)
        kernel = self._choose(layout, transforms)
        workspace = self._workspace(kernel)
        self._arrivals = workspace.arrivals if kernel == choice.CUDA else None
        if has_offset:
            self._workspace(choice.TRITON)

    def wake_up(self) -> None:
        """Make the scratch ready again. A sleep of level 2 discards what lies beside the weights, as it does."""
        if self._arrivals is not None:
            self._arrivals.zero_()

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None,
        layout: PageLayout,
        transforms: LayerTransforms,
        recent: "RecentRows | None" = None,
    ) -> None:
        """As :func:`reshape_and_cache_ref`; ``recent``: where a window keeps the tokens too."""
        store = self._row_kernels(layout).reshape_and_cache
        store(key, value, kv_cache, slot_mapping, positions, layout, transforms, recent)

    def gather(self, *arguments: Any, layout: PageLayout, transforms: LayerTransforms, num_tokens: int) -> None:
        """As :func:`gather_cache_ref`, ``arguments`` those before the layout."""
        self._row_kernels(layout).gather_cache(*arguments, layout, transforms, num_tokens=num_tokens)

    def attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        max_query_len: int,
        layout: PageLayout,
        transforms: LayerTransforms,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """As :func:`paged_attention_ref`, with the layer's scale, windows and cap; ``lse``,
        contiguous, if the layer has one."""
        assert (lse is not None) == self.write_lse
        if self._decode is None:
            self._decode = self._choose(layout, transforms)
        kernel, options = _decode_module(self._decode)
        kernel.paged_attention(
            query,
            kv_cache,
            block_table,
            seq_lens,
            query_start_loc,
            max_query_len,
            self.scale,
            layout,
            transforms,
            output,
            self.sliding_window,
            self.logits_soft_cap,
            self.skip_newest,
            lse,
            self.skip_first,
            workspace=self._workspace(self._decode),
            # Short prefills are few among decodes.
            pass_query_len=min(max_query_len, self.max_decode_query_len),
            **options,
        )

    def warm_up(
        self,
        kv_cache: torch.Tensor,
        layout: PageLayout,
        transforms: LayerTransforms,
        workspace: tuple[torch.Tensor, torch.Tensor],
        recent_cache: torch.Tensor | None = None,
    ) -> None:
        """Compile the kernels at the row counts that they tell apart, without storing anything.

        Args:
            kv_cache: pages of the layout.
            layout: of the layer.
            transforms: of the layer.
            workspace: [tokens, num_kv_heads, head_size] of the model's dtype, twice, to gather into.
            recent_cache: of a recent window that keeps new tokens as they are, if the layer has one.
        """
        heads, kv_heads, size, dtype = self.num_heads, self.num_kv_heads, self.head_size, workspace[0].dtype

        def integers(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=self.device)

        reqs, longest = min(self.max_num_seqs, WARM_UP_TOKENS), self.max_decode_query_len
        for count, query_len in {(1, 1), (reqs, 1), (1, longest), (reqs, longest), (1, MAX_DECODE_QUERY_LEN)}:
            tokens = count * query_len
            qkv = torch.zeros(tokens, (heads + 2 * kv_heads) * size, dtype=dtype, device=self.device)
            query, key, value = (
                part.unflatten(1, (-1, size))
                for part in qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=1)
            )
            slots, positions = (integers(tokens, fill=fill, dtype=torch.int64) for fill in (-1, 0))
            self.store(key, value, kv_cache, slots, positions, layout, transforms, _rows_of(recent_cache, slots))
            starts = torch.arange(0, tokens + 1, query_len, device=self.device).int()
            self.attend(
                query, kv_cache, integers(count, 16), integers(count, fill=query_len), starts, query_len, layout,
                transforms, torch.empty_like(query, memory_format=torch.contiguous_format),
                torch.empty(heads, tokens, dtype=torch.float32, device=self.device) if self.write_lse else None,
            )  # fmt: skip
        rows = torch.zeros(WARM_UP_ROWS // kv_heads, kv_heads, size, dtype=dtype, device=self.device)
        slots, positions = (integers(rows.shape[0], fill=fill, dtype=torch.int64) for fill in (-1, 0))
        self.store(rows, rows, kv_cache, slots, positions, layout, transforms, _rows_of(recent_cache, slots))
        ends = torch.tensor([0, 1], device=self.device).int()
        self.gather(
            kv_cache, integers(1, 16), ends, integers(1), *workspace, layout=layout, transforms=transforms, num_tokens=1
        )

    def _choose(self, layout: PageLayout, transforms: LayerTransforms) -> str:
        return choice.decode_kernel(layout, transforms, self.logits_soft_cap, self.device, self.write_lse)

    def _row_kernels(self, layout: PageLayout) -> "_RowKernels":
        if self._rows is None:
            self._rows = _row_kernels(choice.row_kernels(layout, self.device))
        return self._rows

    def _workspace(self, kernel: str) -> Any:
        """Scratch of the kernel's paged_attention."""
        if kernel == choice.CUDA:
            shape = (self.num_heads, self.num_kv_heads, self.head_size)
            return _cuda_workspace(self.max_num_seqs, self.max_decode_query_len, *shape, self.device)
        tokens = self.max_num_seqs * self.max_decode_query_len + SHORT_PREFILL_TOKENS
        return _triton_workspace(tokens, self.num_heads, self.head_size, self.device)


def _rows_of(recent_cache: torch.Tensor | None, slots: torch.Tensor) -> "RecentRows | None":
    from vllm_kvtuner.kernels.contract import RecentRows

    return None if recent_cache is None else RecentRows(recent_cache, slots)


class _RowKernels(NamedTuple):
    """Store and gather, with the contracts of the reference's."""

    reshape_and_cache: Callable[..., None]
    gather_cache: Callable[..., None]


@functools.cache
def _row_kernels(kernels: str) -> _RowKernels:
    if kernels == choice.CUDA:
        from vllm_kvtuner.kernels.cuda import gather_cache as cuda_gather
        from vllm_kvtuner.kernels.cuda import reshape_and_cache as cuda_store

        return _RowKernels(cuda_store.reshape_and_cache, cuda_gather.gather_cache)
    from vllm_kvtuner.kernels.triton import gather_cache, reshape_and_cache

    return _RowKernels(reshape_and_cache.reshape_and_cache, gather_cache.gather_cache)


@functools.cache
def _decode_module(kernel: str) -> tuple[Any, dict[str, Any]]:
    """Where a kernel's paged_attention is, and options of its own."""
    if kernel == choice.CUDA:
        from vllm_kvtuner.kernels.cuda import paged_attention as cuda

        # No kernel of the model writes what says where the tokens are.
        return cuda, {"dependent": True}
    from vllm_kvtuner.kernels.triton import paged_attention

    return paged_attention, {}


# Scratch that all layers of one shape share: layers run one after the other.


@functools.cache
def _cuda_workspace(*arguments: Any) -> Any:
    from vllm_kvtuner.kernels.cuda.paged_attention import decode_workspace

    return decode_workspace(*arguments)


@functools.cache
def _triton_workspace(*arguments: Any) -> Any:
    from vllm_kvtuner.kernels.triton.paged_attention import decode_workspace

    return decode_workspace(*arguments)
