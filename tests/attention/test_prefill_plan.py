"""The plan of a batch's prefills: what each slice reads, and that attention by the plan is plain attention."""

import random
from dataclasses import dataclass

import pytest
import torch

from vllm_kvtuner.attention.prefill_plan import PlanRules, PrefillPlan, plan, short_prefills, workspace_rows
from vllm_kvtuner.kernels.limits import SHORT_PREFILL_TOKENS

CPU = torch.device("cpu")
BLOCK = 16
HEAD_SIZE = 8


@dataclass(frozen=True)
class Batch:
    """Requests of (context, query) tokens; the first ``num_decodes`` are no prefills."""

    requests: tuple[tuple[int, int], ...]
    num_decodes: int
    workspace: int
    window: int | None
    attend_cached: bool
    recent: int | None = None
    sink_tokens: int = 0

    @property
    def starts(self) -> list[int]:
        starts = [0]
        for _, query in self.requests:
            starts.append(starts[-1] + query)
        return starts

    @property
    def prefills(self) -> range:
        return range(self.num_decodes, len(self.requests))

    def plan(self) -> PrefillPlan:
        rules = PlanRules(
            workspace_tokens=self.workspace,
            block_size=BLOCK,
            attend_cached=self.attend_cached,
            sliding_window=self.window,
            recent=self.recent,
            sink_tokens=self.sink_tokens,
        )
        # Longer than the batch, as vLLM's are.
        starts = torch.tensor([*self.starts, 0], dtype=torch.int32)
        lens = torch.tensor([context + query for context, query in self.requests] + [0], dtype=torch.int32)
        return plan(rules, starts, lens, self.num_decodes, len(self.requests), CPU)


def random_batch(
    seed: int, window: int | None, attend_cached: bool, recent: int | None = None, sink_tokens: int = 0
) -> Batch:
    numbers = random.Random(seed)
    num_decodes, num_prefills = numbers.randrange(3), numbers.randrange(1, 6)
    decodes = [(numbers.randrange(1, 90), 1) for _ in range(num_decodes)]
    prefills = [
        (numbers.choice([0, 0, 1, BLOCK, numbers.randrange(300)]), numbers.choice([1, 2, numbers.randrange(1, 60)]))
        for _ in range(num_prefills)
    ]
    requests = (*decodes, *prefills)
    fresh = sum(query for _, query in requests)
    # From the least that fits to more than everything.
    workspace = workspace_rows(numbers.choice([0, 64, 200, 5000]), fresh, window or recent)
    # One block per request with a context is the least a context slice holds.
    return Batch(
        requests, num_decodes, max(workspace, BLOCK * num_prefills), window, attend_cached, recent, sink_tokens
    )


CASES = [(window, attend_cached) for window in (None, 1, 24, 1000) for attend_cached in (False, True)]
SEEDS = range(40)


def tokens_read(part) -> list[tuple[int, int]]:
    """(request, position) of each row of the workspace that a slice fills."""
    rows = []
    bounds = part.cu_seq_lens.tolist()
    for index, first in enumerate(part.seq_starts.tolist()):
        length = bounds[index + 1] - bounds[index]
        rows += [(part.first_request + index, position) for position in range(first, first + length)]
    return rows


@pytest.mark.quick(1)
@pytest.mark.parametrize(("window", "attend_cached"), CASES)
def test_every_token_is_read_once_within_the_workspace(window, attend_cached):
    for seed in SEEDS:
        batch = random_batch(seed, window, attend_cached)
        planned = batch.plan()
        parts = (*planned.context, *planned.causal)
        prefills = [batch.requests[request] for request in batch.prefills]
        at_once = window is None and any(context for context, _ in prefills)
        at_once &= sum(map(sum, prefills)) <= batch.workspace
        for part in parts:
            rows = tokens_read(part)
            assert len(rows) == part.num_tokens == part.cu_seq_lens[-1] <= batch.workspace
            assert part.max_len == max(part.cu_seq_lens.diff().tolist())
            assert part.num_reqs == len(part.cu_query_lens) - 1
            assert part.num_query_tokens == part.cu_query_lens[-1]
            assert part.max_query_len == max(part.cu_query_lens.diff().tolist())
            assert part.first_token == batch.starts[part.first_request]
            if window is None:
                assert all(first % BLOCK == 0 for first in part.seq_starts.tolist()) or part in planned.causal

        read = [row for part in parts for row in tokens_read(part)]
        by_request = {request: [position for owner, position in read if owner == request] for request in batch.prefills}
        assert sum(map(len, by_request.values())) == len(read), "a decode is none of the plan's business"
        for request, positions in by_request.items():
            context, query = batch.requests[request]
            if at_once:
                assert len(planned.causal) == 1 and not planned.context and positions == list(range(context + query))
            elif window is None:
                expected = range(context + query if attend_cached else context)
                # Context slices come in order; the fresh tokens' slice is another list.
                assert sorted(positions) == list(expected)
                cached = [
                    position for part in planned.context for owner, position in tokens_read(part) if owner == request
                ]
                assert cached == list(range(context))
            elif planned.fresh:
                assert not positions
            else:
                assert positions == list(range(max(0, context - window + 1), context + query))


@pytest.mark.parametrize("window", [None, 24])
def test_fresh_keys_alone_when_nothing_is_cached(window):
    planned = Batch(((5, 1), (0, 30), (0, 7)), 1, 64, window, attend_cached=False).plan()
    assert planned.fresh and not planned.context and not planned.causal
    assert (planned.first_token, planned.num_tokens, planned.max_query_len) == (1, 37, 30)
    assert planned.cu_query_lens.tolist() == [0, 30, 37]


@pytest.mark.parametrize("window", [24, 1000])
def test_fresh_rows_are_the_fresh_tokens(window):
    for seed in SEEDS:
        batch = random_batch(seed, window, attend_cached=False)
        for part in batch.plan().causal:
            rows = tokens_read(part)
            fresh = [
                (request, batch.requests[request][0] + token)
                for request in range(part.first_request, part.first_request + part.num_reqs)
                for token in range(batch.requests[request][1])
            ]
            assert [rows[row] for row in part.fresh_rows.tolist()] == fresh
    assert all(part.fresh_rows is None for part in random_batch(0, window, attend_cached=True).plan().causal)


def test_context_slices_start_at_blocks_and_share_the_workspace():
    planned = Batch(((100, 3), (0, 5), (33, 2)), 0, 96, None, attend_cached=False).plan()
    # Two requests have a context, so each slice holds 48 tokens of either.
    assert [part.seq_starts.tolist() for part in planned.context] == [[0] * 3, [48] * 3, [96] * 3]
    assert [part.cu_seq_lens.diff().tolist() for part in planned.context] == [[48, 0, 33], [48, 0, 0], [4, 0, 0]]


@pytest.mark.parametrize(("fresh", "workspace", "at_once"), [(8, 130, True), (8, 117, False), (2049, 9000, False)])
def test_few_fresh_tokens_go_with_their_context_if_it_fits(fresh, workspace, at_once):
    planned = Batch(((100, fresh), (0, 10)), 0, workspace, None, attend_cached=False).plan()
    assert bool(planned.causal) == at_once != bool(planned.context)


def attend(query, keys, values, mask):
    """Output [num_queries, head_size] and log-sum-exp [num_queries]; 0 and -inf where nothing is visible."""
    scores = (query @ keys.T).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return (scores - lse[:, None]).exp().nan_to_num(0.0) @ values, lse


def merge(first, first_lse, second, second_lse):
    lse = torch.logaddexp(first_lse, second_lse)
    first_share, second_share = ((part - lse).exp().nan_to_num(0.0)[:, None] for part in (first_lse, second_lse))
    return first_share * first + second_share * second, lse


def by_plan(batch, query, cached, fresh, held=None):
    """What the GPU path does with a plan, one head: ``cached``, ``fresh`` and ``held`` (in the recent window) are keys
    and values per request."""
    planned, starts = batch.plan(), batch.starts
    output = torch.full_like(query, torch.nan)
    lse = torch.full((len(query),), torch.nan, dtype=query.dtype)

    def bottom_right(num_queries, num_keys, window=batch.window):
        distance = torch.arange(num_queries)[:, None] + num_keys - num_queries - torch.arange(num_keys)
        return (distance >= 0) & (distance < (window or num_keys + num_queries))

    if planned.fresh:
        for request in batch.prefills:
            rows = slice(starts[request], starts[request + 1])
            mask = bottom_right(rows.stop - rows.start, rows.stop - rows.start)
            output[rows], lse[rows] = attend(query[rows], *fresh[request], mask)
    older_window = batch.window - batch.recent if batch.window and planned.newest else batch.window
    for parts, causal, window in (
        (planned.causal, True, older_window),
        (planned.newest, True, batch.recent),
        (planned.context, False, None),
    ):
        for part in parts:
            rows = tokens_read(part)
            keys, values = (
                torch.stack([cached[request][which][position] for request, position in rows])
                if rows
                else torch.empty(0, HEAD_SIZE, dtype=torch.float64)
                for which in (0, 1)
            )
            span = range(part.first_request, part.first_request + part.num_reqs)
            if not part.needs_packed:
                keys, values = keys * torch.nan, values * torch.nan
            if part.fresh_rows is not None:
                keys[part.fresh_rows] = torch.cat([fresh[request][0] for request in span])
                values[part.fresh_rows] = torch.cat([fresh[request][1] for request in span])
            for taken, places in ((part.recent, part.recent_rows), (part.sink_tokens, part.sink_rows)):
                if taken is None:
                    continue
                for row, (request, position) in zip(places.tolist(), tokens_read(taken), strict=True):
                    assert rows[row] == (request, position)
                    keys[row], values[row] = (held[request][which][position] for which in (0, 1))
            bounds, queries = part.cu_seq_lens.tolist(), part.cu_query_lens.tolist()
            for index in range(part.num_reqs):
                mine = slice(part.first_token + queries[index], part.first_token + queries[index + 1])
                span = slice(bounds[index], bounds[index + 1])
                shape = (mine.stop - mine.start, span.stop - span.start)
                mask = bottom_right(*shape, window) if causal else torch.ones(shape, dtype=torch.bool)
                result = attend(query[mine], keys[span], values[span], mask)
                if parts is not planned.causal:
                    result = merge(*result, output[mine], lse[mine])
                output[mine], lse[mine] = result
    return output[starts[batch.num_decodes] :]


@pytest.mark.slow
@pytest.mark.parametrize(("window", "attend_cached"), CASES)
def test_attention_by_the_plan_is_plain_attention(window, attend_cached):
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        return torch.randn(count, HEAD_SIZE, dtype=torch.float64, generator=generator)

    for seed in SEEDS:
        batch = random_batch(seed, window, attend_cached)
        query = rows(batch.starts[-1])
        # The cache holds other numbers than the fresh keys and values, as a quantized one does.
        cached = [(rows(context + new), rows(context + new)) for context, new in batch.requests]
        fresh = [(rows(new), rows(new)) for _, new in batch.requests]
        expected = []
        for request in batch.prefills:
            context, new = batch.requests[request]
            keys, values = (
                cached[request][which]
                if attend_cached
                else torch.cat([cached[request][which][:context], fresh[request][which]])
                for which in (0, 1)
            )
            position = torch.arange(context, context + new)[:, None] - torch.arange(context + new)
            mask = (position >= 0) & (position < (window or context + new))
            mine = slice(batch.starts[request], batch.starts[request + 1])
            expected.append(attend(query[mine], keys, values, mask)[0])
        torch.testing.assert_close(by_plan(batch, query, cached, fresh), torch.cat(expected), rtol=1e-10, atol=1e-12)


RECENT_CASES = [(None, 1), (None, 10), (None, 1000), (24, 10), (60, 59), (1000, 30)]


@pytest.mark.slow
@pytest.mark.parametrize("sink_tokens", [0, 4, 16])
@pytest.mark.parametrize("attend_cached", [False, True])
@pytest.mark.parametrize(("window", "recent"), RECENT_CASES)
def test_attention_by_the_plan_reads_the_newest_tokens_from_the_recent_window(
    window, recent, attend_cached, sink_tokens
):
    """Under attend_cached each query its own newest; else all of a request's queries those before the fresh ones. Sink
    tokens that are not fresh are all read from there."""
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        return [torch.randn(count, HEAD_SIZE, dtype=torch.float64, generator=generator) for _ in range(2)]

    for seed in SEEDS:
        batch = random_batch(seed, window, attend_cached, recent, sink_tokens)
        query = rows(batch.starts[-1])[0]
        cached = [rows(context + new) for context, new in batch.requests]
        fresh = [rows(new) for _, new in batch.requests]
        held = [rows(context + new) for context, new in batch.requests]
        # What the window's cache does not hold may be anything.
        for (keys, values), (context, _) in zip(held, batch.requests, strict=True):
            for rows_of in (keys, values):
                rows_of[sink_tokens : max(0, context - recent + 1)] = torch.nan
                rows_of[max(context, sink_tokens if attend_cached else 0) :] = torch.nan
        expected = []
        for request in batch.prefills:
            context, new = batch.requests[request]
            token = torch.arange(context + new)
            newest = [torch.cat([held[request][which][:context], fresh[request][which]]) for which in (0, 1)]
            mine = slice(batch.starts[request], batch.starts[request + 1])
            for row, position in enumerate(range(context, context + new)):
                near = token > (position if attend_cached else context) - recent
                older = [
                    torch.where((token < sink_tokens)[:, None], held[request][i], cached[request][i]) for i in (0, 1)
                ]
                keys, values = (torch.where(near[:, None], newest[i], older[i]) for i in (0, 1))
                seen = (token <= position) & (token > position - (window or context + new))
                expected.append(attend(query[mine][row : row + 1], keys[seen], values[seen], torch.ones(1, 1) > 0)[0])
        torch.testing.assert_close(
            by_plan(batch, query, cached, fresh, held), torch.cat(expected), rtol=1e-9, atol=1e-11
        )


def test_workspace_holds_a_batch_and_a_window_at_least():
    assert workspace_rows(65536, 8192, None) == 65536
    assert workspace_rows(0, 8192, None) == 8192
    assert workspace_rows(0, 8192, 1024) == 8192 + 1023


@pytest.mark.parametrize(
    ("requests", "first", "expected"),
    [
        (((9, 1), (48, 16), (3, 2), (64, 17), (20, 4)), 1, [16, 2]),
        (((48, 17), (20, 4)), 0, []),
        (((9, 1), (0, 3), (20, 4)), 1, []),  # a prompt without a context has its fresh keys and values
        (((9, 1), (20, 4), (0, 3)), 1, [4]),
        (((5, 16),) * 100, 0, [16] * (SHORT_PREFILL_TOKENS // 16)),
        (((5, 2),) * 1000, 100, [2] * (SHORT_PREFILL_TOKENS // 2)),
    ],
)
def test_short_prefills_are_the_first_that_the_decode_kernel_takes(requests, first, expected):
    """At most 16 tokens each."""
    starts = torch.tensor([query for _, query in ((0, 0), *requests)]).cumsum(0).int()
    lens = torch.tensor([context + query for context, query in requests])
    padded = torch.cat([starts, starts[-1:]])  # longer than the batch, as vLLM's is
    assert short_prefills(padded, lens, first, len(requests) - first) == expected
