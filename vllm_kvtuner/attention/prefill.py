"""Prefill of one layer: on a GPU vLLM's FlashAttention on fresh keys and values, and on cached ones once they are
dequantized into a bounded workspace (prefill_plan.py), merged by log-sum-exp; on a CPU the reference. Triton's kernel
takes FlashAttention's place for heads that are too large for it."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from vllm_kvtuner.attention.both_ways import BothWays, Run, window_of_run
from vllm_kvtuner.attention.metadata import KVTunerMetadata, step_positions
from vllm_kvtuner.attention.prefill_plan import CacheSlice, PrefillPlan
from vllm_kvtuner.attention.segments import count_sinks, merged
from vllm_kvtuner.attention.window_kernels import LayerWindow
from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, KernelSet, Pages, Segment, Span
from vllm_kvtuner.kernels.gpu import flash_attention_in_triton
from vllm_kvtuner.kernels.reference.attention import attention_ref
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.kernels.reference.rows import read_back_ref
from vllm_kvtuner.pages.layout import MAX_HEAD_SIZE

MAX_FLASH_HEAD_SIZE = 512
"""Of FlashAttention 4; versions before it take heads up to MAX_HEAD_SIZE. vLLM only chooses it on cards where it takes
heads of the layer's size (``get_flash_attn_version``)."""


class Prefills(NamedTuple):
    """A batch, of which the prefills are wanted.

    Args:
        query: [num_tokens, num_heads, head_size], of the whole batch as all others here.
        key: [num_tokens, num_kv_heads, head_size], fresh.
        value: as key.
        pages: of the layer.
        metadata: with the plan of its prefills.
        clamp_pictures: the layer's sliding window holds within pictures too.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pages: Pages
    metadata: KVTunerMetadata
    clamp_pictures: bool = False

    @property
    def block_table(self) -> torch.Tensor:
        return self.metadata.block_table

    @property
    def plan(self) -> PrefillPlan:
        assert self.metadata.prefill is not None
        return self.metadata.prefill


class Prefill(Protocol):
    """Attention of the prefills of a batch."""

    def workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the scratch, so that it is counted before the cache is sized."""

    def warm_up(self) -> None:
        """Compile what would be compiled at the first prompt."""

    def __call__(self, batch: Prefills, output: torch.Tensor) -> None:
        """Attention of the prefills' tokens into their rows of output [num_tokens, num_heads, head_size]."""


class WorkspaceShape(NamedTuple):
    """Of the workspace that dequantized tokens go to.

    Args:
        tokens: at a time, at most.
        dtype: the model's.
        device: a GPU.
    """

    tokens: int
    dtype: torch.dtype
    device: torch.device


class Lengths(NamedTuple):
    """Of several requests' tokens: cumulative [num_reqs + 1] int32 on the device, and the longest."""

    cumulative: torch.Tensor
    longest: int


@dataclass(frozen=True)
class Flash:
    """vLLM's flash_attn_varlen_func for one layer.

    Args:
        scale: factor on the logits.
        logits_soft_cap: 0 for none.
        version: of FlashAttention, None where there is no choice.
    """

    scale: float
    logits_soft_cap: float
    version: int | None

    def __call__(self, **arguments: Any) -> Segment:
        """Attention; arguments as vLLM's."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        if self.version is not None:
            arguments["fa_version"] = self.version
        attended, lse = flash_attn_varlen_func(
            softmax_scale=self.scale, softcap=self.logits_soft_cap, return_softmax_lse=True, **arguments
        )[:2]
        return Segment(attended, lse)


@dataclass(frozen=True)
class PortableAttention:
    """The Triton kernel in place of :class:`Flash`, for a layer of a shape."""

    shape: AttentionShape

    def __call__(self, **arguments: Any) -> Segment:
        """Attention; arguments as vLLM's."""
        return flash_attention_in_triton(self.shape, arguments)


def attention_of_prompts(shape: AttentionShape, version: int | None) -> Flash | PortableAttention:
    """What attends over contiguous keys and values: FlashAttention, up to the head sizes that its version takes."""
    most = MAX_FLASH_HEAD_SIZE if version == 4 else MAX_HEAD_SIZE
    if shape.head_size > most:
        return PortableAttention(shape)
    return Flash(shape.scale, shape.logits_soft_cap, version)


class GpuPrefill:
    """Attention of the prefills of a batch.

    Args:
        kernels: of the layer.
        flash: attention over contiguous keys and values, as :func:`attention_of_prompts` gives.
        workspace: for dequantized tokens.
        window: the layer's recent window, if it has one.
    """

    def __init__(
        self,
        kernels: KernelSet,
        flash: Callable[..., Segment],
        workspace: WorkspaceShape,
        window: LayerWindow | None = None,
    ) -> None:
        self.kernels = kernels
        self.flash = flash
        self.workspace_shape = workspace
        self.window = window

    def workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of [workspace_tokens, num_kv_heads, head_size], shared by layers of one shape."""
        shape = self.kernels.shape
        return _workspace(self.workspace_shape, shape.num_kv_heads, shape.head_size)

    def warm_up(self) -> None:
        """Attention under every mask that plans ask for, where it is compiled when it is first called."""
        if not (
            isinstance(self.flash, PortableAttention) or (isinstance(self.flash, Flash) and self.flash.version == 4)
        ):
            return
        shape, (keys, values) = self.kernels.shape, self.workspace()
        query = keys.new_zeros(1, shape.num_heads, shape.head_size)
        lens = Lengths(torch.tensor([0, 1], dtype=torch.int32, device=keys.device), 1)
        sliding_window = self.kernels.span.sliding_window
        masks: set[tuple[bool, int | None]] = {(True, sliding_window)}
        if sliding_window is None:
            masks.add((False, None))
        if self.window is not None:
            recent = self.window.cache.window.tokens
            masks |= {(True, recent), (True, sliding_window and sliding_window - recent)}
        for causal, window in masks:
            self._attend(query, (keys[:1], values[:1]), lens, lens, causal, window)

    def __call__(self, batch: Prefills, output: torch.Tensor) -> None:
        """Attention of the prefills' tokens into their rows of output [num_tokens, num_heads, head_size]."""
        plan, sinks = batch.plan, batch.pages.sinks
        tokens = slice(plan.first_token, plan.first_token + plan.num_tokens)
        target = output[tokens]
        if plan.fresh:
            lens = Lengths(plan.cu_query_lens, plan.max_query_len)
            fresh, window = (batch.key[tokens], batch.value[tokens]), self.kernels.span.sliding_window
            result = self._attend(batch.query[tokens], fresh, lens, lens, causal=True, window=window)
        else:
            result = Segment.into(target)
        for part, newest in itertools.zip_longest(plan.causal, plan.newest):
            segment = self._whole_requests(batch, part, newest)
            first = part.first_token - plan.first_token
            rows = slice(first, first + part.num_query_tokens)
            result.output[rows] = segment.output
            if plan.context or sinks is not None or batch.metadata.mm_prefix_range is not None:
                result.lse[:, rows] = segment.lse
        for part in plan.context:
            context = self.attend_slice(batch, part, causal=False, window=None)
            result = merged(context, result)
        if batch.metadata.mm_prefix_range is not None:
            self._attend_ahead(batch, batch.metadata.mm_prefix_range, result)
        # At the end, once: FlashAttention's own sinks would count in every part, and not all of its versions have any.
        if sinks is not None:
            count_sinks(result, sinks, target)
        elif result.output is not target:
            target.copy_(result.output)

    def _attend_ahead(self, batch: Prefills, pictures: BothWays, result: Segment) -> None:
        """Merge into the prefills' attention that of pictures' tokens over later ones of their own."""
        window = window_of_run(self.kernels.span.sliding_window, batch.clamp_pictures, pictures.longest)
        lens, keys = Lengths(pictures.cu_lens, pictures.longest), pictures.key_rows
        fresh = batch.key[keys], batch.value[keys]
        ahead = self._attend(batch.query[pictures.query_rows], fresh, lens, lens, causal=True, window=window)
        rows = pictures.query_rows - batch.plan.first_token
        both = merged(Segment(result.output[rows], result.lse[:, rows].contiguous()), ahead)
        result.output[rows], result.lse[:, rows] = both.output, both.lse

    def _whole_requests(self, batch: Prefills, part: CacheSlice, newest: CacheSlice | None) -> Segment:
        """Attention of a slice's requests over it, under the causal mask, and over what the recent window holds."""
        sliding_window = self.kernels.span.sliding_window
        if newest is None:
            return self.attend_slice(batch, part, causal=True, window=sliding_window)
        assert self.window is not None
        recent = self.window.cache.window.tokens
        held = None
        if part.num_tokens:
            older_window = sliding_window and sliding_window - recent
            held = self.attend_slice(batch, part, causal=True, window=older_window)
        segment = self.attend_slice(batch, newest, causal=True, window=recent)
        return segment if held is None else merged(held, segment)

    def attend_slice(self, batch: Prefills, part: CacheSlice, causal: bool, window: int | None) -> Segment:
        """Attention of a slice's requests over it."""
        rows = slice(part.first_token, part.first_token + part.num_query_tokens)
        query_lens = Lengths(part.cu_query_lens, part.max_query_len)
        key_lens = Lengths(part.cu_seq_lens, part.max_len)
        return self._attend(batch.query[rows], self._cached(batch, part), query_lens, key_lens, causal, window)

    def _cached(self, batch: Prefills, part: CacheSlice) -> tuple[torch.Tensor, torch.Tensor]:
        """A slice in the workspace, with what is fresh or in the recent window in its place."""
        keys, values = (workspace[: part.num_tokens] for workspace in self.workspace())
        if part.needs_packed:
            self.kernels.gather(batch.pages, part.of(batch.block_table), keys, values)
        rows = slice(part.first_token, part.first_token + part.num_query_tokens)
        if part.fresh_rows is not None:
            keys.index_copy_(0, part.fresh_rows, batch.key[rows])
            values.index_copy_(0, part.fresh_rows, batch.value[rows])
        for held, places in ((part.recent, part.recent_rows), (part.sink_tokens, part.sink_rows)):
            if held is not None and held.num_tokens:
                assert self.window is not None and places is not None
                held_keys, held_values = (x.new_empty(held.num_tokens, *x.shape[1:]) for x in (keys, values))
                self.window.read(held, held_keys, held_values, batch.pages.transforms)
                keys.index_copy_(0, places, held_keys)
                values.index_copy_(0, places, held_values)
        return keys, values

    def _attend(
        self,
        query: torch.Tensor,
        cached: tuple[torch.Tensor, torch.Tensor],
        query_lens: Lengths,
        key_lens: Lengths,
        causal: bool,
        window: int | None,
    ) -> Segment:
        """Attention over keys and values."""
        return self.flash(
            q=query,
            k=cached[0],
            v=cached[1],
            cu_seqlens_q=query_lens.cumulative,
            cu_seqlens_k=key_lens.cumulative,
            max_seqlen_q=query_lens.longest,
            max_seqlen_k=key_lens.longest,
            causal=causal,
            window_size=[-1, -1] if window is None else [window - 1, 0],
        )


class ReferencePrefill:
    """Attention of the prefills of a batch on a CPU: one request at a time, over what it needs of the cache,
    dequantized, before its fresh tokens.

    Args:
        kernels: of the layer.
        attend_cached: fresh tokens too are read back from the cache.
        window: the layer's recent window, if it has one.
    """

    def __init__(self, kernels: ReferenceKernels, attend_cached: bool, window: LayerWindow | None = None) -> None:
        self.kernels = kernels
        self.attend_cached = attend_cached
        self.window = window

    def workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing is shared between calls."""
        return torch.empty(0), torch.empty(0)

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def __call__(self, batch: Prefills, output: torch.Tensor) -> None:
        """As :class:`GpuPrefill`."""
        starts, lens = batch.metadata.query_start_loc.tolist(), batch.metadata.seq_lens.tolist()
        for request in range(batch.metadata.num_decodes, len(lens)):
            rows = slice(starts[request], starts[request + 1])
            self._attend(batch, _Prompt(request, rows, lens[request]), output[rows])

    def _attend(self, batch: Prefills, prompt: "_Prompt", output: torch.Tensor) -> None:
        """Attention of one request's fresh tokens."""
        shape, span = self.kernels.shape, self.kernels.span
        fresh = batch.key[prompt.rows], batch.value[prompt.rows]
        first = 0
        if span.sliding_window is not None:
            first = max(0, prompt.length - prompt.num_queries - span.sliding_window + 1)
        cached_end = prompt.length if self.attend_cached else prompt.length - prompt.num_queries
        keys, values = (rows.new_empty(prompt.length - first, *rows.shape[1:]) for rows in fresh)
        if cached_end > first:
            tokens = prompt.tokens(batch.block_table, first, cached_end)
            self.kernels.gather(batch.pages, tokens, keys, values)
        if not self.attend_cached:
            keys[-prompt.num_queries :], values[-prompt.num_queries :] = fresh
        query, sinks = batch.query[prompt.rows], batch.pages.sinks
        pictures = [] if batch.metadata.mm_prefix_range is None else batch.metadata.mm_prefix_range.runs
        pictures = [run for run in pictures if run.request == prompt.request]
        if self.window is None and sinks is None and not pictures:
            attention_ref(query, keys, values, shape, span, output)
            return
        if self.window is not None:
            self._put_sink_tokens(batch, prompt, first, cached_end, (keys, values))
        attended = Segment.into(torch.empty(query.shape))
        # Sink tokens are among the keys.
        attention_ref(query, keys, values, shape, span._replace(skip_first=0), attended.output, attended.lse)
        if self.window is not None:
            newest = Segment.into(torch.empty(query.shape))
            keys, values = self._newest(batch, prompt, fresh)
            recent = Span(self.window.cache.window.tokens)
            attention_ref(query, keys, values, shape, recent, newest.output, newest.lse)
            attended = merged(attended, newest)
        for run in pictures:
            self._attend_ahead(batch, prompt, run, attended)
        if sinks is None:
            output.copy_(attended.output)
        else:
            count_sinks(attended, sinks, output)

    def _attend_ahead(self, batch: Prefills, prompt: "_Prompt", run: Run, attended: Segment) -> None:
        """As :meth:`GpuPrefill._attend_ahead`, of one picture of a prompt."""
        window = window_of_run(self.kernels.span.sliding_window, batch.clamp_pictures, run.num_queries)
        queries = torch.arange(run.last - 1, run.first - 1, -1)
        query, key, value = batch.query[queries], batch.key[queries + 1], batch.value[queries + 1]
        ahead = Segment.into(torch.empty(query.shape))
        attention_ref(query, key, value, self.kernels.shape, Span(window), ahead.output, ahead.lse)
        rows = queries - prompt.rows.start
        both = merged(Segment(attended.output[rows], attended.lse[:, rows]), ahead)
        attended.output[rows], attended.lse[:, rows] = both.output, both.lse

    def _put_sink_tokens(
        self,
        batch: Prefills,
        prompt: "_Prompt",
        first: int,
        end: int,
        cached: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Put a request's sink tokens in place of those that were read packed.

        Args:
            batch: of the request.
            prompt: the request.
            first: the first of the tokens in ``cached``.
            end: the first token that was not read packed.
            cached: keys and values of the request's tokens from ``first`` on.
        """
        assert self.window is not None
        count = max(0, min(self.window.cache.window.sink_tokens, end) - first)
        self._read_window(batch, prompt, first, (cached[0][:count], cached[1][:count]))

    def _newest(
        self, batch: Prefills, prompt: "_Prompt", fresh: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the queries see of the recent window, those of the queries' own tokens the last."""
        assert self.window is not None
        window = self.window.cache.window
        if self.attend_cached and window.pair.is_quantized:
            positions = step_positions(batch.metadata, batch.pages.transforms)
            positions = None if positions is None else positions[..., prompt.rows]
            fresh = read_back_ref(fresh[0], fresh[1], positions, window.pair, batch.pages.transforms)
        context = prompt.length - prompt.num_queries
        begin = max(0, context - window.tokens + 1)
        held = context - begin
        keys, values = (torch.empty(held + prompt.num_queries, *rows.shape[1:]) for rows in fresh)
        self._read_window(batch, prompt, begin, (keys[:held], values[:held]))
        keys[held:], values[held:] = fresh
        return keys, values

    def _read_window(
        self, batch: Prefills, prompt: "_Prompt", first: int, rows: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """As many of a request's tokens from ``first`` on as keys and values have rows."""
        assert self.window is not None and self.window.cache.metadata is not None
        tokens = prompt.tokens(self.window.cache.metadata.block_table, first, first + len(rows[0]))
        self.window.read_tokens(tokens, rows[0], rows[1], batch.pages.transforms)


class _Prompt(NamedTuple):
    """One request of a batch.

    Args:
        request: its index.
        rows: of its fresh tokens among the batch's.
        length: its tokens, the fresh ones included.
    """

    request: int
    rows: slice
    length: int

    @property
    def num_queries(self) -> int:
        return self.rows.stop - self.rows.start

    def tokens(self, block_table: torch.Tensor, first: int, end: int) -> CachedTokens:
        """Its tokens ``first .. end - 1`` in a cache."""
        bounds = torch.tensor([0, end - first], dtype=torch.int32)
        begin = torch.tensor([first], dtype=torch.int32)
        return CachedTokens(block_table[self.request : self.request + 1], bounds, begin, end - first)


@functools.cache
def _workspace(workspace: WorkspaceShape, num_kv_heads: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = (
        torch.empty(workspace.tokens, num_kv_heads, head_size, dtype=workspace.dtype, device=workspace.device)
        for _ in range(2)
    )
    return keys, values
