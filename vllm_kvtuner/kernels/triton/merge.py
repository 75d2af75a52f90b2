"""Segments of attention merged by log-sum-exp inside kernels; logits are to base 2.

A segment is attention over a part of the tokens that rows see. A merge measures all segments against one reference,
adds their totals and outputs, and divides at the end. A segment may be a logit alone, whose output is 0.
"""

import triton
import triton.language as tl


@triton.jit
def finite_reference(top):
    """What logits are measured against: the greatest, or 0 where a row has seen nothing, lest inf - inf appears."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def weighted_segment(top, total, output, reference, AXIS: tl.constexpr):
    """Total and output of segments, measured against ``reference`` instead of ``top``.

    Args:
        top: [...] fp32, what total and output are measured against; of a normalized output the log-sum-exp.
        total: [...], sum of the unnormalized probabilities; 1 of a normalized output.
        output: as top, with the dimensions of a row at AXIS.
        reference: finite, broadcast to top.
    """
    weight = tl.exp2(top - reference)
    return total * weight, output * tl.expand_dims(weight, AXIS)


@triton.jit
def normalized(output, total, AXIS: tl.constexpr):
    """Outputs, with the dimensions of a row at AXIS, over the totals; 0 where nothing was seen."""
    return output / tl.expand_dims(tl.where(total > 0, total, 1.0), AXIS)
