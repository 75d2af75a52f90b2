"""vLLM attention backends, one per precision pair, and the metadata that their implementation reads.

vLLM forms attention groups by (backend class, KV cache spec), so a class per pair (and recent window) gives each its
own page size and metadata while :class:`UniformTypeKVCacheSpecs` keeps unequal pages in one KV cache group.
"""

import functools
from dataclasses import replace
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImplBase,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from vllm_kvtuner.attention import prefill_plan
from vllm_kvtuner.attention.both_ways import both_ways
from vllm_kvtuner.attention.context_parallel import ContextLengths
from vllm_kvtuner.attention.impl import KVTunerImpl
from vllm_kvtuner.attention.metadata import KVTunerMetadata
from vllm_kvtuner.attention.prefill_plan import PlanRules
from vllm_kvtuner.attention.switchable import SwitchableImpl
from vllm_kvtuner.engine.config import BACKEND_NAME
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PrecisionPair, content_bytes
from vllm_kvtuner.profile.profile import RecentWindow


class KVTunerMetadataBuilder(AttentionMetadataBuilder[KVTunerMetadata]):
    """Splits a batch into decodes and prefills and plans the prefills on the host, without synchronizing."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.decode_query_len = max_decode_query_len(vllm_config)
        self.reorder_batch_threshold = self.decode_query_len
        implementation = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl
        window = None if implementation.recent_window is None else implementation.recent_window.window
        self._rules = PlanRules(
            workspace_tokens=implementation.prefill_workspace_tokens,
            block_size=kv_cache_spec.block_size,
            attend_cached=implementation.attend_cached_prefill,
            sliding_window=implementation.sliding_window,
            recent=None if window is None else window.tokens,
            sink_tokens=0 if window is None else window.sink_tokens,
            apart=implementation.shards is not None,
        )
        self._shards = implementation.shards
        # A window keeps all of a step's tokens only if it is as long as they are many; and a prefill that reads back
        # what it stored gives the same numbers, however it is cut into steps.
        fits = window is None or window.tokens >= MAX_DECODE_QUERY_LEN
        self._takes_short_prefills = fits and not self._rules.attend_cached and self._shards is None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KVTunerMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError("attention over packed pages must be causal, but vLLM asks for other attention")
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            common, decode_threshold=self.decode_query_len
        )
        pictures = None
        if num_prefills and common.mm_req_doc_ranges:
            assert common.seq_lens_cpu_upper_bound is not None
            pictures = both_ways(
                common.mm_req_doc_ranges,
                common.query_start_loc_cpu,
                common.seq_lens_cpu_upper_bound,
                common.num_reqs,
                self.device,
            )
        # One, or as many as there may be, however many there are: what kernels are compiled for when the engine starts.
        longest = 1 if common.max_query_len == 1 else self.decode_query_len
        if num_prefills and self._takes_short_prefills and pictures is None:
            assert common.seq_lens_cpu_upper_bound is not None
            lens = prefill_plan.short_prefills(
                common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, num_decodes, num_prefills
            )
            num_decodes, num_prefills = num_decodes + len(lens), num_prefills - len(lens)
            num_decode_tokens += sum(lens)
            if lens:
                longest = MAX_DECODE_QUERY_LEN
        plan, seq_lens, context = None, common.seq_lens, None
        if self._shards is not None:
            assert common.dcp_local_seq_lens is not None
            seq_lens = common.dcp_local_seq_lens
        if num_prefills:
            assert common.seq_lens_cpu_upper_bound is not None
            lens = common.seq_lens_cpu_upper_bound
            if self._shards is not None:
                queries = common.query_start_loc_cpu[1 : common.num_reqs + 1].diff(
                    prepend=common.query_start_loc_cpu[:1]
                )
                cached = lens[: common.num_reqs] - queries
                of_rank = self._shards.lengths(cached)
                any_cached = bool(cached[num_decodes:].any())
                context = ContextLengths(any_cached, of_rank[num_decodes:].tolist())
                lens = of_rank + queries
            plan = prefill_plan.plan(
                self._rules,
                common.query_start_loc_cpu,
                lens,
                num_decodes,
                common.num_reqs,
                self.device,
            )
        return KVTunerMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            max_decode_query_len=longest,
            query_start_loc=common.query_start_loc,
            seq_lens=seq_lens,
            block_table=common.block_table_tensor,
            positions=common.positions,
            prefill=plan,
            mm_prefix_range=pictures,
            context=context,
        )


class KVTunerBackend(AttentionBackend):
    """What all pairs share; :func:`backend_for` makes the class of one pair."""

    pair: ClassVar[PrecisionPair]
    prefer_block_outermost: ClassVar[bool]
    switchable: ClassVar[bool] = False
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list] = ["kvtuner"]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImplBase]:
        return SwitchableImpl if cls.switchable else KVTunerImpl

    @staticmethod
    def get_builder_cls() -> type[KVTunerMetadataBuilder]:
        return KVTunerMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        return super().supports_dtype(dtype) or (dtype == torch.float32 and current_platform.is_cpu())

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return replace(
            spec, dtype=torch.uint8, state_content_bytes=content_bytes(cls.pair, spec.head_size), page_size_padded=None
        )

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A (block, KV head) chunk must be contiguous. Where pages of one model are unequal and cannot share one
        # group (sliding-window beside full layers, recent windows), a block-outermost layout packs them without
        # padding.
        layouts = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
        return layouts[::-1] if cls.prefer_block_outermost else layouts


@functools.cache
def backend_for(
    pair: PrecisionPair,
    prefer_block_outermost: bool = False,
    switchable: bool = False,
    recent: RecentWindow | None = None,
) -> type[KVTunerBackend]:
    """The backend class of layers stored at ``pair``, always the same object for the same arguments.

    Args:
        pair: what the pages have room for.
        prefer_block_outermost: the model's pages cannot share one group.
        switchable: calibration mode, in which a layer may store a smaller pair in these pages (switchable.py).
        recent: the layers' recent window; those with another have other metadata.
    """
    window = f"Recent{recent.tokens}SinkTokens{recent.sink_tokens}" if recent else ""
    name = f"KVTuner{pair}{window}{'Switchable' if switchable else ''}Backend"
    attributes = {
        "pair": pair,
        "prefer_block_outermost": prefer_block_outermost,
        "switchable": switchable,
        "__qualname__": name,
        "__module__": __name__,
    }
    return type(name, (KVTunerBackend,), attributes)
