"""The reference as a KernelSet: what serves layers on a CPU."""

import torch

from vllm_kvtuner.kernels.contract import AttentionShape, LatePacking, Pages, Queries, Span
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import (
    gather_cache_ref,
    pack_rows_ref,
    reshape_and_cache_ref,
    store_rows_ref,
)
from vllm_kvtuner.kernels.reference.window_attention import window_attention_ref
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms


class ReferenceKernels:
    """Store, gather and decode of a layer in torch; nothing is chosen, compiled or reserved.

    Args:
        shape: of the layer's attention.
        span: cached tokens that decoding serves.
    """

    decode_kernel = "reference"
    store = staticmethod(reshape_and_cache_ref)
    gather = staticmethod(gather_cache_ref)

    def __init__(self, shape: AttentionShape, span: Span) -> None:
        self.shape = shape
        self.span = span

    def forget(self) -> None:
        """Nothing is chosen."""

    def reserve(self, pair: PrecisionPair, transforms: LayerTransforms, names: tuple[str, ...]) -> None:
        """Nothing is shared between calls."""

    def wake_up(self) -> None:
        """Nothing is kept over a sleep."""

    def late_packing(self, pair: PrecisionPair, transforms: LayerTransforms) -> LatePacking | None:
        """With round feedback, as on a GPU, though nothing is gained on a CPU."""
        return LatePacking(store_rows_ref, pack_rows_ref) if transforms.rounds_with_feedback(pair) else None

    def attend(
        self,
        query: torch.Tensor,
        queries: Queries,
        pages: Pages,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """As the contract's PagedAttention, with the layer's shape and span."""
        paged_attention_ref(query, queries, pages, self.shape, self.span, output, lse)

    def merge_window(
        self,
        query: torch.Tensor,
        queries: Queries,
        rows: torch.Tensor | Pages,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """As the contract's WindowAttention; also of a window that packs its tokens."""
        window_attention_ref(query, queries, rows, self.shape, self.span, output, lse)

    def warm_up(
        self, pages: Pages, workspace: tuple[torch.Tensor, torch.Tensor], window_rows: torch.Tensor | None = None
    ) -> None:
        """Nothing is compiled."""

    def warm_up_window(self, window_rows: torch.Tensor) -> None:
        """Nothing is compiled."""
