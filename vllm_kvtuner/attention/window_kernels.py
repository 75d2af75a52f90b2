"""The recent window of one attention layer on a GPU: who stores it, and who attends to it.

In 16 bits its rows are stored by the kernel that stores the packed pages, in the same launch, and decoded by
recent_attention; in 8 bits both is done by the kernels for K8V8 pages, without sink tokens.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import get_forward_context

from vllm_kvtuner.attention.metadata import KVTunerMetadata
from vllm_kvtuner.attention.prefill_plan import CacheSlice
from vllm_kvtuner.attention.window_cache import RecentCache, recent_metadata
from vllm_kvtuner.kernels.choice import device_capability
from vllm_kvtuner.kernels.layer import LayerKernels
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.kernels.reference.rows import gather_rows_ref
from vllm_kvtuner.pages.transforms import LayerTransforms

if TYPE_CHECKING:
    from vllm_kvtuner.kernels.contract import RecentRows


OVERLAP_CAPABILITY = (9, 0)
"""Compute capability from which a kernel can begin while the one before it ends."""


class RecentKernels:
    """Store, gather and decode of a recent window.

    Args:
        recent: the window.
        kernels: of K8V8 pages under the window as a sliding one, for a window of 8 bits.
        sliding_window: the layer's own, or None.
    """

    def __init__(self, recent: RecentCache, kernels: LayerKernels, sliding_window: int | None) -> None:
        self.recent = recent
        self.kernels = kernels
        self.sliding_window = sliding_window
        self.packed = recent.window.pair.is_quantized
        # Decoding begins after the layer's stores, and so all that it does not write itself is there when it begins.
        capability = device_capability(kernels.device)
        self._is_dependent = capability is not None and capability >= OVERLAP_CAPABILITY

    def rows(self) -> "RecentRows | None":
        """Where the store of the packed pages keeps the batch's new tokens too; None for a window of 8 bits."""
        if self.packed or get_forward_context().attn_metadata is None:  # warm-up, in which no token has a slot
            return None
        from vllm_kvtuner.kernels.contract import RecentRows

        return RecentRows(self.recent.kv_cache, recent_metadata(self.recent.layer_name).slot_mapping)

    def store(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor | None, transforms: LayerTransforms
    ) -> None:
        """Store the new tokens of the batch in flight in a window of 8 bits; arguments as the reference has them."""
        if not self.packed or get_forward_context().attn_metadata is None:
            return
        slots = recent_metadata(self.recent.layer_name).slot_mapping
        self.kernels.store(key, value, self.recent.kv_cache, slots, positions, self.recent.layout, transforms)

    def merge(
        self,
        query: torch.Tensor,
        metadata: KVTunerMetadata,
        transforms: LayerTransforms,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Attention of the batch's decodes over the window, merged into that over all other tokens, in place.

        Args:
            query: [num_decode_tokens, num_heads, head_size].
            metadata: of the batch, that of the packed pages.
            transforms: of the layer.
            output: as query.
            lse: [num_heads, num_decode_tokens] fp32.
        """
        table = recent_metadata(self.recent.layer_name).block_table[: metadata.num_decodes]
        batch = (table, *metadata.decodes[1:], metadata.max_decode_query_len)
        if not self.packed:
            self._merge(query, *batch, output, lse)
            return
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        older, newest = output.clone(), torch.empty_like(output)
        newest_lse = torch.empty_like(lse)
        self.kernels.attend(query, self.recent.kv_cache, *batch, self.recent.layout, transforms, newest, newest_lse)
        merge_attn_states(output, older, lse, newest, newest_lse)

    def warm_up(self, transforms: LayerTransforms, workspace: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Compile the kernels; arguments as LayerKernels.warm_up has them."""
        kernels = self.kernels
        if self.packed:
            kernels.warm_up(self.recent.kv_cache, self.recent.layout, transforms, workspace)
            return
        heads, size = kernels.num_heads, kernels.head_size
        for query_len in {1, kernels.max_decode_query_len, MAX_DECODE_QUERY_LEN}:
            integers = {"dtype": torch.int32, "device": kernels.device}
            rows = (heads + 2 * kernels.num_kv_heads) * size
            query = torch.zeros(query_len, rows, dtype=workspace[0].dtype, device=kernels.device)
            query = query[:, : heads * size].unflatten(1, (heads, size))
            output = torch.zeros(query.shape, dtype=query.dtype, device=kernels.device)
            lens, starts = torch.full((1,), query_len, **integers), torch.tensor([0, query_len], **integers)
            lse = torch.zeros(heads, query_len, dtype=torch.float32, device=kernels.device)
            self._merge(query, torch.zeros(1, 16, **integers), lens, starts, query_len, output, lse)

    def _merge(
        self,
        query: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        max_query_len: int,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        from vllm_kvtuner.kernels.triton.window_attention import recent_attention

        window = self.recent.window
        recent_attention(
            query, self.recent.kv_cache, block_table, seq_lens, query_start_loc, max_query_len, self.kernels.scale,
            window.tokens, window.sink_tokens, output, lse, self.sliding_window, self.kernels.logits_soft_cap,
            dependent=self._is_dependent,
            # Short prefills are few among decodes.
            pass_query_len=min(max_query_len, self.kernels.max_decode_query_len),
        )  # fmt: skip

    def put(self, keys: torch.Tensor, values: torch.Tensor, part: CacheSlice, transforms: LayerTransforms) -> None:
        """Put what the window holds of a slice where it belongs in the slice's keys and values."""
        for held, places in ((part.recent, part.recent_rows), (part.sink_tokens, part.sink_rows)):
            if held is not None and held.num_tokens:
                assert places is not None
                self._put(keys, values, held, places, transforms)

    def _put(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        held: CacheSlice,
        places: torch.Tensor,
        transforms: LayerTransforms,
    ) -> None:
        table = recent_metadata(self.recent.layer_name).block_table
        rows = [x.new_empty(held.num_tokens, *x.shape[1:]) for x in (keys, values)]
        arguments: tuple[Any, ...] = (
            self.recent.kv_cache,
            table[held.first_request : held.first_request + held.num_reqs],
            held.cu_seq_lens,
            held.seq_starts,
            *rows,
        )
        if self.packed:
            self.kernels.gather(
                *arguments, layout=self.recent.layout, transforms=transforms, num_tokens=held.num_tokens
            )
        else:
            gather_rows_ref(*arguments, num_tokens=held.num_tokens)
        for target, source in zip((keys, values), rows, strict=True):
            target.index_copy_(0, places, source)
