"""Decode context parallelism: the ranks of a group share a KV head, and each stores a part of every request's tokens.

Tokens go to the ranks in turns of ``cp_kv_cache_interleave_size``, as vLLM's slot mapping says: it is -1 on a rank for
tokens of the others. So a rank's pages hold a request's tokens without gaps, and block tables and kernels are what they
are without it; only lengths are those of the rank. Queries see tokens of all ranks: each rank attends with the queries
of all ranks' heads to what it stores, and the parts are merged by log-sum-exp.

Where a token lies in its request is then no longer its place on the rank. What asks for it is refused: a causal mask
within the cache, sliding windows, recent windows, and key offsets (engine/checks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_kvtuner.kernels.contract import AttentionShape, Segment

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ContextLengths(NamedTuple):
    """Tokens that the prefills of a batch have in the cache before their fresh ones.

    Args:
        any: whether one of them has some, on any rank; the same on all ranks, which ask each other only then.
        of_rank: for each prefill, how many of them this rank stores.
    """

    any: bool
    of_rank: list[int]


@dataclass(frozen=True)
class ContextShards:
    """The ranks that share a KV head.

    Args:
        group: of vLLM's, its decode context parallel group.
        interleave: consecutive tokens that a rank stores.
        merge: vLLM's, of parts on a GPU; None on a CPU.
    """

    group: Any
    interleave: int
    merge: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None

    @classmethod
    def of(cls, config: VllmConfig) -> ContextShards:
        """Those of an engine whose groups have been made."""
        parallel = config.parallel_config
        from vllm.distributed import get_dcp_group
        from vllm.platforms import current_platform

        merge = None
        if not current_platform.is_cpu():
            from vllm.v1.attention.ops import dcp

            merge = dcp.dcp_a2a_lse_reduce if parallel.dcp_comm_backend == "a2a" else dcp.cp_lse_ag_out_rs
        return cls(get_dcp_group(), parallel.cp_kv_cache_interleave_size, merge)

    @property
    def size(self) -> int:
        return int(self.group.world_size)

    def lengths(self, lens: torch.Tensor) -> torch.Tensor:
        """Of requests of so many tokens, how many this rank stores, int32."""
        from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens

        return get_dcp_local_seq_lens(lens, self.size, self.group.rank_in_group, self.interleave)

    def whole(self, shape: AttentionShape) -> AttentionShape:
        """The shape of attention with the query heads of all ranks."""
        assert shape.num_kv_heads == 1, "as vLLM takes only groups that store the same KV head"
        return shape._replace(num_heads=shape.num_heads * self.size)

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """Those of all ranks, [num_tokens, ranks * num_heads, head_size]."""
        return self.group.all_gather(query.contiguous(), dim=1)

    def combine(self, part: Segment) -> Segment:
        """Attention of this rank's own heads to the tokens of all ranks.

        Args:
            part: of all ranks' heads to the tokens of this rank; -inf (or +inf, as FlashAttention 2 writes it) in its
                log-sum-exp where there are none.
        """
        if self.merge is not None:
            output, lse = self.merge(part.output, part.lse.transpose(0, 1), self.group, return_lse=True)
            return Segment(output, lse.transpose(0, 1).contiguous())
        lse = torch.where(part.lse.isposinf(), -torch.inf, part.lse)
        of_ranks = self.group.all_gather(lse.contiguous(), dim=0).view(self.size, *lse.shape)
        whole = of_ranks.logsumexp(0)
        weight = torch.exp(lse - whole).nan_to_num(0.0).T.unsqueeze(-1)
        output = self.group.all_reduce((part.output.float() * weight).contiguous())
        heads = lse.shape[0] // self.size
        own = slice(self.group.rank_in_group * heads, (self.group.rank_in_group + 1) * heads)
        return Segment(output[:, own].to(part.output.dtype), whole[own])
