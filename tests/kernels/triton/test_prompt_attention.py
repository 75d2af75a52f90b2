"""prompt_attention against FlashAttention's definition."""

import pytest
import torch

from tests.helpers.flash_attention import flash_attention
from tests.helpers.paged_cache import starts_of
from vllm_kvtuner.kernels.contract import AttentionShape
from vllm_kvtuner.kernels.triton.prompt_attention import Prompts, prompt_attention

TOLERANCE = 2e-3
"""Of outputs of size 1: they and the probabilities are rounded to fp16, 2^-11 each."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_size", "causal", "window", "soft_cap"),
    [(512, True, None, 0.0), (512, False, None, 3.0), (512, True, 20, 0.0), (320, True, 41, 3.0)],
    ids=["causal", "context, capped", "sliding window", "padded, capped, sliding window"],
)
def test_attention(head_size, causal, window, soft_cap, device):
    """Odd lengths, a request without queries and one without keys, more queries than a program has, fused rows."""
    torch.manual_seed(0)
    query_lens, key_lens, heads, kv_heads = [1, 37, 0, 5, 3], [40, 53, 20, 5, 0 if not causal else 3], 4, 2
    fused = torch.randn(sum(query_lens), heads + 1, head_size, device=device).half()
    cached = torch.randn(sum(key_lens), 2 * kv_heads, head_size, device=device).half()
    query, key, value = fused[:, :heads], cached[:, :kv_heads], cached[:, kv_heads:]
    prompts = Prompts(starts_of(query_lens, device), starts_of(key_lens, device), max(query_lens))
    shape = AttentionShape(heads, kv_heads, head_size, head_size**-0.5, soft_cap)
    got = prompt_attention(query, key, value, prompts, shape, causal, window)
    want = flash_attention(shape.scale, soft_cap)(
        query.cpu(), key.cpu(), value.cpu(), prompts.cu_query_lens.cpu(), prompts.cu_key_lens.cpu(),
        max(query_lens), max(key_lens), causal, [-1, -1] if window is None else [window - 1, 0],
    )  # fmt: skip
    torch.testing.assert_close(got.output.cpu().float(), want.output.float(), rtol=0, atol=TOLERANCE)
    # Of a row that sees nothing FlashAttention 2's is +inf.
    lse = torch.where(want.lse == torch.inf, -torch.inf, want.lse)
    torch.testing.assert_close(got.lse.cpu(), lse, rtol=0, atol=TOLERANCE)
    assert (lse == -torch.inf).any() == (not causal)
