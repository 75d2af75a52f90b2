"""What of a batch the attention implementation reads: its decodes, and the plan of its prefills."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionMetadata

from vllm_kvtuner.attention.both_ways import BothWays
from vllm_kvtuner.attention.context_parallel import ContextLengths
from vllm_kvtuner.attention.prefill_plan import PrefillPlan
from vllm_kvtuner.kernels.contract import Queries
from vllm_kvtuner.pages.transforms import LayerTransforms


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
        positions: [num_tokens] int64, places of the batch's tokens in their requests.
        prefill: how the other requests are served, or None if there are none.
        mm_prefix_range: tokens of the prefills that attend in both directions, or None. The name is vLLM's, whose
            Gemma 4 takes it away from layers that are causal all the same.
        context: under context parallelism, what the prefills have in the cache; there ``seq_lens`` counts what the rank
            stores of a request. Else None.
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
    mm_prefix_range: BothWays | None = None
    context: ContextLengths | None = None

    @functools.cached_property
    def decodes(self) -> Queries:
        """Of the decodes. Taken once for all layers, since each view that is taken while a step is launched gives other
        threads the interpreter's lock."""
        reqs = self.num_decodes
        starts = self.query_start_loc[: reqs + 1]
        return Queries(self.block_table[:reqs], self.seq_lens[:reqs], starts, self.max_decode_query_len)


def step_positions(metadata: KVTunerMetadata, transforms: LayerTransforms) -> torch.Tensor | None:
    """Positions of the batch's tokens as a layer's store takes them; None without a key offset."""
    if transforms.key_offset is None:
        return None
    several = transforms.positions
    return metadata.positions if several is None else several.step


def metadata_of(layer_name: str) -> Any:
    """The metadata of the batch in flight for a layer, None in a warm-up, which has no batch.

    Stores are not handed it.
    """
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    return (metadata[0] if isinstance(metadata, list) else metadata)[layer_name]
