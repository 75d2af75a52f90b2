"""The recent window: a second cache of a layer, which holds its newest tokens in 16 or 8 bits.

Every token is stored packed at once, and in the window too; attention reads the newest ``tokens`` of each query from
there, and those of the request's first ``sinks`` tokens that the layer's own sliding window leaves visible. The window
is a layer of its own to vLLM: a :class:`RecentCache` stands in the static forward context under the attention layer's
name with ``.recent`` behind it, and asks for a ``SlidingWindowSpec``. Of what both model runners (and 0.32.0 and
0.33.0) do with every ``AttentionLayerBase`` there, this uses

- ``get_kv_cache_spec`` (v1/worker/gpu_model_runner.py, v1/worker/gpu/attn_utils.py): a spec per name, so that the
  window becomes a KV cache group, with blocks from the pool of the packed pages;
- ``_get_packed_kv_cache_groups`` (v1/core/kv_cache_utils.py, in 0.33.0 kv_cache_planning.py): under a block-outermost
  layout unequal pages share a pool without padding, and the layers of a sliding window are spread over as many groups
  as a block of the full layers' pages makes necessary;
- ``SlidingWindowManager`` (v1/core/single_type_kv_cache_manager.py): freeing of what has left the window, preemption,
  speculation and the hybrid prefix cache, whose hits end where both caches have what they need: all packed pages before
  that point, and the window's last ``tokens - 1`` tokens. Of a chunk, recent_manager.py stores no more than is needed;
- block tables, slot mappings and metadata by layer name (``_build_attention_metadata``, ``_get_slot_mappings``), in
  the forward context, where the attention layer's implementation finds them;
- ``bind_kv_cache``: two layers of one index are allowed on CPUs and CUDA (``check_runner_kv_caches_multi_layer``).

The manager keeps the ``tokens - 1`` before a step's fresh tokens, and a chunk's own are at hand while it is computed,
so that each query of a chunk sees exactly what it would see if tokens were served one by one; what a chunk has pushed
out of the window is free before the next. (Blocks whose tokens a prompt's hit could need stay findable by the prefix
cache until the pool takes them.)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImplBase,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from vllm_kvtuner import plugin, reference
from vllm_kvtuner.backend import KVTunerMetadata
from vllm_kvtuner.layout import BLOCK_SIZE_MULTIPLE, PageLayout, content_bytes, recent_blocks
from vllm_kvtuner.precision import RecentWindow
from vllm_kvtuner.recent_manager import RecentSpec
from vllm_kvtuner.transforms import LayerTransforms


@dataclass
class RecentMetadata(AttentionMetadata):
    """What of a batch differs from the packed pages' metadata.

    Args:
        block_table: [num_reqs, max_blocks] int32; blocks that have left the window may be any.
        slot_mapping: [num_tokens] int64, -1 for tokens that are not stored.
        newest_table: [num_reqs, blocks of a window] int32, of each request's window alone; valid for decodes.
        newest_lens: [num_reqs] int32, tokens from the first of those blocks on.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    newest_table: torch.Tensor
    newest_lens: torch.Tensor


class RecentMetadataBuilder(AttentionMetadataBuilder[RecentMetadata]):
    """Finds the blocks of each request's window, into buffers that stay where they are (CUDA graphs hold them)."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, RecentSpec)
        self._window, self._block_size = kv_cache_spec.sliding_window, kv_cache_spec.block_size
        self._decode_query_len = max_decode_query_len(vllm_config)
        columns = recent_blocks(self._window, self._block_size, self._decode_query_len)
        num_reqs = vllm_config.scheduler_config.max_num_seqs
        self._table = torch.zeros(num_reqs, columns, dtype=torch.int32, device=device)
        self._lens = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        self._newest_blocks = reference.newest_blocks_ref
        if device.type != "cpu":
            from vllm_kvtuner.kernels.newest_blocks import newest_blocks

            self._newest_blocks = newest_blocks

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RecentMetadata:
        common, num_reqs = common_attn_metadata, common_attn_metadata.num_reqs
        if common.max_query_len > self._decode_query_len:
            # Tokens that nobody will read have places in the null block, which other caches' tables lead to as well.
            # In place, since vLLM's buffer is where CUDA graphs look for it.
            common.slot_mapping.masked_fill_(common.slot_mapping < self._block_size, -1)
        table, lens = self._table[:num_reqs], self._lens[:num_reqs]
        starts = common.query_start_loc[: num_reqs + 1]
        requests = (common.block_table_tensor[:num_reqs], common.seq_lens[:num_reqs], starts)
        self._newest_blocks(*requests, self._window, self._block_size, table, lens)
        return RecentMetadata(common.block_table_tensor, common.slot_mapping, table, lens)


class RecentBackend(AttentionBackend):
    """What vLLM asks of a cache: its metadata and its layout. It computes nothing."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImplBase]:
        raise NotImplementedError("the attention layer beside a recent window computes its attention")

    @staticmethod
    def get_builder_cls() -> type[RecentMetadataBuilder]:
        return RecentMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return spec

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC, KVCacheLayout.LBHNC)


class RecentCache(AttentionLayerBase):
    """The recent window of one attention layer.

    Args:
        layer_name: where vLLM finds it.
        window: length and bits.
        num_kv_heads: KV heads of this rank.
        head_size: numbers per row.
        dtype: the model's.
    """

    def __init__(
        self, layer_name: str, window: RecentWindow, num_kv_heads: int, head_size: int, dtype: torch.dtype
    ) -> None:
        self.layer_name = layer_name
        self.window = window
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.dtype = dtype
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return RecentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        packed = self.window.pair.is_quantized
        return RecentSpec(
            block_size=plugin.recent_block_size(vllm_config, self.window),
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=torch.uint8 if packed else self.dtype,
            state_content_bytes=content_bytes(self.window.pair, self.head_size) if packed else None,
            sliding_window=self.window.tokens,
            # Drafts of a step, and blocks that are taken ahead for those of the next.
            step_tokens=1 + 2 * vllm_config.num_speculative_tokens,
            num_steps=vllm_config.max_concurrent_batches,
            sinks=self.window.sinks,
        )

    def store(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor | None, transforms: LayerTransforms
    ) -> None:
        """Store the new tokens of the batch in flight; arguments as the reference has them."""
        if get_forward_context().attn_metadata is None:  # warm-up, in which no token has a slot
            return
        slots = recent_metadata(self.layer_name).slot_mapping
        if self.window.pair.is_quantized:
            reference.reshape_and_cache_ref(key, value, self.kv_cache, slots, positions, self.layout, transforms)
        else:
            reference.store_rows_ref(key, value, self.kv_cache, slots)

    def attend(
        self,
        query: torch.Tensor,
        requests: range,
        metadata: KVTunerMetadata,
        transforms: LayerTransforms,
        scale: float,
        logits_soft_cap: float,
        sliding_window: int | None,
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the window alone, of all query tokens of consecutive requests.

        Decodes see the sink tokens as part of it; prefills (``fresh``) see those among the older tokens, where
        :meth:`put_sinks` puts them.

        Args:
            query: [num_tokens, num_heads, head_size] of the whole batch.
            requests: which requests of it.
            metadata: of the batch, that of the packed pages.
            transforms: of the layer.
            scale: factor on the logits.
            logits_soft_cap: as the reference has it.
            sliding_window: the layer's own, within which sink tokens are seen.
            fresh: keys and values of the requests' query tokens, which need not be stored then.

        Returns:
            [query tokens of these requests, num_heads, head_size] fp32 and log-sum-exp [num_heads, query tokens].
        """
        rows = slice(requests.start, requests.stop)
        starts = metadata.query_start_loc[requests.start : requests.stop + 1].long()
        lens = metadata.seq_lens[rows].long()
        begins = (lens - starts.diff() - self.window.tokens + 1).clamp(min=0)
        sinks = begins.clamp(max=self.window.sinks if fresh is None else 0)
        # A padded request has no query tokens that anybody reads, and none in the cache.
        lengths = (lens - begins).clamp(min=0)
        # Of each request its sink tokens before the window, and those of the window.
        ends = torch.nn.functional.pad(torch.stack([sinks, lengths], 1).flatten().cumsum(0), (1, 0))
        keys, values = (
            torch.empty(int(ends[-1]), self.num_kv_heads, self.head_size, device=query.device) for _ in range(2)
        )
        heads_and_newest = torch.stack([torch.zeros_like(begins), begins], 1).flatten()
        table = recent_metadata(self.layer_name).block_table[rows].repeat_interleave(2, 0)
        self._gather(table, ends, heads_and_newest, keys, values, transforms)
        bounds, queries = ends[::2].tolist(), starts.tolist()
        first = queries[0]
        output = torch.zeros(queries[-1] - first, *query.shape[1:], device=query.device)
        lse = torch.full((query.shape[1], queries[-1] - first), -torch.inf, device=query.device)
        for index in range(len(requests)):
            held = slice(bounds[index], bounds[index + 1])
            asked = slice(queries[index], queries[index + 1])
            within = slice(asked.start - first, asked.stop - first)
            if held.start == held.stop:
                continue
            if fresh is not None:
                new = slice(held.stop - (asked.stop - asked.start), held.stop)
                keys[new], values[new] = fresh[0][within].float(), fresh[1][within].float()
            visible = None
            if sinks[index]:
                visible = self._visible(int(lens[index]), asked.stop - asked.start, int(begins[index]), sliding_window)
            reference.attention_ref(
                query[asked],
                keys[held],
                values[held],
                scale,
                output[within],
                self.window.tokens,
                logits_soft_cap,
                lse=lse[:, within],
                visible=visible,
            )
        return output, lse

    def _visible(self, length: int, num_queries: int, begin: int, sliding_window: int | None) -> torch.Tensor:
        """[num_queries, num_keys] bool: which of a request's sink tokens, and of those from ``begin`` on, each of its
        queries sees."""
        device = self.kv_cache.device
        head = torch.arange(min(self.window.sinks, begin), device=device)
        position = torch.cat([head, torch.arange(begin, length, device=device)])
        distance = torch.arange(length - num_queries, length, device=device)[:, None] - position
        visible = (distance >= 0) & ((distance < self.window.tokens) | (position < self.window.sinks))
        return visible if sliding_window is None else visible & (distance < sliding_window)

    def put_sinks(
        self, keys: torch.Tensor, values: torch.Tensor, request: int, first: int, end: int, transforms: LayerTransforms
    ) -> None:
        """Put a request's sink tokens in place of those that were read packed.

        Args:
            keys: [num_tokens, num_kv_heads, head_size] of the request's tokens from ``first`` on.
            values: as keys.
            request: its index in the batch.
            first: the first of the tokens.
            end: how many tokens the request has in the cache that are to be read from there.
            transforms: of the layer.
        """
        count = min(self.window.sinks, end) - first
        if count <= 0:
            return
        table = recent_metadata(self.layer_name).block_table[request : request + 1]
        bounds, begin = torch.tensor([0, count]), torch.tensor([first])
        self._gather(table, bounds, begin, keys[:count], values[:count], transforms)

    def _gather(
        self,
        block_table: torch.Tensor,
        ends: torch.Tensor,
        begins: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        transforms: LayerTransforms,
    ) -> None:
        """Keys and values of tokens that the window holds; arguments as the reference has them."""
        gathered = (self.kv_cache, block_table, ends, begins, keys, values)
        if self.window.pair.is_quantized:
            reference.gather_cache_ref(*gathered, self.layout, transforms, num_tokens=len(keys))
        else:
            reference.gather_rows_ref(*gathered, num_tokens=len(keys))

    def read_back(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor | None, transforms: LayerTransforms
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of new tokens as the window would give them; arguments as the reference has them."""
        if not self.window.pair.is_quantized:
            return key, value
        return reference.read_back_ref(key, value, positions, self.window.pair, transforms)

    @property
    def layout(self) -> PageLayout:
        """Of the pages of an 8-bit window."""
        return PageLayout(self.window.pair, self.head_size, self.kv_cache.shape[2])


def give_window(layer: torch.nn.Module, window: RecentWindow, cache_owner: str | None) -> None:
    """Give a constructed attention layer its recent window.

    Args:
        layer: vLLM's Attention.
        window: length and bits.
        cache_owner: name of the layer whose cache this one reads, if it has none of its own.

    Raises:
        ValueError: the layer's own sliding window is no longer than the recent one.
    """
    impl = layer.impl
    if impl.sliding_window is not None and impl.sliding_window <= window.tokens:
        index = impl.settings.precision.index
        raise ValueError(
            f"layer {index}: recent_window must be less than the layer's sliding window of {impl.sliding_window} "
            f"tokens (recent_window_overrides: {{{index}: 0}} leaves it out), but got {window.tokens}"
        )
    config = get_current_vllm_config()
    layers = config.compilation_config.static_forward_context
    if cache_owner is not None:
        impl.take_window(layers[f"{cache_owner}{plugin.RECENT_SUFFIX}"])
        return
    name = f"{layer.layer_name}{plugin.RECENT_SUFFIX}"
    layers[name] = RecentCache(name, window, impl.num_kv_heads, impl.head_size, impl.dtype)
    impl.take_window(layers[name])


def recent_metadata(layer_name: str) -> RecentMetadata:
    """The metadata of the batch in flight for a window."""
    metadata = get_forward_context().attn_metadata
    return (metadata[0] if isinstance(metadata, list) else metadata)[layer_name]
