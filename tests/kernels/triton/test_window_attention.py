"""window_attention against the reference, and the reference against plain attention."""

import itertools

import pytest
import torch

from tests.helpers.paged_cache import starts_of
from vllm_kvtuner.kernels.contract import AttentionShape, Launch, Queries, Span
from vllm_kvtuner.kernels.reference.window_attention import window_attention_ref
from vllm_kvtuner.kernels.triton.window_attention import window_attention

BLOCK_SIZE, KV_HEADS = 16, 2
SEQ_LENS, QUERY_LENS = [1, 3, 20, 40, 70, 150, 0, 97], [1, 3, 1, 2, 3, 1, 1, 3]
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Outputs are of size 1, rounded to the dtype; so are probabilities, at most 1."""


class Case:
    """Requests whose window holds what their queries see of it; all else is another's, whose bits are NaN."""

    def __init__(self, window_tokens, sink_tokens, query_lens, device, dtype=torch.float32, head_size=64, group=3):
        torch.manual_seed(0)
        seq_lens = torch.tensor(SEQ_LENS, dtype=torch.int32, device=device)
        self.keys, self.values = (
            [torch.randn(n, KV_HEADS, head_size, device=device).to(dtype) for n in SEQ_LENS] for _ in range(2)
        )
        width = -(-max(SEQ_LENS) // BLOCK_SIZE)
        blocks = torch.randperm(len(SEQ_LENS) * width, dtype=torch.int32, device=device) + 1
        block_table = blocks.view(len(SEQ_LENS), width)
        self.queries = Queries(block_table, seq_lens, starts_of(query_lens, device), max(query_lens))
        self.shape = AttentionShape(KV_HEADS * group, KV_HEADS, head_size, 0.125)
        shape = (len(blocks) + 1, KV_HEADS, BLOCK_SIZE, 2 * head_size)
        self.rows = torch.full(shape, torch.nan, dtype=dtype, device=device)
        for request, (length, queries) in enumerate(zip(SEQ_LENS, query_lens, strict=True)):
            begin = max(length - queries - window_tokens + 1, 0)
            for token in [*range(min(sink_tokens, begin)), *range(begin, length)]:
                row = torch.cat([self.keys[request][token], self.values[request][token]], -1)
                self.rows[block_table[request, token // BLOCK_SIZE], :, token % BLOCK_SIZE] = row
        total = sum(query_lens) + 2  # rows beyond the last query
        self.query = torch.randn(total, KV_HEADS * group, head_size, device=device).to(dtype)
        self.output = torch.randn(total, KV_HEADS * group, head_size, device=device).to(dtype)
        self.lse = torch.randn(KV_HEADS * group, total, device=device)
        self.lse[:, ::3] = -torch.inf
        self.output[::3] = 0

    def run(self, function, span, soft_cap=0.0, **launch):
        """Output of an implementation of window_attention; ``launch``: fields of Launch, none for the reference."""
        output, shape = self.output.clone(), self.shape._replace(logits_soft_cap=soft_cap)
        arguments = {} if function is window_attention_ref else {"launch": Launch(**launch)}
        function(self.query, self.queries, self.rows, shape, span, output, self.lse, **arguments)
        return output


@pytest.mark.quick(1)
@pytest.mark.parametrize("query_lens", [[1] * len(SEQ_LENS), QUERY_LENS], ids=["one_query", "several_queries"])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize(
    ("window_tokens", "sink_tokens", "sliding_window"),
    [(1, 0, None), (24, 4, None), (64, 16, None), (24, 4, 68), (70, 4, 90), (200, 4, 300)],
)
def test_limits(window_tokens, sink_tokens, sliding_window, soft_cap, query_lens, device):
    case = Case(window_tokens, sink_tokens, query_lens, device, torch.float16)
    span = Span(sliding_window, window_tokens, sink_tokens)
    want, got = (case.run(each, span, soft_cap) for each in (window_attention_ref, window_attention))
    assert not want.isnan().any()
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCES[torch.float16])
    assert torch.equal(got[-2:], case.output[-2:]), "rows beyond the last query"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_size", "group"),
    [*itertools.product((64, 96, 128, 256), (1, 8, 40)), (80, 1), (512, 8)],
)
def test_shapes(head_size, group, device):
    case = Case(24, 4, QUERY_LENS, device, torch.float16, head_size, group)
    want, got = (case.run(each, Span(None, 24, 4)).float() for each in (window_attention_ref, window_attention))
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCES[torch.float16])


@pytest.mark.slow
@pytest.mark.parametrize("pass_query_len", [1, 2])
@pytest.mark.parametrize("group", [4, 5, 40])
def test_more_passes_for_few_requests(group, pass_query_len, device):
    """A program has room for fewer queries than some requests have."""
    query_lens = [1, 3, 1, 16, 7, 1, 1, 2]
    case = Case(24, 4, query_lens, device, torch.float16, 64, group)
    want = case.run(window_attention_ref, Span(None, 24, 4))
    got = case.run(window_attention, Span(None, 24, 4), pass_query_len=pass_query_len)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCES[torch.float16])
    assert torch.equal(got[-2:], case.output[-2:]), "rows beyond the last query"


@pytest.mark.gpu
def test_bf16(device):
    case = Case(64, 4, QUERY_LENS, device, torch.bfloat16, 128, 4)
    want, got = (case.run(each, Span(None, 64, 4)).float() for each in (window_attention_ref, window_attention))
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("sliding_window", [None, 68])
def test_the_reference_sees_what_the_layer_sees(sliding_window, device):
    """Sink tokens and newest ones, each once, and what lies between comes from the other segment."""
    window_tokens, sink_tokens = 24, 4
    case = Case(window_tokens, sink_tokens, QUERY_LENS, device)
    got = case.run(window_attention_ref, Span(sliding_window, window_tokens, sink_tokens))
    for request, length in enumerate(SEQ_LENS):
        first, last = case.queries.query_start_loc[request : request + 2].tolist()
        for row in range(first, last) if length else ():
            position = length - (last - row)
            seen = [
                t for t in range(position + 1)
                if (t < sink_tokens or position - t < window_tokens)
                and (sliding_window is None or position - t < sliding_window)
            ]  # fmt: skip
            keys, values = (x[request][seen].repeat_interleave(3, 1) for x in (case.keys, case.values))
            scores = torch.einsum("hd,thd->ht", case.query[row], keys) * 0.125
            scores = torch.cat([scores, case.lse[:, row, None]], 1)
            weights = scores.softmax(-1)
            want = torch.einsum("ht,thd->hd", weights[:, :-1], values) + weights[:, -1:] * case.output[row]
            torch.testing.assert_close(got[row], want, rtol=0, atol=1e-5)
