"""Segments of attention merged by log-sum-exp inside kernels; logits are to base 2.

A segment is attention over a part of the tokens that rows see: ``top`` that it is measured against, ``total`` of its
unnormalized probabilities, and ``output``. A normalized one has its log-sum-exp as top and total 1. Merged are

    total = sum of weight * total        output = sum of weight * output / divisor(total)

with the weight of each against one reference. A segment may be a logit alone, which adds its weight to the total.
"""

import triton
import triton.language as tl


@triton.jit
def finite_reference(top):
    """What logits are measured against: the greatest, or 0 where a row has seen nothing, lest inf - inf appears."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def segment_weight(top, reference):
    """Factor on total and output of a segment; 0 where it has seen nothing."""
    return tl.exp2(top - reference)


@triton.jit
def divisor(total):
    """What outputs are divided by: the total, or 1 where nothing was seen, so that they stay 0."""
    return tl.where(total > 0, total, 1.0)
