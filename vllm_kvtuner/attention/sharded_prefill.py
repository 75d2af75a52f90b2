"""Prefill of one layer under decode context parallelism (context_parallel.py): a rank's own heads attend to fresh
tokens, and the heads of all ranks to what it stores of the tokens before them."""

from collections.abc import Callable

import torch

from vllm_kvtuner.attention.context_parallel import ContextShards
from vllm_kvtuner.attention.prefill import GpuPrefill, Prefills
from vllm_kvtuner.attention.segments import merge_segments
from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, KernelSet, Segment
from vllm_kvtuner.kernels.reference.attention import attention_ref, unmasked_attention_ref


class ShardedPrefill:
    """Attention of the prefills of a batch on a GPU.

    Args:
        shards: of the engine.
        fresh: attention over contiguous keys and values, of the rank's heads.
        cached: what attends to slices of the cache, with all heads.
    """

    def __init__(self, shards: ContextShards, fresh: Callable[..., Segment], cached: GpuPrefill) -> None:
        self.shards = shards
        self.fresh = fresh
        self.cached = cached

    def workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As :class:`GpuPrefill`."""
        return self.cached.workspace()

    def warm_up(self) -> None:
        """As :class:`GpuPrefill`."""
        self.cached.warm_up()

    def __call__(self, batch: Prefills, output: torch.Tensor) -> None:
        """As :class:`GpuPrefill`."""
        plan, lengths = batch.plan, batch.metadata.context
        assert lengths is not None and plan.fresh and not plan.causal
        tokens = slice(plan.first_token, plan.first_token + plan.num_tokens)
        fresh = self.fresh(
            q=batch.query[tokens],
            k=batch.key[tokens],
            v=batch.value[tokens],
            cu_seqlens_q=plan.cu_query_lens,
            cu_seqlens_k=plan.cu_query_lens,
            max_seqlen_q=plan.max_query_len,
            max_seqlen_k=plan.max_query_len,
            causal=True,
            window_size=[-1, -1],
        )
        if not lengths.any:
            output[tokens] = fresh.output
            return
        of_all = batch._replace(query=self.shards.queries(batch.query))
        part = Segment.into(torch.zeros_like(of_all.query[tokens]))
        part.lse.fill_(-torch.inf)
        for each in plan.context:
            held = self.cached.attend_slice(of_all, each, causal=False, window=None)
            both = Segment.into(torch.empty_like(part.output))
            merge_segments(part, held, both.output, both.lse)
            part = both
        merge_segments(self.shards.combine(part), fresh, output[tokens])


class ShardedReferencePrefill:
    """As :class:`ShardedPrefill`, on a CPU: one request at a time.

    Args:
        shards: of the engine.
        shape: of the rank's heads.
        kernels: of the layer, with all heads.
    """

    def __init__(self, shards: ContextShards, shape: AttentionShape, kernels: KernelSet) -> None:
        self.shards = shards
        self.shape = shape
        self.kernels = kernels

    def workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing is shared between calls."""
        return torch.empty(0), torch.empty(0)

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def __call__(self, batch: Prefills, output: torch.Tensor) -> None:
        """As :class:`ShardedPrefill`."""
        metadata = batch.metadata
        assert metadata.context is not None
        starts = metadata.query_start_loc.tolist()
        for index, held in enumerate(metadata.context.of_rank):
            request = metadata.num_decodes + index
            rows = slice(starts[request], starts[request + 1])
            query, key, value = batch.query[rows], batch.key[rows], batch.value[rows]
            fresh = Segment.into(torch.empty(query.shape))
            attention_ref(query, key, value, self.shape, self.kernels.span, fresh.output, fresh.lse)
            if metadata.context.any:
                keys, values = (key.new_empty(held, *key.shape[1:]) for _ in range(2))
                if held:
                    ends, first = torch.tensor([0, held], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
                    blocks = batch.block_table[request : request + 1]
                    self.kernels.gather(batch.pages, CachedTokens(blocks, ends, first, held), keys, values)
                of_all = self.shards.queries(query)
                part = Segment.into(torch.empty(of_all.shape))
                unmasked_attention_ref(of_all, keys, values, self.kernels.shape, part.output, part.lse)
                merge_segments(self.shards.combine(part), fresh, output[rows])
            else:
                output[rows] = fresh.output.to(output.dtype)
