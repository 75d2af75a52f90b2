"""How the prefills of a batch read the cache: slices of bounded size, planned on the host.

A prefill attends to its fresh tokens and to its *context*, the tokens that are in the cache already (a cached prefix
or an earlier chunk). Cached tokens are dequantized into a workspace slice by slice:

- full attention: each slice holds an equal share of every request's context; its attention, without a mask, is merged
  with that of the fresh tokens by log-sum-exp;
- sliding window: each slice holds whole requests, the newest ``sliding_window - 1`` context tokens and the fresh ones,
  contiguous, so that one masked attention is exact;
- ``attend_cached``: the fresh tokens too are read back from the cache, as if they had been cached before.
"""

import itertools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheSlice:
    """Cached tokens of consecutive requests, to be dequantized together.

    Args:
        first_request: index in the batch of the first request; the slice covers ``cu_seq_lens`` many from there.
        cu_seq_lens: [num_reqs + 1] int32 on the device, rows of the workspace where each request's tokens begin.
        seq_starts: [num_reqs] int32 on the device, the first token of each request.
        num_tokens: rows in use.
        max_len: the most tokens of one request.
        first_token: first query token, counted in the batch.
        num_query_tokens: query tokens of these requests.
        cu_query_lens: [num_reqs + 1] int32 on the device, from 0.
        max_query_len: the most query tokens of one request.
        fresh_rows: [num_query_tokens] int64 on the device, the workspace rows of the fresh tokens, if the slice
            holds them and they are to be taken unquantized; else None.
    """

    first_request: int
    cu_seq_lens: torch.Tensor
    seq_starts: torch.Tensor
    num_tokens: int
    max_len: int
    first_token: int
    num_query_tokens: int
    cu_query_lens: torch.Tensor
    max_query_len: int
    fresh_rows: torch.Tensor | None = None

    @property
    def num_reqs(self) -> int:
        return self.seq_starts.shape[0]


@dataclass(frozen=True)
class PrefillPlan:
    """Prefills of a batch.

    Args:
        first_token: first token of the prefills in the batch.
        num_tokens: their tokens.
        cu_query_lens: [num_reqs + 1] int32 on the device, from 0.
        max_query_len: the most query tokens of one request.
        fresh: True if attention over fresh keys and values comes first; else ``causal`` slices hold them.
        context: slices of the context, merged without a mask.
        causal: slices of whole requests under the causal (and sliding-window) mask.
    """

    first_token: int
    num_tokens: int
    cu_query_lens: torch.Tensor
    max_query_len: int
    fresh: bool
    context: tuple[CacheSlice, ...]
    causal: tuple[CacheSlice, ...]


def plan(
    *,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    first_request: int,
    num_reqs: int,
    workspace_tokens: int,
    block_size: int,
    attend_cached: bool,
    sliding_window: int | None,
    device: torch.device,
) -> PrefillPlan:
    """Plan the prefills ``first_request .. num_reqs`` of a batch.

    Args:
        query_start_loc: [>= num_reqs + 1] int32 on the host.
        seq_lens: [>= num_reqs] on the host, exact for prefills.
        first_request: the first prefill.
        num_reqs: requests of the batch.
        workspace_tokens: rows of the workspace; at least one request's fresh tokens and window fit.
        block_size: tokens per block; slices begin at block boundaries.
        attend_cached: read fresh tokens back from the cache.
        sliding_window: tokens a query sees, itself included, or None for all.
        device: where the kernels read the plan.
    """
    starts = query_start_loc[first_request : num_reqs + 1].tolist()
    queries = [end - begin for begin, end in itertools.pairwise(starts)]
    contexts = [
        length - query for length, query in zip(seq_lens[first_request:num_reqs].tolist(), queries, strict=True)
    ]
    maker = _SliceMaker(starts, queries, first_request, device)
    context: list[CacheSlice] = []
    causal: list[CacheSlice] = []
    if sliding_window is not None and (attend_cached or any(contexts)):
        tails = [min(length, sliding_window - 1) for length in contexts]
        begins = [length - tail for length, tail in zip(contexts, tails, strict=True)]
        lengths = [tail + query for tail, query in zip(tails, queries, strict=True)]
        causal = maker.whole_requests(begins, lengths, workspace_tokens, fresh_rows=not attend_cached)
    else:
        if attend_cached:
            causal = maker.whole_requests(contexts, queries, workspace_tokens, fresh_rows=False)
        if any(contexts):
            share = max(workspace_tokens // sum(length > 0 for length in contexts) // block_size, 1) * block_size
            for begin in range(0, max(contexts), share):
                lengths = [max(0, min(share, length - begin)) for length in contexts]
                context.append(maker.slice(0, len(queries), [begin] * len(queries), lengths, fresh_rows=False))
    return PrefillPlan(
        first_token=starts[0],
        num_tokens=starts[-1] - starts[0],
        cu_query_lens=_cumulative(queries, device),
        max_query_len=max(queries),
        fresh=not causal,
        context=tuple(context),
        causal=tuple(causal),
    )


def workspace_rows(requested: int, max_num_batched_tokens: int, sliding_window: int | None) -> int:
    """Rows the workspace needs: as requested, but never less than one whole batch of fresh tokens and one window."""
    return max(requested, max_num_batched_tokens + (sliding_window or 1) - 1)


class _SliceMaker:
    """Builds slices of requests whose query tokens begin at ``starts`` and count ``queries``."""

    def __init__(self, starts: list[int], queries: list[int], first_request: int, device: torch.device) -> None:
        self.starts, self.queries, self.first_request, self.device = starts, queries, first_request, device

    def slice(self, first: int, last: int, begins: list[int], lengths: list[int], fresh_rows: bool) -> CacheSlice:
        queries, lengths = self.queries[first:last], lengths[first:last]
        rows = None
        if fresh_rows:
            # A request's fresh tokens are the last rows of its stretch of the workspace.
            ends = torch.tensor(lengths).cumsum(0)
            counts = torch.tensor(queries)
            shift = ends - counts.cumsum(0)
            rows = _to_device(torch.arange(int(counts.sum())) + shift.repeat_interleave(counts), self.device)
        return CacheSlice(
            first_request=self.first_request + first,
            cu_seq_lens=_cumulative(lengths, self.device),
            seq_starts=_to_device(torch.tensor(begins[first:last], dtype=torch.int32), self.device),
            num_tokens=sum(lengths),
            max_len=max(lengths),
            first_token=self.starts[first],
            num_query_tokens=sum(queries),
            cu_query_lens=_cumulative(queries, self.device),
            max_query_len=max(queries),
            fresh_rows=rows,
        )

    def whole_requests(
        self, begins: list[int], lengths: list[int], workspace_tokens: int, fresh_rows: bool
    ) -> list[CacheSlice]:
        slices, first = [], 0
        while first < len(lengths):
            last, total = first + 1, lengths[first]
            while last < len(lengths) and total + lengths[last] <= workspace_tokens:
                total += lengths[last]
                last += 1
            slices.append(self.slice(first, last, begins, lengths, fresh_rows))
            first = last
        return slices


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return _to_device(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), device)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return tensor
    # Pinned memory lets the copy run behind the host.
    return tensor.pin_memory().to(device, non_blocking=True)
