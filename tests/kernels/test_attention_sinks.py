"""Attention sinks in every decode kernel, against a softmax with one column more.

The CUDA kernels run on a card in tests/kernels/cuda, and lane by lane in test_emulated.py there.
"""

import pytest
import torch

from tests.helpers.decode_cases import attend, largest_value, plain_attention, random_sinks
from tests.helpers.paged_cache import PackedCache, make_layout, random_cache
from vllm_kvtuner.kernels.contract import Launch, Segment, Span
from vllm_kvtuner.kernels.reference.attention import merge_segments_ref, paged_attention_ref
from vllm_kvtuner.kernels.reference.window_attention import window_attention_ref
from vllm_kvtuner.kernels.triton.paged_attention import decode_workspace, paged_attention
from vllm_kvtuner.kernels.triton.paged_attention_config import DecodeConfig
from vllm_kvtuner.kernels.triton.window_attention import window_attention
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms

SEQ_LENS = [70, 1, 0, 16, 129, 33]
ONE, SEVERAL = [1, 1, 0, 1, 1, 1], [5, 1, 0, 16, 2, 3]
GROUP, KV_HEADS = 3, 2
LIMITS = [
    pytest.param(Span(), 0.0, ONE, torch.float32, id="one query"),
    pytest.param(Span(40), 2.0, SEVERAL, torch.bfloat16, id="sliding window, capped"),
    pytest.param(Span(None, 24, 4), 0.0, SEVERAL, torch.float16, id="beside a recent window"),
    pytest.param(Span(64, 33), 0.0, ONE, torch.bfloat16, id="beside a recent window in a sliding one"),
]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize(("span", "soft_cap", "query_lens", "dtype"), LIMITS)
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_decode(kernel, span, soft_cap, query_lens, dtype, device):
    """Rows that see no token too: their output is 0, their log-sum-exp the sink's logit."""
    cache = random_cache(make_layout("K4V8", 64), SEQ_LENS, KV_HEADS, device)
    total, num_heads = sum(query_lens), KV_HEADS * GROUP
    spare = 2 * (kernel == "triton")  # rows beyond the last query, which the reference leaves as they are
    query = torch.randn(total + spare, num_heads, 64, device=device)
    sinks = random_sinks(num_heads, device, dtype)
    want, want_lse = plain_attention(cache, query, query_lens, sinks, span, soft_cap)
    got_lse = torch.full((num_heads, total + spare), torch.nan, device=device)
    options = {**span._asdict(), "logits_soft_cap": soft_cap, "sinks": sinks, "lse": got_lse}
    function = paged_attention_ref
    if kernel == "triton":
        function = paged_attention
        options |= {"workspace": decode_workspace(len(query), num_heads, 64, device)}
        options |= {"config": DecodeConfig(8, 16, 3, 1, 2)}  # splits see few tokens or none
    got = attend(function, cache, query, query_lens, LayerTransforms(), **options)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1.5e-3 * largest_value(cache))
    torch.testing.assert_close(got_lse.double(), want_lse, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sliding_window", [None, 40])
@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_sinks_count_once_beside_a_recent_window(kernel, sliding_window, device):
    """The window's 16-bit rows, its sink tokens among them, are merged with what has counted the sinks."""
    cache, rows = _with_rows(random_cache(make_layout("K8V8", 64), SEQ_LENS, KV_HEADS, device))
    query = torch.randn(sum(SEVERAL), KV_HEADS * GROUP, 64, device=device).half()
    sinks, span = random_sinks(KV_HEADS * GROUP, device), Span(sliding_window, 24, 4)
    lse = torch.empty(KV_HEADS * GROUP, len(query), device=device)
    options = {**span._asdict(), "sinks": sinks, "lse": lse}
    if kernel == "triton":
        options |= {"workspace": decode_workspace(len(query), KV_HEADS * GROUP, 64, device)}
    decode, window = {
        "reference": (paged_attention_ref, window_attention_ref),
        "triton": (paged_attention, window_attention),
    }[kernel]
    got = attend(decode, cache, query, SEVERAL, LayerTransforms(), **options)
    shape = cache.shape(KV_HEADS * GROUP)._replace(sinks=sinks.dtype)
    launch = {"launch": Launch()} if kernel == "triton" else {}
    window(query, cache.queries(SEVERAL), rows, shape, span, got, lse, **launch)
    want, _ = plain_attention(cache, query, SEVERAL, sinks, Span(sliding_window))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-3 * largest_value(cache))


def test_a_window_of_8_bits_has_none():
    """Its pages are another segment of the same softmax."""
    cache = random_cache(make_layout("K8V8", 64), SEQ_LENS, KV_HEADS, torch.device("cpu"))
    query, sinks = torch.randn(sum(SEVERAL), 6, 64), random_sinks(6, torch.device("cpu"))
    parts = []
    for span, counted in ((Span(None, 24), sinks), (Span(24), None)):
        lse = torch.empty(6, len(query))
        options = {**span._asdict(), "sinks": counted}
        parts.append(
            Segment(attend(paged_attention_ref, cache, query, SEVERAL, LayerTransforms(), lse, **options), lse)
        )
    got = torch.empty_like(query)
    merge_segments_ref(*parts, got)
    want, _ = plain_attention(cache, query, SEVERAL, sinks, Span())
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


def _with_rows(cache: PackedCache) -> tuple[PackedCache, torch.Tensor]:
    """The cache and what a window of 16 bits keeps of it, [blocks, KV heads, tokens per block, 2 * head size] fp16."""
    assert cache.layout.pair == PrecisionPair(8, 8)
    keys, values = (side.format.dequantize(side.codes, side.meta) for side in cache.sides)
    return cache, torch.cat([keys, values], -1).half()
