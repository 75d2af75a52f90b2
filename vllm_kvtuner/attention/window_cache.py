"""The recent window: a second cache of a layer, which holds its newest tokens in 16 or 8 bits.

Every token is stored packed in its step (step_packing.py says when), and in the window too. Attention reads the newest
``tokens`` of each query from there, and those of the request's first ``sink_tokens`` that the layer's own sliding
window leaves visible. The window is a layer of its own to vLLM: a :class:`RecentCache` stands in the static forward
context under the attention layer's name with ``.recent`` behind it, and asks for a ``SlidingWindowSpec``. Of what both
model runners (and 0.32.0 and 0.33.0) do with every ``AttentionLayerBase`` there, this uses

- ``get_kv_cache_spec`` (v1/worker/gpu_model_runner.py, v1/worker/gpu/attn_utils.py): a spec per name, so that the
  window becomes a KV cache group, with blocks from the pool of the packed pages;
- ``_get_packed_kv_cache_groups`` (v1/core/kv_cache_utils.py, in 0.33.0 kv_cache_planning.py): under a block-outermost
  layout unequal pages share a pool without padding, and the layers of a sliding window are spread over as many groups
  as a block of the full layers' pages makes necessary;
- ``SlidingWindowManager`` (v1/core/single_type_kv_cache_manager.py): freeing of what has left the window, preemption,
  speculation and the hybrid prefix cache, whose hits end where both caches have what they need: all packed pages before
  that point, and the window's last ``tokens - 1`` tokens. blocks/window_manager.py stores no more of a chunk than that;
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

from vllm_kvtuner.attention.metadata import metadata_of
from vllm_kvtuner.blocks.window_manager import RecentSpec
from vllm_kvtuner.engine.config import BACKEND_NAME, RECENT_SUFFIX, recent_block_size
from vllm_kvtuner.kernels.contract import Pages
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PageLayout, content_bytes
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.profile import RecentWindow


@dataclass
class RecentMetadata(AttentionMetadata):
    """What of a batch differs from the packed pages' metadata.

    Args:
        block_table: [num_reqs, max_blocks] int32; blocks that have left the window may be any.
        slot_mapping: [num_tokens] int64, -1 for tokens that are not stored.
        holds_step: whether all of the batch's tokens are stored, since each request has as few as a decode.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    holds_step: bool


class RecentMetadataBuilder(AttentionMetadataBuilder[RecentMetadata]):
    """Says where a window's tokens are."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, RecentSpec)
        self._block_size = kv_cache_spec.block_size
        self._decode_query_len = max_decode_query_len(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> RecentMetadata:
        common = common_attn_metadata
        holds_step = common.max_query_len <= self._decode_query_len
        if not holds_step:
            # Tokens that nobody will read have places in the null block, which other caches' tables lead to as well.
            # In place, since vLLM's buffer is where CUDA graphs look for it.
            common.slot_mapping.masked_fill_(common.slot_mapping < self._block_size, -1)
        return RecentMetadata(common.block_table_tensor[: common.num_reqs], common.slot_mapping, holds_step)


class RecentBackend(AttentionBackend):
    """What vLLM asks of a cache: its metadata and its layout. It computes nothing."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

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
        self.is_packed = window.pair.is_quantized
        """Whether the window packs its tokens, in 8 bits. Asked for in every step."""
        self.num_kv_heads = num_kv_heads
        self.head_size = head_size
        self.dtype = dtype
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return RecentBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        packed = self.is_packed
        return RecentSpec(
            block_size=recent_block_size(vllm_config, self.window),
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=torch.uint8 if packed else self.dtype,
            state_content_bytes=content_bytes(self.window.pair, self.head_size) if packed else None,
            sliding_window=self.window.tokens,
            # Drafts of a step, and blocks that are taken ahead for those of the next.
            step_tokens=1 + 2 * vllm_config.num_speculative_tokens,
            num_steps=vllm_config.max_concurrent_batches,
            sink_tokens=self.window.sink_tokens,
        )

    def pages(self, transforms: LayerTransforms) -> Pages:
        """Of an 8-bit window, with the transforms of its layer."""
        return Pages(self.kv_cache, PageLayout(self.window.pair, self.head_size, self.kv_cache.shape[2]), transforms)

    @property
    def metadata(self) -> RecentMetadata | None:
        """Of the batch in flight; None in a warm-up."""
        return metadata_of(self.layer_name)


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
        impl.take_window(layers[f"{cache_owner}{RECENT_SUFFIX}"])
        return
    name = f"{layer.layer_name}{RECENT_SUFFIX}"
    layers[name] = RecentCache(name, window, impl.num_kv_heads, impl.head_size, impl.dtype)
    impl.take_window(layers[name])
