"""Where segments of attention become one, by log-sum-exp.

Decoding over packed pages, a recent window, slices of a cached prefix and fresh tokens are each a segment of what a
query sees. Whatever else counts in a softmax, such as an attention sink, is one more: output 0, log-sum-exp its logit.
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


def merged(first: Segment, second: Segment) -> Segment:
    """Two segments as one."""
    both = Segment.into(torch.empty_like(first.output))
    merge_segments(first, second, both.output, both.lse)
    return both
