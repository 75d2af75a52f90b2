"""The attention implementation of a quantized layer: which kernel serves which tokens of the batch.

Decodes read the packed pages, prefills go by prefill.py. Where the layer has a recent window, attention over it is
merged with that over the pages. On a CPU the reference does all of it.
"""

import functools
from dataclasses import dataclass

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType, max_decode_query_len

from vllm_kvtuner import envs
from vllm_kvtuner.attention.metadata import KVTunerMetadata
from vllm_kvtuner.attention.prefill import Flash, GpuPrefill
from vllm_kvtuner.attention.prefill_plan import workspace_rows
from vllm_kvtuner.attention.window_cache import RecentCache
from vllm_kvtuner.attention.window_kernels import RecentKernels
from vllm_kvtuner.kernels.layer import LayerKernels
from vllm_kvtuner.kernels.reference.attention import attention_ref, merge_segments_ref, paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref, reshape_and_cache_ref
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


class KVTunerImpl(AttentionImpl[KVTunerMetadata]):
    """Attention of one layer over packed pages. Constructed by vLLM's Attention layer; see AttentionImpl."""

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
        if sinks is not None:
            raise ValueError(f"{where}: attention sinks are not served by the kvtuner cache; give the layer K16V16")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name

        self.attend_cached_prefill = settings.attend_cached_prefill
        config = get_current_vllm_config()
        self.dtype = config.model_config.dtype
        self.max_num_seqs = config.scheduler_config.max_num_seqs
        self.max_decode_query_len = max_decode_query_len(config)
        self.kernels: LayerKernels | None = None
        self.recent: RecentCache | None = None
        self.recent_kernels: RecentKernels | None = None
        self.max_num_batched_tokens = config.scheduler_config.max_num_batched_tokens
        self.prefill_workspace_tokens = workspace_rows(
            envs.prefill_workspace_tokens(), self.max_num_batched_tokens, sliding_window
        )
        self.prefill: GpuPrefill | None = None
        if not current_platform.is_cpu():
            self.kernels = self._layer_kernels(sliding_window)
            self.prefill = self._gpu_prefill(self.kernels)
        self.configure(settings)

    def _layer_kernels(
        self, window: int | None, skip_newest: int = 0, write_lse: bool = False, skip_first: int = 0
    ) -> LayerKernels:
        device = torch.device(current_platform.device_type, current_platform.current_device())
        return LayerKernels(
            self.num_heads, self.num_kv_heads, self.head_size, self.scale, window, self.logits_soft_cap,
            self.max_num_seqs, self.max_decode_query_len, device, skip_newest, write_lse, skip_first,
        )  # fmt: skip

    def _gpu_prefill(self, kernels: LayerKernels, recent: RecentKernels | None = None) -> GpuPrefill:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=self.head_size, requires_softcap=self.logits_soft_cap > 0)
        flash = Flash(self.scale, self.logits_soft_cap, version)
        return GpuPrefill(kernels, flash, self.prefill_workspace_tokens, self.dtype, recent)

    def take_window(self, recent: RecentCache) -> None:
        """Read the newest tokens from a recent window; before the model is loaded."""
        self.recent = recent
        tokens = recent.window.tokens
        self.prefill_workspace_tokens = workspace_rows(
            envs.prefill_workspace_tokens(), self.max_num_batched_tokens, self.sliding_window or tokens
        )
        if self.prefill is not None:
            sink_tokens = recent.window.sink_tokens
            self.kernels = self._layer_kernels(self.sliding_window, tokens, write_lse=True, skip_first=sink_tokens)
            newest = self._layer_kernels(tokens, write_lse=True)
            self.recent_kernels = RecentKernels(recent, newest, self.sliding_window)
            self.prefill = self._gpu_prefill(self.kernels, self.recent_kernels)

    def configure(self, settings: LayerSettings) -> None:
        """Take over the layer's pair and transforms; where those need statics, bind_statics completes them."""
        self.settings = settings
        self._forget()
        chosen = settings.precision.transforms
        self.needs_statics = chosen.needs_statics
        self.transforms = LayerTransforms(
            key_hadamard=chosen.key_hadamard,
            value_hadamard=chosen.value_hadamard,
            range_search=chosen.range_search,
        )

    def _forget(self) -> None:
        """The transforms have changed, and with them the kernels, perhaps."""
        for owner in (self, self.recent_kernels):
            if owner is not None and owner.kernels is not None:
                owner.kernels.forget()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        # While the model loads, so that vLLM counts the workspaces before it sizes the cache.
        if self.kernels is None:
            return
        assert self.prefill is not None
        self.prefill.workspace()
        precision = self.settings.precision
        self.kernels.reserve(precision.pair, self.transforms, precision.transforms.key_offset)
        if self.recent_kernels is not None and self.recent_kernels.packed:
            kernels = self.recent_kernels.kernels
            kernels.reserve(self.recent_kernels.recent.window.pair, self.transforms, precision.transforms.key_offset)

    def bind_statics(self, transforms: LayerTransforms) -> None:
        """Take over the layer's transforms, statics and rotary table included, once the model is loaded."""
        self.transforms = transforms
        self.needs_statics = False
        self._forget()

    def warm_up(self, kv_cache: torch.Tensor) -> None:
        """Compile the kernels of this layer, at the row counts that they tell apart, without storing anything."""
        if self.kernels is None:
            return
        assert self.prefill is not None
        workspace = self.prefill.workspace()
        recent = self.recent_kernels
        rows = None if recent is None or recent.packed else recent.recent.kv_cache
        self.kernels.warm_up(kv_cache, self._layout(kv_cache), self.transforms, workspace, rows)
        if self.recent_kernels is not None:
            self.recent_kernels.warm_up(self.transforms, workspace)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store key and value [num_tokens, num_kv_heads, head_size] at slot_mapping [<= num_tokens]."""
        assert not self.needs_statics, "statics are bound when the model is loaded"
        positions = None
        if self.transforms.key_offset is not None:
            positions = _layer_metadata(layer.layer_name).positions
        if self.recent is not None:
            recent = self.recent_kernels or self.recent
            recent.store(key, value, positions, self.transforms)
        # Last, because decoding may begin while this store ends, and not while another's kernel does.
        pages = (kv_cache, slot_mapping, positions, self._layout(kv_cache), self.transforms)
        if self.kernels is None:
            reshape_and_cache_ref(key, value, *pages)
        else:
            rows = None if self.recent_kernels is None else self.recent_kernels.rows()
            self.kernels.store(key, value, *pages, rows)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVTunerMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of query [num_tokens, num_heads, head_size] into output, of the same shape."""
        assert output_scale is None and output_block_scale is None, "fused output quantization is not advertised"
        if attn_metadata is None:  # profiling and warm-up
            return output.fill_(0)
        metadata = attn_metadata
        if metadata.num_decodes:
            self._decode(query, kv_cache, metadata, output)
        if metadata.prefill is None:
            return output
        if self.prefill is None:
            self._prefill_cpu(query, key, value, kv_cache, metadata, output)
        else:
            layout = self._layout(kv_cache)
            self.prefill(query, key, value, kv_cache, layout, self.transforms, metadata, metadata.prefill, output)
        return output

    def _layout(self, kv_cache: torch.Tensor) -> PageLayout:
        return _page_layout(self.settings.precision.pair, self.head_size, kv_cache.shape[2])

    def _decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: KVTunerMetadata, output: torch.Tensor
    ) -> None:
        tokens = metadata.num_decode_tokens
        if tokens < query.shape[0]:
            query, output = query[:tokens], output[:tokens]
        arguments = (query, kv_cache, *metadata.decodes, metadata.max_decode_query_len)
        if self.recent is None:
            self._attend(*arguments, output)
            return
        lse = torch.empty(query.shape[1], tokens, dtype=torch.float32, device=query.device)
        if self.recent_kernels is not None:
            self._attend(*arguments, output, lse)
            self.recent_kernels.merge(query, metadata, self.transforms, output, lse)
            return
        merged = torch.empty(output.shape, device=query.device)
        self._attend(*arguments, merged, lse)
        limits = (self.scale, self.logits_soft_cap, self.sliding_window)
        self.recent.merge(query, metadata, self.transforms, *limits, merged, lse)
        output.copy_(merged)

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        max_query_len: int,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attention of the newest tokens over packed pages, with a recent window over what has left it, by this layer's
        decode kernel; shapes as the reference has them."""
        arguments = (query, kv_cache, block_table, seq_lens, query_start_loc, max_query_len)
        layout = self._layout(kv_cache)
        if self.kernels is None:
            skip, sink_tokens = (
                (0, 0) if self.recent is None else (self.recent.window.tokens, self.recent.window.sink_tokens)
            )
            limits = (self.sliding_window, self.logits_soft_cap, skip)
            paged_attention_ref(*arguments, self.scale, layout, self.transforms, output, *limits, lse, sink_tokens)
        else:
            self.kernels.attend(*arguments, layout, self.transforms, output, lse)

    def _prefill_cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: KVTunerMetadata,
        output: torch.Tensor,
    ) -> None:
        """One request at a time: what it needs of the cache, dequantized, before its fresh tokens."""
        starts, lens = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        layout = self._layout(kv_cache)
        for request in range(metadata.num_decodes, len(lens)):
            begin, end, length = starts[request], starts[request + 1], lens[request]
            num_queries = end - begin
            first = 0
            if self.sliding_window is not None:
                first = max(0, length - num_queries - self.sliding_window + 1)
            cached_end = length if self.attend_cached_prefill else length - num_queries
            keys, values = (fresh.new_empty(length - first, *fresh.shape[1:]) for fresh in (key, value))
            if cached_end > first:
                gather_cache_ref(
                    kv_cache,
                    metadata.block_table[request : request + 1],
                    torch.tensor([0, cached_end - first], dtype=torch.int32),
                    torch.tensor([first], dtype=torch.int32),
                    keys,
                    values,
                    layout,
                    self.transforms,
                    num_tokens=cached_end - first,
                )
            if not self.attend_cached_prefill:
                keys[-num_queries:], values[-num_queries:] = key[begin:end], value[begin:end]
            arguments = (query[begin:end], keys, values, self.scale)
            limits = (self.sliding_window, self.logits_soft_cap)
            if self.recent is None:
                attention_ref(*arguments, output[begin:end], *limits)
                continue
            self.recent.put_sink_tokens(keys, values, request, first, cached_end, self.transforms)
            older = torch.empty(query[begin:end].shape, device=query.device)
            lse = torch.empty(query.shape[1], num_queries, device=query.device)
            attention_ref(*arguments, older, *limits, self.recent.window.tokens, lse)
            fresh = key[begin:end], value[begin:end]
            if self.attend_cached_prefill:
                positions = None if metadata.positions is None else metadata.positions[begin:end]
                fresh = self.recent.read_back(*fresh, positions, self.transforms)
            newest = self.recent.attend(
                query[begin:end], request, length, self.transforms, self.scale, self.logits_soft_cap, fresh
            )
            merge_segments_ref((older, newest[0]), (lse, newest[1]), output[begin:end])


_page_layout = functools.cache(PageLayout)


def _layer_metadata(layer_name: str) -> KVTunerMetadata:
    """The metadata of the batch in flight, which do_kv_cache_update is not handed."""
    metadata = get_forward_context().attn_metadata
    return (metadata[0] if isinstance(metadata, list) else metadata)[layer_name]
