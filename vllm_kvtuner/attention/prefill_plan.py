"""How the prefills of a batch read the cache: slices of bounded size, planned on the host.

A prefill attends to its fresh tokens and to its *context*, the tokens that are in the cache already (a cached prefix
or an earlier chunk). Cached tokens are dequantized into a workspace slice by slice:

- full attention: each slice holds an equal share of every request's context; its attention, without a mask, is merged
  with that of the fresh tokens by log-sum-exp. Where fresh tokens are few, and the workspace holds all of them and
  their context, that is one slice under the causal mask: fewer launches, which is what such a step waits for;
- sliding window: each slice holds whole requests, the newest ``sliding_window - 1`` context tokens and the fresh ones,
  contiguous, so that one masked attention is exact;
- ``attend_cached``: the fresh tokens too are read back from the cache, as if they had been cached before;
- recent window: the newest ``recent - 1`` context tokens, which the window's cache has, go with the fresh ones. Under
  ``attend_cached`` a query reads older tokens, some of the fresh ones among them, from slices that end ``recent``
  tokens earlier, and newer ones from slices of their own; otherwise all of a request's queries read what the window
  has. Its sink tokens take the place of those that were read packed, in whichever slice these are.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from vllm_kvtuner.kernels.contract import CachedTokens
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN, SHORT_PREFILL_TOKENS

FEW_FRESH_TOKENS = 2048
"""Fresh tokens per batch below which launch overhead on the host exceeds GPU time."""


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
        recent: context tokens among these that the recent window's cache has; None if they are to be read packed.
        recent_rows: [recent.num_tokens] int64 on the device, the workspace rows of those.
        sink_tokens: those among what would be read packed, which the recent window's cache has; None for none.
        sink_rows: [sink_tokens.num_tokens] int64 on the device, the workspace rows of those.
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
    recent: "CacheSlice | None" = None
    recent_rows: torch.Tensor | None = None
    sink_tokens: "CacheSlice | None" = None
    sink_rows: torch.Tensor | None = None

    @property
    def needs_packed(self) -> bool:
        """Whether some token is neither fresh nor in the recent window."""
        others = 0 if self.fresh_rows is None else self.num_query_tokens
        return self.num_tokens > others + (0 if self.recent is None else self.recent.num_tokens)

    @property
    def num_reqs(self) -> int:
        return self.seq_starts.shape[0]

    def of(self, block_table: torch.Tensor) -> CachedTokens:
        """What a gather takes, with the block table [num_reqs of the batch, max_blocks] of a cache."""
        rows = block_table[self.first_request : self.first_request + self.num_reqs]
        return CachedTokens(rows, self.cu_seq_lens, self.seq_starts, self.num_tokens)


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
        causal: slices of whole requests under the causal (and sliding-window) mask. Where there are ``newest`` slices,
            these end ``recent`` tokens earlier, so that the mask leaves out as many of those that a query sees.
        newest: for each of ``causal``, what the recent window holds, under its mask; else none.
    """

    first_token: int
    num_tokens: int
    cu_query_lens: torch.Tensor
    max_query_len: int
    fresh: bool
    context: tuple[CacheSlice, ...]
    causal: tuple[CacheSlice, ...]
    newest: tuple[CacheSlice, ...] = ()


@dataclass(frozen=True)
class PlanRules:
    """What plans of one group of layers go by, from step to step.

    Args:
        workspace_tokens: rows of the workspace; at least one request's fresh tokens and window fit.
        block_size: tokens per block; slices begin at block boundaries.
        attend_cached: read fresh tokens back from the cache.
        sliding_window: tokens a query sees, itself included, or None for all.
        recent: tokens of the recent window, less than the sliding window's, or None.
        sink_tokens: tokens at a request's head that the recent window's cache has.
        apart: fresh tokens are never in a slice with context, which other heads' queries attend to as well.
    """

    workspace_tokens: int
    block_size: int
    attend_cached: bool = False
    sliding_window: int | None = None
    recent: int | None = None
    sink_tokens: int = 0
    apart: bool = False

    @property
    def window(self) -> int | None:
        """Tokens before the fresh ones that go with them."""
        return self.sliding_window or self.recent


def plan(
    rules: PlanRules,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    first_request: int,
    num_reqs: int,
    device: torch.device,
) -> PrefillPlan:
    """Plan the prefills ``first_request .. num_reqs`` of a batch.

    Args:
        rules: of the layers.
        query_start_loc: [>= num_reqs + 1] int32 on the host.
        seq_lens: [>= num_reqs] on the host, exact for prefills.
        first_request: the first prefill.
        num_reqs: requests of the batch.
        device: where the kernels read the plan.
    """
    starts = query_start_loc[first_request : num_reqs + 1].tolist()
    queries = [end - begin for begin, end in itertools.pairwise(starts)]
    contexts = [
        length - query for length, query in zip(seq_lens[first_request:num_reqs].tolist(), queries, strict=True)
    ]
    maker = _SliceMaker(starts, queries, first_request, device, rules.sink_tokens)
    # Where a request's causal slice begins; its context before that goes into slices without a mask.
    begins = contexts
    causal: list[CacheSlice] = []
    newest: list[CacheSlice] = []
    if _fits_at_once(rules, queries, contexts):
        begins = [0] * len(contexts)
        causal, newest = _causal_slices(rules, maker, contexts, begins)
    elif rules.attend_cached or (rules.window is not None and any(contexts)):
        begins = [max(0, length - (rules.window or 1) + 1) for length in contexts]
        causal, newest = _causal_slices(rules, maker, contexts, begins)
    return PrefillPlan(
        first_token=starts[0],
        num_tokens=starts[-1] - starts[0],
        cu_query_lens=_cumulative(queries, device),
        max_query_len=max(queries),
        fresh=not causal,
        context=tuple(_context_slices(rules, maker, begins)) if rules.sliding_window is None else (),
        causal=tuple(causal),
        newest=tuple(newest),
    )


def _fits_at_once(rules: PlanRules, queries: list[int], contexts: list[int]) -> bool:
    """Whether all fresh tokens and their context are one slice: few tokens, and fewer launches."""
    if rules.apart or rules.sliding_window is not None or (rules.attend_cached and rules.recent) or not any(contexts):
        return False
    return sum(queries) <= FEW_FRESH_TOKENS and sum(contexts) + sum(queries) <= rules.workspace_tokens


def _causal_slices(
    rules: PlanRules, maker: "_SliceMaker", contexts: list[int], begins: list[int]
) -> tuple[list[CacheSlice], list[CacheSlice]]:
    """Slices of whole requests from their token ``begins`` on, and what of each the recent window holds, if that is
    read under a mask of its own."""
    queries = maker.queries
    lengths = [length + query - begin for length, query, begin in zip(contexts, queries, begins, strict=True)]
    kept = None if rules.recent is None else [min(length, rules.recent - 1) for length in contexts]
    causal: list[CacheSlice] = []
    newest: list[CacheSlice] = []
    for first, last in maker.whole_requests(lengths, rules.workspace_tokens):
        if rules.recent is None or not rules.attend_cached:
            causal.append(maker.slice(first, last, begins, lengths, not rules.attend_cached, kept))
            continue
        assert kept is not None
        older = [max(0, length - rules.recent) for length in lengths]
        causal.append(maker.slice(first, last, begins, older, False))
        firsts = [length - tokens for length, tokens in zip(contexts, kept, strict=True)]
        both = [tokens + query for tokens, query in zip(kept, queries, strict=True)]
        newest.append(maker.slice(first, last, firsts, both, True, kept))
    return causal, newest


def _context_slices(rules: PlanRules, maker: "_SliceMaker", ends: list[int]) -> Iterator[CacheSlice]:
    """Slices of every request's first ``ends`` tokens, an equal share of each."""
    if not any(ends):
        return
    share = max(rules.workspace_tokens // sum(length > 0 for length in ends) // rules.block_size, 1) * rules.block_size
    for begin in range(0, max(ends), share):
        lengths = [max(0, min(share, length - begin)) for length in ends]
        yield maker.slice(0, len(ends), [begin] * len(ends), lengths, False)


def short_prefills(query_start_loc: torch.Tensor, seq_lens: torch.Tensor, first: int, count: int) -> list[int]:
    """Query tokens of those among the first of a batch's prefills that are best served as decodes are.

    That is, few tokens over a context: what is left of a prompt that the prefix cache holds. The decode kernel reads
    the context as it is stored, in one launch for the whole batch, where a prefill takes several from the host.

    Args:
        query_start_loc: [>= first + count + 1] int32 on the host.
        seq_lens: [>= first + count] on the host, exact for prefills.
        first: the first prefill of the batch.
        count: prefills.
    """
    lens: list[int] = []
    left = SHORT_PREFILL_TOKENS
    # More requests than these have no room.
    last = first + min(count, SHORT_PREFILL_TOKENS)
    starts, ends = query_start_loc[first : last + 1].tolist(), seq_lens[first:last].tolist()
    for begin, end, length in zip(starts, starts[1:], ends, strict=False):
        query_len = end - begin
        left -= query_len
        if query_len > MAX_DECODE_QUERY_LEN or length <= query_len or left < 0:
            break
        lens.append(query_len)
    return lens


def workspace_rows(requested: int, max_num_batched_tokens: int, window: int | None) -> int:
    """Rows the workspace needs: as requested, but never less than one whole batch of fresh tokens and one window, the
    sliding one or else the recent one."""
    return max(requested, max_num_batched_tokens + (window or 1) - 1)


class _SliceMaker:
    """Builds slices of requests whose query tokens begin at ``starts`` and count ``queries``."""

    def __init__(
        self, starts: list[int], queries: list[int], first_request: int, device: torch.device, sink_tokens: int
    ) -> None:
        self.starts, self.queries, self.first_request, self.device = starts, queries, first_request, device
        self.sink_tokens = sink_tokens

    def slice(
        self, first: int, last: int, begins: list[int], lengths: list[int], fresh: bool, recent: list[int] | None = None
    ) -> CacheSlice:
        """Requests ``first .. last - 1``; ``recent`` counts their tokens before the fresh ones that the window has."""
        queries, lengths, begins = self.queries[first:last], lengths[first:last], begins[first:last]
        ends = torch.tensor(lengths).cumsum(0)
        part = self._slice(first, queries, begins, lengths)
        packed = lengths
        if fresh:
            # A request's fresh tokens are the last rows of its stretch of the workspace, before them the window's.
            part = replace(part, fresh_rows=self._rows(ends, queries))
            packed = [length - query for length, query in zip(lengths, queries, strict=True)]
        if recent is not None:
            counts = recent[first:last]
            packed = [length - count for length, count in zip(packed, counts, strict=True)]
            firsts = [begin + length for begin, length in zip(begins, packed, strict=True)]
            rows = self._rows(ends - torch.tensor(queries), counts)
            part = replace(part, recent=self._slice(first, queries, firsts, counts), recent_rows=rows)
        heads = [max(0, min(self.sink_tokens - begin, length)) for begin, length in zip(begins, packed, strict=True)]
        if any(heads):
            rows = self._rows(ends - torch.tensor(lengths) + torch.tensor(heads), heads)
            part = replace(part, sink_tokens=self._slice(first, queries, begins, heads), sink_rows=rows)
        return part

    def _rows(self, ends: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """The ``counts[i]`` rows before row ``ends[i]``, for each i."""
        many = torch.tensor(counts)
        shift = ends - many.cumsum(0)
        return to_device(torch.arange(sum(counts)) + shift.repeat_interleave(many), self.device)

    def _slice(self, first: int, queries: list[int], begins: list[int], lengths: list[int]) -> CacheSlice:
        return CacheSlice(
            first_request=self.first_request + first,
            cu_seq_lens=_cumulative(lengths, self.device),
            seq_starts=to_device(torch.tensor(begins, dtype=torch.int32), self.device),
            num_tokens=sum(lengths),
            max_len=max(lengths),
            first_token=self.starts[first],
            num_query_tokens=sum(queries),
            cu_query_lens=_cumulative(queries, self.device),
            max_query_len=max(queries),
        )

    @staticmethod
    def whole_requests(lengths: list[int], workspace_tokens: int) -> list[tuple[int, int]]:
        """Runs of requests that fit into the workspace together, each as its first and the one after its last."""
        runs, first = [], 0
        while first < len(lengths):
            last, total = first + 1, lengths[first]
            while last < len(lengths) and total + lengths[last] <= workspace_tokens:
                total += lengths[last]
                last += 1
            runs.append((first, last))
            first = last
        return runs


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32), device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A part of a plan, for the kernels to read."""
    if device.type == "cpu":
        return tensor
    # Pinned memory lets the copy run behind the host.
    return tensor.pin_memory().to(device, non_blocking=True)
