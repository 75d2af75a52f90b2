"""Launches of the CUDA paged_attention on a card, and their outputs against the reference in fp32.

Up to 8 rows, weights (probability times value scale) are 16-bit fixed point and so are queries, which moves a logit of
unit variance by about 1e-4. Beyond, both are fp16 numbers, off by up to 2^-12 each. So outputs lie within TOLERANCE of
the largest value cached, and their own rounding (ROUNDING, a half unit in the last place) comes on top.
"""

import torch

from tests.helpers.decode_cases import (
    attend,
    largest_value,
)
from vllm_kvtuner.kernels.cuda import paged_attention as cuda
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.pages.transforms import LayerTransforms

TOLERANCE = 1e-3
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
SWITCHES = {"equalization": True, "key_hadamard": True, "value_hadamard": True}


def workspace_of(cache, num_heads, num_reqs, max_query_len):
    num_kv_heads, layout = cache.kv_cache.shape[1], cache.layout
    device = cache.kv_cache.device
    return cuda.decode_workspace(num_reqs, max_query_len, num_heads, num_kv_heads, layout.head_size, device)


def check_counters(workspace):
    assert not workspace.arrivals.any()


def launch_twice(cache, query, query_lens, transforms, **options):
    """The output, after a second launch on the same workspace has given the same bits and left all counters at 0."""
    room = options.get("pass_query_len") or max(query_lens)
    workspace = workspace_of(cache, query.shape[1], len(query_lens), room)
    first, second = (
        attend(cuda.paged_attention, cache, query, query_lens, transforms, workspace=workspace, **options)
        for _ in range(2)
    )
    check_counters(workspace)
    assert torch.equal(first.view(torch.int16), second.view(torch.int16)), "results depend on timing"
    return second


def check(
    cache,
    group,
    dtype=torch.bfloat16,
    query_lens=None,
    transforms=None,
    query=None,
    tolerance=TOLERANCE,
    config=None,
    pass_query_len=None,
    **options,
):
    """The kernel's output lies within tolerance of the reference's in fp32, and is 0 beyond the last query."""
    transforms = transforms or LayerTransforms()
    query_lens = query_lens or [1] * len(cache.seq_lens)
    num_tokens, num_heads, head_size = sum(query_lens), cache.kv_cache.shape[1] * group, cache.layout.head_size
    assert cuda.unsupported(cache.layout, transforms, options.get("logits_soft_cap", 0.0)) is None
    # As a slice of a fused projection, and with rows that belong to no request.
    fused = torch.randn(num_tokens + 3, 2 * num_heads, head_size, device=cache.kv_cache.device)
    if query is not None:
        fused[:num_tokens, :num_heads] = query
    query = fused.to(dtype)[:, :num_heads]
    got = launch_twice(cache, query, query_lens, transforms, config=config, pass_query_len=pass_query_len, **options)
    assert not got[num_tokens:].any(), "rows beyond the last query"
    want = attend(paged_attention_ref, cache, query[:num_tokens].float(), query_lens, transforms, **options)
    assert not want.isnan().any()
    limit = tolerance * largest_value(cache)
    torch.testing.assert_close(got[:num_tokens].float(), want, rtol=ROUNDING[dtype], atol=limit)
    return got[:num_tokens]
