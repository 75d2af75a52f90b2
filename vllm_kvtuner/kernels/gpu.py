"""The GPU kernels of one layer: which of them serve it, and the scratch that they share with other layers."""

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from vllm_kvtuner.kernels import choice, self_test, trial
from vllm_kvtuner.kernels.contract import (
    AttentionShape,
    BatchLimits,
    CachedTokens,
    GatherCache,
    LatePacking,
    Launch,
    Pages,
    Queries,
    ReshapeAndCache,
    Segment,
    Span,
    StepRows,
    WindowRows,
)
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN, SHORT_PREFILL_TOKENS
from vllm_kvtuner.kernels.self_test_cases import Case, random_transforms, transform_names
from vllm_kvtuner.kernels.self_test_errors import Errors
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms

WARM_UP_ROWS = 1 << 15
"""(token, KV head) rows of a prefill that takes the store kernel's variant for many rows."""
OVERLAP_CAPABILITY = (9, 0)
"""Compute capability from which a kernel can begin while the one before it ends."""


class GpuKernels:
    """Store, gather and decode of a layer whose pair and transforms may change between calls: a KernelSet.

    Args:
        shape: of the layer's attention.
        span: cached tokens that decoding serves.
        limits: of batches.
        device: a GPU.
        write_lse: decoding gives the log-sum-exp too.
        dtype: of the model.
        kernels: ``cuda`` to serve by CUDA's, right or wrong, as their self-test does; None for what is chosen.
    """

    def __init__(
        self,
        shape: AttentionShape,
        span: Span,
        limits: BatchLimits,
        device: torch.device,
        write_lse: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        kernels: str | None = None,
    ) -> None:
        self.shape = shape
        self.span = span
        self.limits = limits
        self.device = device
        self.write_lse = write_lse
        self.dtype = dtype
        self._given = kernels
        self._arrivals: torch.Tensor | None = None
        self.forget()

    def forget(self) -> None:
        """Choose anew at the next call: the layer's pair or transforms have changed."""
        self.decode_kernel: str | None = None
        self._decode: Any = None
        self._launches: dict[int, Launch] = {}
        self._rows: _RowKernels | None = None

    def test_case(self, layout: PageLayout, transforms: tuple[str, ...], window_block_size: int = 0) -> Case:
        """What the layer's kernels are tested on: with pages of a layout and the transforms of these names."""
        shape, limits, span = self.shape, self.limits, self.span
        return Case(layout, shape, limits, span, transforms, self.dtype, self.write_lse, window_block_size)

    def reserve(self, pair: PrecisionPair, transforms: LayerTransforms, names: tuple[str, ...]) -> None:
        """Take the decode kernel's scratch; a key offset may leave the layer to the portable kernel later."""
        layout = PageLayout(pair, self.shape.head_size, BLOCK_SIZE_MULTIPLE)
        kernel = self._choose(layout, transforms, names)
        workspace = self._workspace(kernel)
        self._arrivals = workspace.arrivals if kernel == choice.CUDA else None
        if "key_offset" in names:
            self._workspace(choice.TRITON)

    def wake_up(self) -> None:
        """Make the scratch ready again. A sleep of level 2 discards what lies beside the weights, as it does."""
        if self._arrivals is not None:
            self._arrivals.zero_()

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None,
        pages: Pages,
        window: WindowRows | None = None,
    ) -> None:
        """As the contract's ReshapeAndCache."""
        self._row_kernels(pages).reshape_and_cache(key, value, slot_mapping, positions, pages, window)

    def late_packing(self, pair: PrecisionPair, transforms: LayerTransforms) -> LatePacking | None:
        """By CUDA, for layers with round feedback on a side at least; Triton's store takes all at once."""
        if not transforms.rounds_with_feedback(pair):
            return None
        layout = PageLayout(pair, self.shape.head_size, BLOCK_SIZE_MULTIPLE)
        # As what it is, a layer with a window, so that both parts are tested where nobody has asked before.
        case = self.test_case(layout, transform_names(transforms), BLOCK_SIZE_MULTIPLE)
        kernels = self._given or choice.row_kernels(
            layout, self.device, lambda: prove([case], self.device).failure, transforms
        )
        return _row_kernels(kernels).late

    def gather(self, pages: Pages, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor) -> None:
        """As the contract's GatherCache."""
        self._row_kernels(pages).gather_cache(pages, tokens, key_out, value_out)

    def attend(
        self,
        query: torch.Tensor,
        queries: Queries,
        pages: Pages,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """As the contract's PagedAttention, with the layer's shape and span; ``lse`` if the layer has one."""
        assert (lse is not None) == self.write_lse
        if self._decode is None:
            names = transform_names(pages.transforms)
            self.decode_kernel = self._choose(pages.layout, pages.transforms, names)
            self._decode = _decode_module(self.decode_kernel)
        # Short prefills are few among decodes.
        pass_query_len = min(queries.max_query_len, self.limits.max_decode_query_len)
        launch = self._launches.get(pass_query_len)
        if launch is None:
            assert self.decode_kernel is not None
            # No kernel of the model writes what says where the tokens are.
            dependent, workspace = self.decode_kernel == choice.CUDA, self._workspace(self.decode_kernel)
            launch = self._launches[pass_query_len] = Launch(workspace, pass_query_len, dependent)
        self._decode.paged_attention(query, queries, pages, self.shape, self.span, output, lse, launch=launch)

    def merge_window(
        self,
        query: torch.Tensor,
        queries: Queries,
        rows: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """As the contract's WindowAttention, beside what :meth:`attend` has given."""
        pass_query_len = min(queries.max_query_len, self.limits.max_decode_query_len)
        launch = Launch(pass_query_len=pass_query_len, dependent=self._overlaps)
        _window_attention()(query, queries, rows, self.shape, self.span, output, lse, launch=launch)

    def warm_up(
        self, pages: Pages, workspace: tuple[torch.Tensor, torch.Tensor], window_rows: torch.Tensor | None = None
    ) -> None:
        """Compile the kernels at the row counts that they tell apart, without storing anything."""
        kv_heads, size, dtype = self.shape.num_kv_heads, self.shape.head_size, workspace[0].dtype
        for count, query_len in self.limits.batches:
            query, key, value = self._fused_rows(count * query_len, dtype)
            self._store_nothing(key, value, pages, window_rows)
            output = torch.empty_like(query, memory_format=torch.contiguous_format)
            self.attend(query, self.dummy_queries(count, query_len), pages, output, self.empty_lse(len(query)))
        rows = torch.zeros(WARM_UP_ROWS // kv_heads, kv_heads, size, dtype=dtype, device=self.device)
        self._store_nothing(rows, rows, pages, window_rows)
        ends = torch.tensor([0, 1], device=self.device).int()
        self.gather(pages, CachedTokens(self._integers(1, 16), ends, self._integers(1), 1), workspace[0], workspace[1])

    def warm_up_window(self, window_rows: torch.Tensor) -> None:
        """Compile :meth:`merge_window`, with a window's cache; nothing is written there."""
        for query_len in {1, self.limits.max_decode_query_len, MAX_DECODE_QUERY_LEN}:
            query, _, _ = self._fused_rows(query_len, window_rows.dtype)
            output = torch.zeros(query.shape, dtype=query.dtype, device=self.device)
            lse = torch.zeros(self.shape.num_heads, query_len, dtype=torch.float32, device=self.device)
            self.merge_window(query, self.dummy_queries(1, query_len), window_rows, output, lse)

    def dummy_queries(self, count: int, query_len: int) -> Queries:
        """``count`` requests of ``query_len`` tokens in block 0."""
        starts = torch.arange(0, count * query_len + 1, query_len, device=self.device).int()
        return Queries(self._integers(count, 16), self._integers(count, fill=query_len), starts, query_len)

    def empty_lse(self, num_tokens: int) -> torch.Tensor | None:
        """Room for the log-sum-exp, if decoding gives it."""
        if not self.write_lse:
            return None
        return torch.empty(self.shape.num_heads, num_tokens, dtype=torch.float32, device=self.device)

    def _fused_rows(self, num_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values as slices of one projection, as models give them."""
        heads, kv_heads, size = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_size
        fused = torch.zeros(num_tokens, heads + 2 * kv_heads, size, dtype=dtype, device=self.device)
        return fused.split([heads, kv_heads, kv_heads], dim=1)

    def _store_nothing(
        self, key: torch.Tensor, value: torch.Tensor, pages: Pages, window_rows: torch.Tensor | None
    ) -> None:
        """All at once, and in two parts where the layer may store so."""
        slots, positions = (self._integers(len(key), fill=fill, dtype=torch.int64) for fill in (-1, 0))
        if (several := pages.transforms.positions) is not None:
            positions = positions.expand(several.num_axes, -1)
        window = None if window_rows is None else WindowRows(window_rows, slots)
        self.store(key, value, slots, positions, pages, window)
        if window is not None and (late := self.late_packing(pages.layout.pair, pages.transforms)) is not None:
            late.keep_rows(key, value, window)
            late.pack_rows([StepRows(pages, window, slots, positions)])

    def _integers(self, *shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, fill, dtype=dtype, device=self.device)

    @functools.cached_property
    def _overlaps(self) -> bool:
        """Decoding begins after the layer's stores, so that all that it does not write itself is there by then."""
        capability = choice.device_capability(self.device)
        return capability is not None and capability >= OVERLAP_CAPABILITY

    def _choose(self, layout: PageLayout, transforms: LayerTransforms, names: tuple[str, ...]) -> str:
        if self._given is not None:
            return self._given
        soft_cap, sinks = self.shape.logits_soft_cap, self.shape.sinks is not None
        failure = self._failure(layout, names)
        return choice.decode_kernel(layout, transforms, soft_cap, self.device, self.write_lse, failure, sinks)

    def _failure(self, layout: PageLayout, transforms: tuple[str, ...]) -> choice.Failure:
        """Asks how the CUDA kernels fail on such a layer; answered at once where it was asked before."""
        return lambda: prove([self.test_case(layout, transforms)], self.device).failure

    def _row_kernels(self, pages: Pages) -> "_RowKernels":
        if self._rows is None:
            failure = self._failure(pages.layout, transform_names(pages.transforms))
            kernels = self._given or choice.row_kernels(pages.layout, self.device, failure, pages.transforms)
            self._rows = _row_kernels(kernels)
        return self._rows

    def _workspace(self, kernel: str) -> Any:
        """Scratch of the kernel's paged_attention."""
        # Layers with and without sinks share it.
        limits, shape = self.limits, self.shape._replace(sinks=None)
        if kernel == choice.CUDA:
            return _cuda_workspace(limits.max_num_seqs, limits.max_decode_query_len, shape, self.device)
        tokens = limits.max_num_seqs * limits.max_decode_query_len + SHORT_PREFILL_TOKENS
        return _triton_workspace(tokens, shape, self.device)


def prove(cases: Iterable[Case], device: torch.device) -> trial.Verdict:
    """Test the CUDA kernels on a card where they would serve; see :func:`vllm_kvtuner.kernels.trial.prove`."""
    capability = choice.device_capability(device)
    wanted = [case for case in cases if choice.may_take_cuda(case.layout, capability)]
    return trial.prove(wanted, device, measure_cuda, compile_cuda)


def measure_cuda(case: Case, device: torch.device) -> Errors:
    """Errors of the CUDA kernels on a case, through the launchers and the scratch that serve it."""
    kernels = GpuKernels(case.shape, case.span, case.limits, device, case.write_lse, case.dtype, choice.CUDA)
    transforms = random_transforms(case.transforms, case, torch.device("cpu"))
    return self_test.measure(case, kernels, device, _cuda_decodes(case, transforms, device))


def compile_cuda(cases: Iterable[Case], device: torch.device) -> dict[Case, Exception]:
    """Compile what :func:`measure_cuda` runs of all cases side by side; gives why, of cases of which some does not.

    Raises:
        ValueError: as :func:`vllm_kvtuner.kernels.cache_folder.make`.
    """
    from vllm_kvtuner.kernels.cuda.build import compile_side_by_side
    from vllm_kvtuner.kernels.cuda.case_sources import case_sources

    wanted = {}
    for case in cases:
        transforms = random_transforms(case.transforms, case, torch.device("cpu"))
        wanted[case] = case_sources(case, transforms, device, _cuda_decodes(case, transforms, device))
    failed = compile_side_by_side(itertools.chain.from_iterable(wanted.values()), device)
    errors = {case: [failed[source] for source in sources if source in failed] for case, sources in wanted.items()}
    return {case: found[0] for case, found in errors.items() if found}


def _cuda_decodes(case: Case, transforms: LayerTransforms, device: torch.device) -> bool:
    """Whether the CUDA kernels decode such a layer; their store and gather may serve where they do not."""
    from vllm_kvtuner.kernels.cuda.paged_attention import unsupported

    capability = choice.device_capability(device)
    assert capability is not None
    soft_cap, sinks = case.shape.logits_soft_cap, case.shape.sinks is not None
    return unsupported(case.layout, transforms, soft_cap, capability, case.write_lse, sinks) is None


class _RowKernels(NamedTuple):
    """Store and gather of one implementation, and the store in two parts if it has one."""

    reshape_and_cache: ReshapeAndCache
    gather_cache: GatherCache
    late: LatePacking | None = None


# Implementations are imported when a layer has chosen them: cuda-core is not installed on every GPU machine, nor Triton
# on every CPU, and a layer that is served by one must not need the other.


@functools.cache
def _row_kernels(kernels: str) -> _RowKernels:
    if kernels == choice.CUDA:
        from vllm_kvtuner.kernels.cuda import gather_cache as cuda_gather
        from vllm_kvtuner.kernels.cuda import keep_rows, pack_rows
        from vllm_kvtuner.kernels.cuda import reshape_and_cache as cuda_store

        late = LatePacking(keep_rows.keep_rows, pack_rows.pack_rows)
        return _RowKernels(cuda_store.reshape_and_cache, cuda_gather.gather_cache, late)
    from vllm_kvtuner.kernels.triton import gather_cache, reshape_and_cache

    return _RowKernels(reshape_and_cache.reshape_and_cache, gather_cache.gather_cache)


@functools.cache
def _decode_module(kernel: str) -> Any:
    """Where a kernel's paged_attention is."""
    if kernel == choice.CUDA:
        from vllm_kvtuner.kernels.cuda import paged_attention as cuda

        return cuda
    from vllm_kvtuner.kernels.triton import paged_attention

    return paged_attention


@functools.cache
def _window_attention() -> Any:
    from vllm_kvtuner.kernels.triton import window_attention

    return window_attention.window_attention


def flash_attention_in_triton(shape: AttentionShape, arguments: Mapping[str, Any]) -> Segment:
    """Attention of prompts by the portable kernel, with the arguments of vLLM's flash_attn_varlen_func."""
    from vllm_kvtuner.kernels.triton.prompt_attention import Prompts, prompt_attention

    prompts = Prompts(arguments["cu_seqlens_q"], arguments["cu_seqlens_k"], arguments["max_seqlen_q"])
    window, causal = arguments["window_size"][0] + 1, arguments["causal"]
    return prompt_attention(arguments["q"], arguments["k"], arguments["v"], prompts, shape, causal, window or None)


# Scratch that all layers of one shape share: layers run one after the other.


@functools.cache
def _cuda_workspace(max_num_reqs: int, max_query_len: int, shape: AttentionShape, device: torch.device) -> Any:
    from vllm_kvtuner.kernels.cuda.paged_attention import decode_workspace

    return decode_workspace(max_num_reqs, max_query_len, shape.num_heads, shape.num_kv_heads, shape.head_size, device)


@functools.cache
def _triton_workspace(max_num_tokens: int, shape: AttentionShape, device: torch.device) -> Any:
    from vllm_kvtuner.kernels.triton.paged_attention import decode_workspace

    return decode_workspace(max_num_tokens, shape.num_heads, shape.head_size, device)
