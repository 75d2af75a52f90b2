"""The attention implementation of a quantized layer: which kernel serves which tokens of the batch.

Decodes read the packed pages, prefills go by prefill.py. Where the layer has a recent window, attention over it is
merged with that over the pages. All of it is asked of three interfaces (KernelSet, Prefill, LayerWindow), which are
implemented for a CPU and for a GPU.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType, max_decode_query_len

from vllm_kvtuner import envs
from vllm_kvtuner.attention.context_parallel import ContextShards
from vllm_kvtuner.attention.metadata import KVTunerMetadata, metadata_of, step_positions
from vllm_kvtuner.attention.prefill import (
    GpuPrefill,
    Prefill,
    Prefills,
    ReferencePrefill,
    WorkspaceShape,
    attention_of_prompts,
)
from vllm_kvtuner.attention.prefill_plan import workspace_rows
from vllm_kvtuner.attention.sharded_prefill import ShardedPrefill, ShardedReferencePrefill
from vllm_kvtuner.attention.step_packing import StepPacking, step_packing
from vllm_kvtuner.attention.window_cache import RecentCache
from vllm_kvtuner.attention.window_kernels import GpuWindow, LayerWindow, ReferenceWindow
from vllm_kvtuner.engine.config import recent_block_size
from vllm_kvtuner.kernels.contract import (
    AttentionShape,
    BatchLimits,
    CachedTokens,
    KernelSet,
    LatePacking,
    Pages,
    Segment,
    Span,
    StepRows,
)
from vllm_kvtuner.kernels.cpu.kernels import cpu_kernels
from vllm_kvtuner.kernels.gpu import GpuKernels, prove
from vllm_kvtuner.kernels.self_test_cases import Case
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.profile import LayerPrecision


@dataclass(frozen=True)
class LayerSettings:
    """What the profile says of one layer, handed to its implementation.

    Args:
        precision: pair, shape and transforms of the layer.
        attend_cached_prefill: prefill reads back what it stored.
    """

    precision: LayerPrecision
    attend_cached_prefill: bool


class Served(NamedTuple):
    """Who serves a layer, all on a CPU or all on a GPU.

    Args:
        kernels: store, gather and decode.
        prefill: of prompts.
        window: the layer's recent window, if it has one.
    """

    kernels: KernelSet
    prefill: Prefill
    window: LayerWindow | None


class PackedLate(NamedTuple):
    """How a layer's tokens are packed at the end of a step whose tokens its window holds.

    Args:
        name: of its window.
        packing: of the engine.
        kernels: the two parts of its store.
    """

    name: str
    packing: StepPacking
    kernels: LatePacking


class KVTunerImpl(AttentionImpl[KVTunerMetadata]):
    """Attention of one layer over packed pages. Constructed by vLLM's Attention layer; see AttentionImpl."""

    can_return_lse_for_decode = True
    supports_dcp = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        *,
        settings: LayerSettings,
    ) -> None:
        where = f"layer {settings.precision.index}"
        if alibi_slopes is not None:
            raise ValueError(f"{where}: ALiBi slopes are not served by the kvtuner cache; give the layer K16V16")
        # vLLM and layers that are made from this one read these.
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        # Never a copy: the model's weights, these among them, are loaded later, and may be again.
        self.sinks = sinks

        self.attend_cached_prefill = settings.attend_cached_prefill
        sink_type = None if sinks is None else sinks.dtype
        self.config = config = get_current_vllm_config()
        self.own_shape = AttentionShape(
            num_heads, self.num_kv_heads, head_size, self.scale, self.logits_soft_cap, sink_type
        )
        if sinks is not None and self.dcp_world_size > 1:
            rule = "decode_context_parallel_size must be 1 beside attention sinks, which each rank would count"
            raise ValueError(f"{where}: {rule}, but got {self.dcp_world_size}")
        self.shards = ContextShards.of(config) if self.dcp_world_size > 1 else None
        # Of what the cache is read with: under context parallelism, the heads of all ranks.
        self.shape = self.own_shape if self.shards is None else self.shards.whole(self.own_shape)
        # Of a recent window's own pages: those of the layer count its sinks.
        self._window_shape = self.shape._replace(sinks=None)
        self.dtype = config.model_config.dtype
        self.limits = BatchLimits(config.scheduler_config.max_num_seqs, max_decode_query_len(config))
        self.max_num_batched_tokens = config.scheduler_config.max_num_batched_tokens
        self._pages: tuple[torch.Tensor, Pages] | None = None
        self._late: PackedLate | None = None
        self._serve(None)
        self.configure(settings)

    def take_window(self, cache: RecentCache) -> None:
        """Read the newest tokens from a recent window; before the model is loaded."""
        self._serve(cache)

    def _serve(self, cache: RecentCache | None) -> None:
        """Choose who serves the layer: compiled C++ or the reference on a CPU, kernels on a GPU."""
        span = Span(self.sliding_window)
        if cache is not None:
            span = Span(self.sliding_window, cache.window.tokens, cache.window.sink_tokens)
        before = span.sliding_window or span.skip_newest or None
        requested = envs.prefill_workspace_tokens()
        self.prefill_workspace_tokens = workspace_rows(requested, self.max_num_batched_tokens, before)
        self.served = self._on_cpu(span, cache) if current_platform.is_cpu() else self._on_gpu(span, cache)

    def _on_cpu(self, span: Span, cache: RecentCache | None) -> Served:
        kernels = cpu_kernels(self.shape, span)
        if self.shards is not None:
            return Served(kernels, ShardedReferencePrefill(self.shards, self.own_shape, kernels), None)
        window = None
        if cache is not None:
            packed = cpu_kernels(self._window_shape, Span(cache.window.tokens))
            window = ReferenceWindow(cache, kernels, packed)
        return Served(kernels, ReferencePrefill(kernels, self.attend_cached_prefill, window), window)

    def _on_gpu(self, span: Span, cache: RecentCache | None) -> Served:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        device = torch.device(current_platform.device_type, current_platform.current_device())
        write_lse = cache is not None or self.shards is not None
        kernels = GpuKernels(self.shape, span, self.limits, device, write_lse, self.dtype)
        window = None
        if cache is not None:
            span = Span(cache.window.tokens)
            packed = GpuKernels(self._window_shape, span, self.limits, device, True, self.dtype)
            window = GpuWindow(cache, kernels, packed)
        version = get_flash_attn_version(head_size=self.head_size, requires_softcap=self.logits_soft_cap > 0)
        flash = attention_of_prompts(self.shape, version)
        workspace = WorkspaceShape(self.prefill_workspace_tokens, self.dtype, device)
        prefill = GpuPrefill(kernels, flash, workspace, window)
        if self.shards is not None:
            fresh = attention_of_prompts(self.own_shape, version)
            return Served(kernels, ShardedPrefill(self.shards, fresh, prefill), None)
        return Served(kernels, prefill, window)

    @property
    def recent_window(self) -> RecentCache | None:
        """The cache of the layer's recent window, if it has one."""
        return None if self.served.window is None else self.served.window.cache

    def configure(self, settings: LayerSettings) -> None:
        """Take over the layer's pair and transforms; where those need the model, bind_statics completes them."""
        self.settings = settings
        chosen = settings.precision.transforms
        self.needs_model = chosen.needs_model
        self._transform(
            LayerTransforms(
                key_hadamard=chosen.key_hadamard,
                value_hadamard=chosen.value_hadamard,
                range_search=chosen.range_search,
            )
        )

    def bind_statics(self, transforms: LayerTransforms) -> None:
        """Take over the layer's transforms, statics and rotary table included, once the model is loaded."""
        self.needs_model = False
        self._transform(transforms)

    def _transform(self, transforms: LayerTransforms) -> None:
        """The transforms have changed, and with them the kernels, perhaps."""
        self.transforms = transforms
        self._pages = None
        self.served.kernels.forget()
        if self.served.window is not None:
            self.served.window.packed.forget()
        if self._late is not None:
            self._late.packing.leave(self._late.name)
        self._late = self._pack_late()

    def _pack_late(self) -> PackedLate | None:
        """None for a layer that packs its tokens at once: any that has no window which holds a step's tokens as they
        are, or another's cache, or a store that is not worth the wait (KernelSet.late_packing)."""
        cache = self.recent_window
        if cache is None or cache.is_packed or cache.window.tokens < self.limits.max_decode_query_len:
            return None
        if self.kv_sharing_target_layer_name is not None:
            return None
        kernels = self.served.kernels.late_packing(self.settings.precision.pair, self.transforms)
        if kernels is None or (packing := step_packing(self.config)) is None:
            return None
        packing.join(cache.layer_name)
        return PackedLate(cache.layer_name, packing, kernels)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self._prove_kernels()
        # While the model loads, so that vLLM counts the workspaces before it sizes the cache.
        self.served.prefill.workspace()
        precision = self.settings.precision
        names = precision.transforms.names
        self.served.kernels.reserve(precision.pair, self.transforms, names)
        if (window := self.served.window) is not None and window.cache.is_packed:
            window.packed.reserve(window.cache.window.pair, self.transforms, names)

    def _prove_kernels(self) -> None:
        """Test the kernels of all layers before the first of them chooses, so that at most one process is started."""
        if not isinstance(kernels := self.served.kernels, GpuKernels):
            return
        layers = self.config.compilation_config.static_forward_context.values()
        implementations = (getattr(layer, "impl", None) for layer in layers)
        cases = (each.test_cases() for each in implementations if isinstance(each, KVTunerImpl))
        prove([case for of_layer in cases for case in of_layer], kernels.device)

    def test_cases(self) -> list[Case]:
        """What the layer's GPU kernels are tested on, its window's included."""
        precision, block_size = self.settings.precision, self.config.cache_config.block_size
        names, window = precision.transforms.names, self.served.window
        # Windows of another block size than vLLM's are served by kernels of that size.
        size = block_size if window is None else recent_block_size(self.config, window.cache.window)
        rows_of = 0 if window is None or window.cache.is_packed else size
        kernels = self.served.kernels
        assert isinstance(kernels, GpuKernels)
        cases = [kernels.test_case(PageLayout(precision.pair, self.head_size, block_size), names, rows_of)]
        if window is not None and window.cache.is_packed:
            assert isinstance(window.packed, GpuKernels)
            cases.append(window.packed.test_case(PageLayout(window.cache.window.pair, self.head_size, size), names))
        return cases

    def warm_up(self, kv_cache: torch.Tensor) -> None:
        """Compile the kernels of this layer, at the row counts that they tell apart, without storing anything."""
        kernels, prefill, window = self.served
        workspace = prefill.workspace()
        rows = None if window is None or window.cache.is_packed else window.cache.kv_cache
        kernels.warm_up(self.pages(kv_cache), workspace, rows)
        prefill.warm_up()
        if window is not None:
            window.warm_up(self.transforms, workspace)

    def wake_up(self) -> None:
        """Make scratch ready again after a sleep of level 2, which discards it."""
        self.served.kernels.wake_up()
        if self.served.window is not None:
            self.served.window.packed.wake_up()

    def pages(self, kv_cache: torch.Tensor) -> Pages:
        """The layer's pages; kv_cache is the same object in every step of an engine."""
        if self._pages is None or self._pages[0] is not kv_cache:
            layout = _page_layout(self.settings.precision.pair, self.head_size, kv_cache.shape[2])
            self._pages = kv_cache, Pages(self.view(kv_cache, layout), layout, self.transforms, self.sinks)
        return self._pages[1]

    def view(self, kv_cache: torch.Tensor, layout: PageLayout) -> torch.Tensor:
        """What of vLLM's tensor the pages are: all of it."""
        return kv_cache

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store key and value [num_tokens, num_kv_heads, head_size] at slot_mapping [<= num_tokens]."""
        assert not self.needs_model, "transforms are complete when the model is loaded"
        positions = None
        if self.transforms.key_offset is not None:
            positions = step_positions(metadata_of(layer.layer_name), self.transforms)
        rows = None
        if (window := self.served.window) is not None:
            window.store(key, value, positions, self.transforms)
            rows = window.rows()
        pages = self.pages(kv_cache)
        if self._late is not None and rows is not None:
            name, packing, kernels = self._late
            packing.check()
            if self._window_holds_step():
                kernels.keep_rows(key, value, rows)
                packing.add(name, StepRows(pages, rows, slot_mapping, positions))
                return
        # Last, because decoding may begin while this store ends, and not while another's kernel does.
        self.served.kernels.store(key, value, slot_mapping, positions, pages, rows)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: KVTunerMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [num_tokens, num_heads, head_size] into output, of the same shape.

        Key and value are None where the step's tokens are in the cache already, from another pass or layer.
        """
        assert output_scale is None and output_block_scale is None, "fused output quantization is not advertised"
        if attn_metadata is None:  # profiling and warm-up
            return output.fill_(0)
        pages = self.pages(kv_cache)
        if attn_metadata.num_decodes:
            self._decode(query, pages, attn_metadata, output)
        if attn_metadata.prefill is not None:
            if key is None or value is None:
                key, value = self._stored(query, pages, attn_metadata)
            clamped = getattr(layer, "mm_prefix_clamp_sliding_window", False)
            self.served.prefill(Prefills(query, key, value, pages, attn_metadata, clamped), output)
        if self._late is not None and self._window_holds_step():
            name, packing, kernels = self._late
            if rows := packing.attended(name):
                kernels.pack_rows(rows)
        return output

    def _stored(
        self, query: torch.Tensor, pages: Pages, metadata: KVTunerMetadata
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_tokens, num_kv_heads, head_size] of the prefills' new tokens, read back."""
        assert metadata.prefill is not None
        keys, values = (query.new_empty(query.shape[0], self.num_kv_heads, self.head_size) for _ in range(2))
        plan, first = metadata.prefill, metadata.num_decodes
        rows = slice(plan.first_token, plan.first_token + plan.num_tokens)
        lengths = plan.cu_query_lens.diff()
        starts = metadata.seq_lens[first : first + len(lengths)] - lengths
        blocks = metadata.block_table[first : first + len(lengths)]
        tokens = CachedTokens(blocks, plan.cu_query_lens, starts.to(torch.int32), plan.num_tokens)
        self.served.kernels.gather(pages, tokens, keys[rows], values[rows])
        return keys, values

    def _window_holds_step(self) -> bool:
        """Whether the layer's window holds all tokens of the batch in flight, so that they may be packed at its end."""
        assert self.recent_window is not None
        metadata = self.recent_window.metadata
        return metadata is not None and metadata.holds_step

    def _decode(self, query: torch.Tensor, pages: Pages, metadata: KVTunerMetadata, output: torch.Tensor) -> None:
        tokens = metadata.num_decode_tokens
        if tokens < query.shape[0]:
            query, output = query[:tokens], output[:tokens]
        kernels, _, window = self.served
        if self.shards is not None:
            part = Segment.into(torch.empty_like(query := self.shards.queries(query)))
            kernels.attend(query, metadata.decodes, pages, part.output, part.lse)
            # One query of each request. A kernel need not write anything for those that have nothing on this rank.
            part.lse.masked_fill_(metadata.decodes.seq_lens == 0, -torch.inf)
            output.copy_(self.shards.combine(part).output)
            return
        if window is None:
            kernels.attend(query, metadata.decodes, pages, output)
            return
        older = window.room_for_older(output)
        kernels.attend(query, metadata.decodes, pages, older.output, older.lse)
        window.merge(query, metadata, pages.transforms, older, output)


_page_layout = functools.cache(PageLayout)
