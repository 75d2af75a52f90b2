"""FlashAttention as vLLM calls it, in torch."""

import itertools
from collections.abc import Callable, Sequence

import torch

from vllm_kvtuner.kernels.contract import Segment


def flash_attention(scale: float, soft_cap: float = 0.0) -> Callable[..., Segment]:
    """vLLM's flash_attn_varlen_func of one layer, by its docstring.

    A row that sees nothing has the log-sum-exp +inf, as FlashAttention 2 gives it, and values that are NaN stay NaN
    under a probability of 0.
    """

    def attend(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        window_size: Sequence[int],
    ) -> Segment:
        output, lse = torch.zeros_like(q), torch.full((q.shape[1], q.shape[0]), torch.inf)
        bounds = cu_seqlens_q.tolist()
        for request, (begin, end) in enumerate(itertools.pairwise(bounds)):
            span = slice(*cu_seqlens_k[request : request + 2].tolist())
            keys, values = k[span], v[span]
            assert end - begin <= max_seqlen_q and len(keys) <= max_seqlen_k
            position = torch.arange(end - begin)[:, None] + len(keys) - (end - begin)
            seen = torch.ones(end - begin, len(keys), dtype=torch.bool)
            if causal:
                seen &= torch.arange(len(keys)) <= position
            if window_size[0] >= 0:
                seen &= torch.arange(len(keys)) >= position - window_size[0]
            group = q.shape[1] // k.shape[-2]
            scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys.float().repeat_interleave(group, 1))
            scores *= scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            scores = torch.where(seen, scores, -torch.inf)
            sums = scores.logsumexp(-1)
            weights = torch.where(sums.isneginf()[..., None], 0.0, (scores - sums[..., None]).exp())
            attended = torch.einsum("hqk,khd->qhd", weights, values.float().repeat_interleave(group, 1))
            output[begin:end] = attended.to(q.dtype)
            lse[:, begin:end] = torch.where(sums.isneginf(), torch.inf, sums)
        return Segment(output, lse)

    return attend
