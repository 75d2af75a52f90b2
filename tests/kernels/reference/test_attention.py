"""Attention in torch: on packed pages, on plain tensors, and from its definition."""

import itertools

import pytest
import torch

from tests.helpers.paged_cache import make_layout, random_cache, random_transforms, rotary_table
from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, Segment, Span
from vllm_kvtuner.kernels.reference import attention
from vllm_kvtuner.kernels.reference.attention import attention_ref, merge_segments_ref, paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref

CPU = torch.device("cpu")
SEQ_LENS = [37, 1, 0, 16, 130]
QUERY_LENS = [3, 1, 1, 16, 2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def gathered(cache, transforms, request):
    """All keys and values of one request in model space, fp32."""
    length = int(cache.seq_lens[request])
    rows = [torch.empty(length, cache.kv_cache.shape[1], cache.layout.head_size) for _ in range(2)]
    bounds, start = torch.tensor([0, length], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    tokens = CachedTokens(cache.block_table[request : request + 1], bounds, start, length)
    gather_cache_ref(cache.pages(transforms), tokens, rows[0], rows[1])
    return rows


def plain_attention(query, key, value, scale, window, soft_cap, skip=0):
    """Attention row by row in fp64, straight from its definition, and the log-sum-exp of each row."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full((query.shape[1], query.shape[0]), -torch.inf, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for row, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
        position = key.shape[0] - query.shape[0] + row
        first = 0 if window is None else max(0, position - window + 1)
        if position + 1 - skip <= first:
            continue
        keys, values = (x[first : position + 1 - skip, head // group].double() for x in (key, value))
        logits = keys @ query[row, head].double() * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        out[row, head] = torch.softmax(logits, 0) @ values
        lse[head, row] = torch.logsumexp(logits, 0)
    return out, lse


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("window", "soft_cap", "skip"),
    [(None, 0.0, 0), (1, 0.0, 0), (20, 0.0, 0), (None, 3.0, 0), (20, 3.0, 0), (None, 0.0, 5), (20, 3.0, 17)],
)
@pytest.mark.parametrize("batch_tokens", [1, 80, 1 << 15], ids=["one_by_one", "some_together", "all_together"])
def test_attention_on_pages_and_on_plain_tensors(window, soft_cap, skip, batch_tokens, monkeypatch):
    monkeypatch.setattr(attention, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(attention, "SCORES_PER_SLICE", 300)
    rotary = rotary_table(48, True, 200, CPU)
    transforms = random_transforms(
        2, 96, CPU, rotary, offset=3.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    cache = random_cache(make_layout("K8V4", 96), SEQ_LENS, 2, CPU)
    query = torch.randn(sum(QUERY_LENS), 6, 96)
    queries, shape, span = cache.queries(QUERY_LENS), cache.shape(6, soft_cap), Span(window, skip)
    starts = queries.query_start_loc
    output, lse = torch.full_like(query, torch.nan), torch.full((6, len(query)), torch.nan)
    paged_attention_ref(query, queries, cache.pages(transforms), shape, span, output, lse)
    for request, length in enumerate(SEQ_LENS):
        rows = slice(int(starts[request]), int(starts[request + 1]))
        if length == 0:
            assert not output[rows].any()
            assert (lse[:, rows] == -torch.inf).all()
            continue
        key, value = gathered(cache, transforms, request)
        want, want_lse = plain_attention(query[rows], key, value, shape.scale, window, soft_cap, skip)
        torch.testing.assert_close(output[rows].double(), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(lse[:, rows].double(), want_lse, rtol=0, atol=1e-4)
        contiguous, contiguous_lse = torch.empty_like(query[rows]), torch.empty_like(lse[:, rows])
        attention_ref(query[rows], key, value, shape, span, contiguous, contiguous_lse)
        torch.testing.assert_close(contiguous.double(), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(contiguous_lse.double(), want_lse, rtol=0, atol=1e-4)


def test_blocks_that_have_left_the_sliding_window_may_hold_anything():
    """They may be another request's by now, in another format."""
    cache = random_cache(make_layout("K4V4", 64), [100], 2, CPU)
    query = torch.randn(1, 4, 64)
    outputs = []
    for byte in (None, 0xFF):  # as fp16 scales, NaN
        if byte is not None:
            cache.kv_cache[cache.block_table[0, :5].long()] = byte
        outputs.append(torch.empty_like(query))
        paged_attention_ref(query, cache.queries([1]), cache.pages(), cache.shape(4), Span(20), outputs[-1])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("query_lens", [[1], [4]])
def test_tokens_that_a_recent_window_serves_may_hold_anything(query_lens):
    """They may not be packed yet."""
    cache = random_cache(make_layout("K4V4", 64), [100], 2, CPU)
    query = torch.randn(sum(query_lens), 4, 64)
    outputs = []
    for poisoned in (0, 20):
        cache.poison_newest(poisoned)
        outputs.append(torch.empty_like(query))
        span = Span(skip_newest=20)
        paged_attention_ref(query, cache.queries(query_lens), cache.pages(), cache.shape(4), span, outputs[-1])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("skip", [1, 7, 200])
def test_segments_merge_to_attention_over_all_tokens(skip):
    query, key, value = torch.randn(30, 4, 64), torch.randn(90, 2, 64), torch.randn(90, 2, 64)
    shape = AttentionShape(4, 2, 64, 0.125)
    older, newest = (Segment(torch.empty_like(query), torch.empty(4, 30)) for _ in range(2))
    attention_ref(query, key, value, shape, Span(skip_newest=skip), older.output, older.lse)
    attention_ref(query, key, value, shape, Span(sliding_window=skip), newest.output, newest.lse)
    merged, whole = (Segment(torch.empty_like(query), torch.empty(4, 30)) for _ in range(2))
    merge_segments_ref(older, newest, merged.output, merged.lse)
    attention_ref(query, key, value, shape, Span(), whole.output, whole.lse)
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-5)
    empty = torch.full((4, 30), -torch.inf)
    merge_segments_ref(Segment(older.output, empty), Segment(newest.output, empty), merged.output, merged.lse)
    assert not merged.output.any() and (merged.lse == -torch.inf).all(), "padding"
