"""The attention implementation of a quantized layer: which kernel serves which tokens of the batch.

Decodes read the packed pages. Prefills run vLLM's FlashAttention on fresh keys and values, and on cached ones once
they are dequantized into a bounded workspace (prefill_plan.py). On a CPU the reference does all of it.
"""

import functools
from dataclasses import dataclass

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType, max_decode_query_len

from vllm_kvtuner import envs, reference
from vllm_kvtuner.backend import KVTunerMetadata
from vllm_kvtuner.layer_kernels import LayerKernels
from vllm_kvtuner.layout import PageLayout
from vllm_kvtuner.prefill_plan import CacheSlice, PrefillPlan, workspace_rows
from vllm_kvtuner.profile import LayerPrecision
from vllm_kvtuner.recent import RecentCache
from vllm_kvtuner.transforms import LayerTransforms

WARM_UP_TOKENS = 256
"""Decodes of a batch that takes the kernels' variants for many rows."""
WARM_UP_ROWS = 1 << 15
"""(token, KV head) rows of a prefill that takes the store kernel's variant for many rows."""


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
        self.prefill_workspace_tokens = workspace_rows(
            envs.prefill_workspace_tokens(), config.scheduler_config.max_num_batched_tokens, sliding_window
        )
        if current_platform.is_cpu():
            self._prefill = self._prefill_cpu
        else:
            from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

            self._prefill = self._prefill_gpu
            self.fa_version = get_flash_attn_version(head_size=head_size, requires_softcap=self.logits_soft_cap > 0)
            self.kernels = LayerKernels(
                num_heads,
                self.num_kv_heads,
                head_size,
                self.scale,
                sliding_window,
                self.logits_soft_cap,
                self.max_num_seqs,
                self.max_decode_query_len,
                torch.device(current_platform.device_type, current_platform.current_device()),
            )
        self.configure(settings)

    def configure(self, settings: LayerSettings) -> None:
        """Take over the layer's pair and transforms; where those need statics, bind_statics completes them."""
        self.settings = settings
        if self.kernels is not None:
            self.kernels.forget()
        chosen = settings.precision.transforms
        self.needs_statics = chosen.needs_statics
        self.transforms = LayerTransforms(
            key_hadamard=chosen.key_hadamard,
            value_hadamard=chosen.value_hadamard,
            range_search=chosen.range_search,
        )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        # While the model loads, so that vLLM counts the workspaces before it sizes the cache.
        if self.kernels is None:
            return
        self._prefill_workspace()
        precision = self.settings.precision
        self.kernels.reserve(precision.pair, self.transforms, precision.transforms.key_offset)

    def _prefill_workspace(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.kernels is not None
        return _prefill_workspace(
            self.num_kv_heads, self.head_size, self.prefill_workspace_tokens, self.dtype, self.kernels.device
        )

    def bind_statics(self, transforms: LayerTransforms) -> None:
        """Take over the layer's transforms, statics and rotary table included, once the model is loaded."""
        self.transforms = transforms
        self.needs_statics = False
        if self.kernels is not None:
            self.kernels.forget()

    def warm_up(self, kv_cache: torch.Tensor) -> None:
        """Compile the kernels of this layer, at the row counts that they tell apart, without storing anything."""
        if self.kernels is None:
            return
        device = kv_cache.device
        heads, kv_heads, size = self.num_heads, self.num_kv_heads, self.head_size

        def integers(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        reqs = min(self.max_num_seqs, WARM_UP_TOKENS)
        for count, query_len in {(1, 1), (reqs, 1), (1, self.max_decode_query_len), (reqs, self.max_decode_query_len)}:
            tokens = count * query_len
            qkv = torch.zeros(tokens, (heads + 2 * kv_heads) * size, dtype=self.dtype, device=device)
            query, key, value = (
                part.unflatten(1, (-1, size))
                for part in qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=1)
            )
            slots, positions = (integers(tokens, fill=fill, dtype=torch.int64) for fill in (-1, 0))
            self._store(key, value, kv_cache, slots, positions)
            starts = torch.arange(0, tokens + 1, query_len, device=device).int()
            self._attend(
                query, kv_cache, integers(count, 16), integers(count, fill=query_len), starts, query_len,
                torch.empty_like(query, memory_format=torch.contiguous_format),
            )  # fmt: skip
        rows = torch.zeros(WARM_UP_ROWS // kv_heads, kv_heads, size, dtype=self.dtype, device=device)
        slots, positions = (integers(rows.shape[0], fill=fill, dtype=torch.int64) for fill in (-1, 0))
        self._store(rows, rows, kv_cache, slots, positions)
        self.kernels.gather(
            kv_cache, integers(1, 16), torch.tensor([0, 1], device=device).int(), integers(1),
            *self._prefill_workspace(), layout=self._layout(kv_cache), transforms=self.transforms, num_tokens=1,
        )  # fmt: skip

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
        self._store(key, value, kv_cache, slot_mapping, positions)
        if self.recent is not None:
            self.recent.store(key, value, positions, self.transforms)

    def _store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None,
    ) -> None:
        """Transform, quantize and pack new tokens into their slots; shapes as the reference has them."""
        store = reference.reshape_and_cache_ref if self.kernels is None else self.kernels.store
        store(key, value, kv_cache, slot_mapping, positions, self._layout(kv_cache), self.transforms)

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
        if metadata.prefill is not None:
            self._prefill(query, key, value, kv_cache, metadata, metadata.prefill, output)
        return output

    def _layout(self, kv_cache: torch.Tensor) -> PageLayout:
        return _page_layout(self.settings.precision.pair, self.head_size, kv_cache.shape[2])

    def _decode(
        self, query: torch.Tensor, kv_cache: torch.Tensor, metadata: KVTunerMetadata, output: torch.Tensor
    ) -> None:
        tokens, reqs = metadata.num_decode_tokens, metadata.num_decodes
        arguments = (
            query[:tokens],
            kv_cache,
            metadata.block_table[:reqs],
            metadata.seq_lens[:reqs],
            metadata.query_start_loc[: reqs + 1],
            metadata.max_decode_query_len,
        )
        if self.recent is None:
            self._attend(*arguments, output[:tokens])
            return
        older, lse = self._older(tokens, query)
        reference.paged_attention_ref(
            *arguments, self.scale, self._layout(kv_cache), self.transforms, older, self.sliding_window,
            self.logits_soft_cap, self.recent.window.tokens, lse,
        )  # fmt: skip
        newest = self.recent.attend(query, range(reqs), metadata, self.transforms, self.scale, self.logits_soft_cap)
        reference.merge_segments_ref((older, newest[0]), (lse, newest[1]), output[:tokens])

    def _older(self, tokens: int, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of attention over what has left the recent window, to be written."""
        output = torch.empty(tokens, self.num_heads, self.head_size, device=query.device)
        return output, torch.empty(self.num_heads, tokens, device=query.device)

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        max_query_len: int,
        output: torch.Tensor,
    ) -> None:
        """Attention of the newest tokens by this layer's decode kernel; shapes as the reference has them."""
        arguments = (query, kv_cache, block_table, seq_lens, query_start_loc, max_query_len)
        layout = self._layout(kv_cache)
        if self.kernels is None:
            reference.paged_attention_ref(
                *arguments, self.scale, layout, self.transforms, output, self.sliding_window, self.logits_soft_cap
            )
        else:
            self.kernels.attend(*arguments, layout, self.transforms, output)

    def _prefill_cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: KVTunerMetadata,
        plan: PrefillPlan,
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
                reference.gather_cache_ref(
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
                reference.attention_ref(*arguments, output[begin:end], *limits)
                continue
            older, lse = self._older(num_queries, query)
            reference.attention_ref(*arguments, older, *limits, self.recent.window.tokens, lse)
            fresh = None if self.attend_cached_prefill else (key[begin:end], value[begin:end])
            newest = self.recent.attend(
                query, range(request, request + 1), metadata, self.transforms, self.scale, self.logits_soft_cap, fresh
            )
            reference.merge_segments_ref((older, newest[0]), (lse, newest[1]), output[begin:end])

    def _prefill_gpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: KVTunerMetadata,
        plan: PrefillPlan,
        output: torch.Tensor,
    ) -> None:
        """FlashAttention on fresh tokens and on slices of the cache, merged by log-sum-exp (see prefill_plan.py)."""
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        tokens = slice(plan.first_token, plan.first_token + plan.num_tokens)
        merged, lse = output[tokens], None
        if plan.fresh:
            merged, lse = self._flash(
                query[tokens],
                key[tokens],
                value[tokens],
                plan.cu_query_lens,
                plan.max_query_len,
                plan.cu_query_lens,
                plan.max_query_len,
                causal=True,
            )
        else:
            lse = query.new_empty(self.num_heads, plan.num_tokens, dtype=torch.float32)
            for part in plan.causal:
                keys, values = self._gather(kv_cache, metadata, part)
                rows = slice(part.first_token, part.first_token + part.num_query_tokens)
                if part.fresh_rows is not None:
                    keys.index_copy_(0, part.fresh_rows, key[rows])
                    values.index_copy_(0, part.fresh_rows, value[rows])
                within = slice(rows.start - plan.first_token, rows.stop - plan.first_token)
                merged[within], lse[:, within] = self._flash_slice(query[rows], keys, values, part, causal=True)
        for part in plan.context:
            keys, values = self._gather(kv_cache, metadata, part)
            context, context_lse = self._flash_slice(query[tokens], keys, values, part, causal=False)
            both, both_lse = torch.empty_like(context), torch.empty_like(lse)
            merge_attn_states(both, context, context_lse, merged, lse, both_lse)
            merged, lse = both, both_lse
        if merged.data_ptr() != output[tokens].data_ptr():
            output[tokens] = merged

    def _gather(
        self, kv_cache: torch.Tensor, metadata: KVTunerMetadata, part: CacheSlice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_tokens, num_kv_heads, head_size] of a slice, in the workspace."""
        keys, values = (workspace[: part.num_tokens] for workspace in self._prefill_workspace())
        assert self.kernels is not None
        self.kernels.gather(
            kv_cache,
            metadata.block_table[part.first_request : part.first_request + part.num_reqs],
            part.cu_seq_lens,
            part.seq_starts,
            keys,
            values,
            layout=self._layout(kv_cache),
            transforms=self.transforms,
            num_tokens=part.num_tokens,
        )
        return keys, values

    def _flash_slice(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: CacheSlice, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._flash(
            query,
            keys,
            values,
            part.cu_query_lens,
            part.max_query_len,
            part.cu_seq_lens,
            part.max_len,
            causal,
        )

    def _flash(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cu_query_lens: torch.Tensor,
        max_query_len: int,
        cu_key_lens: torch.Tensor,
        max_key_len: int,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [num_tokens, num_heads, head_size] and log-sum-exp [num_heads, num_tokens]."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        window = (self.sliding_window - 1, 0) if causal and self.sliding_window is not None else (-1, -1)
        version = {} if self.fa_version is None else {"fa_version": self.fa_version}
        attended, lse = flash_attn_varlen_func(
            q=query,
            k=keys,
            v=values,
            cu_seqlens_q=cu_query_lens,
            cu_seqlens_k=cu_key_lens,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_key_len,
            softmax_scale=self.scale,
            causal=causal,
            window_size=list(window),
            softcap=self.logits_soft_cap,
            return_softmax_lse=True,
            **version,
        )[:2]
        return attended, lse


@functools.cache
def _prefill_workspace(
    num_kv_heads: int, head_size: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two of [tokens, num_kv_heads, head_size], for dequantized keys and values."""
    keys, values = (torch.empty(tokens, num_kv_heads, head_size, dtype=dtype, device=device) for _ in range(2))
    return keys, values


_page_layout = functools.cache(PageLayout)


def _layer_metadata(layer_name: str) -> KVTunerMetadata:
    """The metadata of the batch in flight, which do_kv_cache_update is not handed."""
    metadata = get_forward_context().attn_metadata
    return (metadata[0] if isinstance(metadata, list) else metadata)[layer_name]
