"""Where segments of attention become one, by log-sum-exp.

Decoding over packed pages, a recent window, slices of a cached prefix and fresh tokens are each a segment of what a
query sees. Attention sinks are one more: output 0, log-sum-exp their logits. They count once for a query: decoding over
packed pages has counted them (the contract's Pages), prefills do when all else is merged.
"""

import torch
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_kvtuner.kernels.contract import Segment
from vllm_kvtuner.kernels.reference.attention import merge_segments_ref


def merge_segments(first: Segment, second: Segment, output: torch.Tensor, lse: torch.Tensor | None = None) -> None:
    """Attention over the tokens of two segments from that over each, in place.

    Args:
        first: a segment; -inf (or +inf, as FlashAttention 2 writes it) in its log-sum-exp is a row that sees nothing.
        second: another.
        output: [num_tokens, num_heads, head_size], not one of the segments' own.
        lse: [num_heads, num_tokens] fp32 of both together, if wanted.
    """
    if output.device.type == "cpu":
        merge_segments_ref(first, second, output, lse)
    else:
        merge_attn_states(output, first.output, first.lse, second.output, second.lse, lse)


def count_sinks(segment: Segment, sinks: torch.Tensor, output: torch.Tensor) -> None:
    """Attention over a segment's tokens and the attention sinks, in place.

    Args:
        segment: all tokens that queries see; its log-sum-exp is finite where a query sees some.
        sinks: [num_heads], a logit of each head, of any float dtype.
        output: [num_tokens, num_heads, head_size], which may be the segment's own.
    """
    # Merged with a segment of output 0: what is left of the other one is its weight. Rows of padding see nothing.
    weight = torch.sigmoid(segment.lse - sinks[:, None])
    torch.mul(segment.output, weight.nan_to_num(0.0).T.unsqueeze(-1), out=output)


def merged(first: Segment, second: Segment) -> Segment:
    """Two segments as one."""
    both = Segment.into(torch.empty_like(first.output))
    merge_segments(first, second, both.output, both.lse)
    return both
