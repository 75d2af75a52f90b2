"""The recent window of one attention layer on a GPU: who stores it, and who attends to it.

In 16 bits its rows are stored and read by vLLM's own kernels for an unquantized cache (reshape_and_cache_flash and
FlashAttention), in 8 bits by this package's for K8V8 pages.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.forward_context import get_forward_context

from vllm_kvtuner import reference
from vllm_kvtuner.backend import KVTunerMetadata
from vllm_kvtuner.layer_kernels import LayerKernels
from vllm_kvtuner.prefill_plan import CacheSlice
from vllm_kvtuner.recent import RecentCache, recent_metadata
from vllm_kvtuner.transforms import LayerTransforms


class RecentKernels:
    """Store, gather and decode of a recent window.

    Args:
        recent: the window.
        kernels: of K8V8 pages under the window as a sliding one, for a window of 8 bits.
        flash: vLLM's flash_attn_varlen_func with the layer's scale, cap and version, which returns log-sum-exps too.
    """

    def __init__(
        self,
        recent: RecentCache,
        kernels: LayerKernels,
        flash: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        self.recent = recent
        self.kernels = kernels
        self.flash = flash
        self.packed = recent.window.pair.is_quantized
        # What vLLM's kernel multiplies rows by that it stores in 8 bits; these are not.
        self._unscaled = torch.ones((), device=kernels.device)

    def store(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor | None, transforms: LayerTransforms
    ) -> None:
        """Store the new tokens of the batch in flight; arguments as the reference has them."""
        if get_forward_context().attn_metadata is None:  # warm-up, in which no token has a slot
            return
        slots = recent_metadata(self.recent.layer_name).slot_mapping
        if self.packed:
            self.kernels.store(key, value, self.recent.kv_cache, slots, positions, self.recent.layout, transforms)
            return
        from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

        reshape_and_cache_flash(key, value, *self._rows(), slots, "auto", self._unscaled, self._unscaled)

    def attend(
        self, query: torch.Tensor, metadata: KVTunerMetadata, transforms: LayerTransforms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the batch's decodes over the window alone.

        Args:
            query: [num_decode_tokens, num_heads, head_size].
            metadata: of the batch, that of the packed pages.
            transforms: of the layer.

        Returns:
            output as query, and log-sum-exp [num_heads, num_decode_tokens] fp32.
        """
        window, reqs = recent_metadata(self.recent.layer_name), metadata.num_decodes
        starts, query_len = metadata.query_start_loc[: reqs + 1], metadata.max_decode_query_len
        if self.packed:
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
            lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
            self.kernels.attend(
                query, self.recent.kv_cache, window.block_table[:reqs], metadata.seq_lens[:reqs], starts, query_len,
                self.recent.layout, transforms, output, lse,
            )  # fmt: skip
            return output, lse
        keys, values = self._rows()
        return self.flash(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=starts,
            max_seqlen_q=query_len,
            seqused_k=window.newest_lens[:reqs],
            max_seqlen_k=window.newest_table.shape[1] * keys.shape[1],
            block_table=window.newest_table[:reqs],
            causal=True,
            window_size=[self.recent.window.tokens - 1, 0],
            # So few tokens that splitting them only costs a merge.
            num_splits=1,
        )

    def put(self, keys: torch.Tensor, values: torch.Tensor, part: CacheSlice, transforms: LayerTransforms) -> None:
        """Put what the window holds of a slice where it belongs in the slice's keys and values."""
        held = part.recent
        if held is None or held.num_tokens == 0:
            return
        assert part.recent_rows is not None
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
            reference.gather_rows_ref(*arguments, num_tokens=held.num_tokens)
        for target, source in zip((keys, values), rows, strict=True):
            target.index_copy_(0, part.recent_rows, source)

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a 16-bit window, [num_blocks, block_size, num_kv_heads, head_size] each."""
        from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

        # A single KV head has any stride, but what copies the pages wants one of 16 bytes at least.
        keys, values = self.recent.kv_cache.transpose(1, 2).chunk(2, dim=-1)
        return canonicalize_singleton_dim_strides(keys), canonicalize_singleton_dim_strides(values)
