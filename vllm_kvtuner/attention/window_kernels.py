"""The recent window of one attention layer: who stores it, who reads it, and who attends to it.

In 16 bits its rows are stored by the kernel that stores the packed pages, in the same launch, or before it where tokens
are packed at a step's end (step_packing.py); in 8 bits by the kernels for K8V8 pages. Attention over the window is
merged with that over the packed pages, which leaves out what it holds.
"""

from abc import ABC, abstractmethod

import torch

from vllm_kvtuner.attention.metadata import KVTunerMetadata
from vllm_kvtuner.attention.prefill_plan import CacheSlice
from vllm_kvtuner.attention.segments import merge_segments
from vllm_kvtuner.attention.window_cache import RecentCache
from vllm_kvtuner.kernels.contract import CachedTokens, KernelSet, Queries, Segment, WindowRows
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.kernels.reference.rows import gather_rows_ref
from vllm_kvtuner.pages.transforms import LayerTransforms


class LayerWindow(ABC):
    """Store, gather and decode of a recent window.

    Args:
        cache: that holds it.
        kernels: of the layer, whose span leaves out what the window holds.
        packed: of K8V8 pages under the window as a sliding one, for a window of 8 bits.
    """

    def __init__(self, cache: RecentCache, kernels: KernelSet, packed: KernelSet) -> None:
        self.cache = cache
        self.kernels = kernels
        self.packed = packed

    def rows(self) -> WindowRows | None:
        """Where the store of the packed pages keeps the batch's new tokens too; None for a window of 8 bits, and in a
        warm-up, in which no token has a slot."""
        if self.cache.is_packed or (metadata := self.cache.metadata) is None:
            return None
        return WindowRows(self.cache.kv_cache, metadata.slot_mapping)

    def store(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor | None, transforms: LayerTransforms
    ) -> None:
        """Store the new tokens of the batch in flight in a window of 8 bits; arguments as the contract has them."""
        if self.cache.is_packed and (metadata := self.cache.metadata) is not None:
            self.packed.store(key, value, metadata.slot_mapping, positions, self.cache.pages(transforms))

    def read(
        self, part: CacheSlice, key_out: torch.Tensor, value_out: torch.Tensor, transforms: LayerTransforms
    ) -> None:
        """Gather a slice of the batch's tokens, as the contract has it."""
        metadata = self.cache.metadata
        assert metadata is not None
        self.read_tokens(part.of(metadata.block_table), key_out, value_out, transforms)

    def read_tokens(
        self, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor, transforms: LayerTransforms
    ) -> None:
        """Gather, with the window's own block table."""
        if self.cache.is_packed:
            self.packed.gather(self.cache.pages(transforms), tokens, key_out, value_out)
        else:
            gather_rows_ref(self.cache.kv_cache, tokens, key_out, value_out)

    @abstractmethod
    def room_for_older(self, output: torch.Tensor) -> Segment:
        """Where attention of the batch's decodes over the packed pages goes, for :meth:`merge`; may be ``output``'s."""

    @abstractmethod
    def merge(
        self,
        query: torch.Tensor,
        metadata: KVTunerMetadata,
        transforms: LayerTransforms,
        older: Segment,
        output: torch.Tensor,
    ) -> None:
        """Merge attention of the batch's decodes over the window with that over the packed pages.

        Args:
            query: [num_decode_tokens, num_heads, head_size].
            metadata: of the batch, that of the packed pages.
            transforms: of the layer.
            older: in :meth:`room_for_older`, attention over what the window does not hold; may be overwritten.
            output: as query.
        """

    @abstractmethod
    def warm_up(self, transforms: LayerTransforms, workspace: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Compile what the first requests would wait for; arguments as KernelSet's."""

    def queries(self, metadata: KVTunerMetadata) -> Queries:
        """The batch's decodes, with the window's block table."""
        window = self.cache.metadata
        assert window is not None
        return metadata.decodes._replace(block_table=window.block_table[: metadata.num_decodes])


class ReferenceWindow(LayerWindow):
    """On a CPU: merged in fp32."""

    kernels: ReferenceKernels

    def room_for_older(self, output: torch.Tensor) -> Segment:
        """As the interface has it."""
        return Segment.into(torch.empty(output.shape, device=output.device))

    def merge(
        self,
        query: torch.Tensor,
        metadata: KVTunerMetadata,
        transforms: LayerTransforms,
        older: Segment,
        output: torch.Tensor,
    ) -> None:
        """As the interface has it."""
        rows = self.cache.pages(transforms) if self.cache.is_packed else self.cache.kv_cache
        self.kernels.merge_window(query, self.queries(metadata), rows, older.output, older.lse)
        output.copy_(older.output)

    def warm_up(self, transforms: LayerTransforms, workspace: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Nothing is compiled."""


class GpuWindow(LayerWindow):
    """On a GPU: one kernel more beside 16 bits, and a second decode and vLLM's merge beside 8."""

    def room_for_older(self, output: torch.Tensor) -> Segment:
        """As the interface has it."""
        return Segment.into(output)

    def merge(
        self,
        query: torch.Tensor,
        metadata: KVTunerMetadata,
        transforms: LayerTransforms,
        older: Segment,
        output: torch.Tensor,
    ) -> None:
        """As the interface has it."""
        queries = self.queries(metadata)
        if not self.cache.is_packed:
            self.kernels.merge_window(query, queries, self.cache.kv_cache, older.output, older.lse)
            return
        newest = Segment.into(torch.empty_like(output))
        self.packed.attend(query, queries, self.cache.pages(transforms), newest.output, newest.lse)
        merge_segments(Segment(older.output.clone(), older.lse), newest, output)

    def warm_up(self, transforms: LayerTransforms, workspace: tuple[torch.Tensor, torch.Tensor]) -> None:
        """As the interface has it."""
        if self.cache.is_packed:
            self.packed.warm_up(self.cache.pages(transforms), workspace)
        else:
            self.kernels.warm_up_window(self.cache.kv_cache)
