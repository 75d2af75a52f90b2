"""What of a batch the attention implementation reads: its decodes, and the plan of its prefills."""

import functools
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionMetadata

from vllm_kvtuner.attention.prefill_plan import PrefillPlan


@dataclass
class KVTunerMetadata(AttentionMetadata):
    """One batch, decodes first.

    Args:
        num_actual_tokens: tokens of the batch, padding of a CUDA graph included.
        num_decodes: requests that the decode kernel serves, the first of the batch; short prefills among them.
        num_decode_tokens: their query tokens.
        max_decode_query_len: query tokens that one of them has at most.
        query_start_loc: [num_reqs + 1] int32.
        seq_lens: [num_reqs] int32, tokens in the cache after this step.
        block_table: [num_reqs, max_blocks] int32.
        positions: [num_tokens] int64 positions of the batch's tokens.
        prefill: how the other requests are served, or None if there are none.
    """

    num_actual_tokens: int
    num_decodes: int
    num_decode_tokens: int
    max_decode_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    positions: torch.Tensor | None
    prefill: PrefillPlan | None

    @functools.cached_property
    def decodes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """block_table, seq_lens and query_start_loc of the decodes. Taken once for all layers, since each view that is
        taken while a step is launched gives other threads the interpreter's lock."""
        reqs = self.num_decodes
        return self.block_table[:reqs], self.seq_lens[:reqs], self.query_start_loc[: reqs + 1]
