"""Prefill of one layer on a GPU: vLLM's FlashAttention on fresh keys and values, and on cached ones once they are
dequantized into a bounded workspace (prefill_plan.py), merged by log-sum-exp."""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvtuner.attention.metadata import KVTunerMetadata
from vllm_kvtuner.attention.prefill_plan import CacheSlice, PrefillPlan
from vllm_kvtuner.attention.window_kernels import RecentKernels
from vllm_kvtuner.kernels.layer import LayerKernels
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms


@dataclass(frozen=True)
class Flash:
    """vLLM's flash_attn_varlen_func for one layer.

    Args:
        scale: factor on the logits.
        logits_soft_cap: 0 for none.
        version: of FlashAttention, None where there is no choice.
    """

    scale: float
    logits_soft_cap: float
    version: int | None

    def __call__(self, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [num_tokens, num_heads, head_size] and log-sum-exp [num_heads, num_tokens]."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        if self.version is not None:
            arguments["fa_version"] = self.version
        attended, lse = flash_attn_varlen_func(
            softmax_scale=self.scale, softcap=self.logits_soft_cap, return_softmax_lse=True, **arguments
        )[:2]
        return attended, lse


class GpuPrefill:
    """Attention of the prefills of a batch.

    Args:
        kernels: of the layer.
        flash: of the layer.
        workspace_tokens: dequantized tokens at a time, at most.
        dtype: the model's.
        recent: kernels of the layer's recent window, if it has one.
    """

    def __init__(
        self,
        kernels: LayerKernels,
        flash: Flash,
        workspace_tokens: int,
        dtype: torch.dtype,
        recent: RecentKernels | None = None,
    ) -> None:
        self.kernels = kernels
        self.flash = flash
        self.workspace_tokens = workspace_tokens
        self.dtype = dtype
        self.recent = recent

    def workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of [workspace_tokens, num_kv_heads, head_size], shared by layers of one shape."""
        shape = (self.workspace_tokens, self.kernels.num_kv_heads, self.kernels.head_size)
        return _workspace(shape, self.dtype, self.kernels.device)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        layout: PageLayout,
        transforms: LayerTransforms,
        metadata: KVTunerMetadata,
        plan: PrefillPlan,
        output: torch.Tensor,
    ) -> None:
        """Attention of the prefills' tokens into their rows of output; whole batches, shapes as the layer's forward."""
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        def cached(part: CacheSlice) -> tuple[torch.Tensor, torch.Tensor]:
            """A slice in the workspace, with what is fresh or in the recent window in its place."""
            keys, values = (workspace[: part.num_tokens] for workspace in self.workspace())
            if part.needs_packed:
                last = part.first_request + part.num_reqs
                self.kernels.gather(
                    kv_cache, metadata.block_table[part.first_request : last], part.cu_seq_lens, part.seq_starts,
                    keys, values, layout=layout, transforms=transforms, num_tokens=part.num_tokens,
                )  # fmt: skip
            rows = slice(part.first_token, part.first_token + part.num_query_tokens)
            if part.fresh_rows is not None:
                keys.index_copy_(0, part.fresh_rows, key[rows])
                values.index_copy_(0, part.fresh_rows, value[rows])
            if self.recent is not None:
                self.recent.put(keys, values, part, transforms)
            return keys, values

        sliding_window = self.kernels.sliding_window
        tokens = slice(plan.first_token, plan.first_token + plan.num_tokens)
        merged, lse = output[tokens], None
        if plan.fresh:
            merged, lse = self._attend(
                query[tokens],
                (key[tokens], value[tokens]),
                (plan.cu_query_lens, plan.max_query_len),
                (plan.cu_query_lens, plan.max_query_len),
                causal=True,
                window=sliding_window,
            )
        elif plan.context:
            lse = query.new_empty(query.shape[1], plan.num_tokens, dtype=torch.float32)
        for part, newest in itertools.zip_longest(plan.causal, plan.newest):
            rows = slice(part.first_token, part.first_token + part.num_query_tokens)
            parts = [(part, sliding_window)]
            if newest is not None:
                assert self.recent is not None
                recent = self.recent.recent.window.tokens
                older = [(part, sliding_window and sliding_window - recent)] if part.num_tokens else []
                parts = [*older, (newest, recent)]
            results = [
                self._attend_slice(query[rows], cached(one), one, causal=True, window=window) for one, window in parts
            ]
            if len(results) == 2:
                both, both_lse = (torch.empty_like(x) for x in results[0])
                merge_attn_states(both, *results[0], *results[1], both_lse)
                results = [(both, both_lse)]
            within = slice(rows.start - plan.first_token, rows.stop - plan.first_token)
            merged[within] = results[0][0]
            if lse is not None:
                lse[:, within] = results[0][1]
        for part in plan.context:
            context, context_lse = self._attend_slice(query[tokens], cached(part), part, causal=False)
            both, both_lse = torch.empty_like(context), torch.empty_like(lse)
            merge_attn_states(both, context, context_lse, merged, lse, both_lse)
            merged, lse = both, both_lse
        if merged.data_ptr() != output[tokens].data_ptr():
            output[tokens] = merged

    def _attend_slice(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        part: CacheSlice,
        causal: bool,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        queries, keys = (part.cu_query_lens, part.max_query_len), (part.cu_seq_lens, part.max_len)
        return self._attend(query, cached, queries, keys, causal, window)

    def _attend(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        query_lens: tuple[torch.Tensor, int],
        key_lens: tuple[torch.Tensor, int],
        causal: bool,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over keys and values; lengths are cumulative ones on the device, and the longest."""
        return self.flash(
            q=query,
            k=cached[0],
            v=cached[1],
            cu_seqlens_q=query_lens[0],
            cu_seqlens_k=key_lens[0],
            max_seqlen_q=query_lens[1],
            max_seqlen_k=key_lens[1],
            causal=causal,
            window_size=[-1, -1] if window is None else [window - 1, 0],
        )


@functools.cache
def _workspace(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
