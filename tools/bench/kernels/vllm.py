"""vLLM's own kernels, called as its attention backends of version 0.33.0 call them in a full CUDA graph.

vLLM is imported when a kernel is set up, so that the other kernels can be measured where it is absent.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch

from kvtuner_tools.bench.kernel_inputs import Batch, NewTokens, StoredTokens, newest_tokens, token_places
from kvtuner_tools.bench.kernels.base import CacheFormat, Calls, DecodeKernel, Launches, StoreKernel
from kvtuner_tools.bench.points import LayerHeads
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms, hadamard

FP8 = torch.float8_e4m3fn
SCALE_BYTES = 4
"""Bytes of the fp32 scale that vLLM keeps per token, head and side of its per-token-head formats."""


def vllm_skip_reason() -> str | None:
    """Why vLLM's CUDA kernels cannot run here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed"
    if not torch.cuda.is_available() or torch.version.hip:
        return "needs an NVIDIA GPU"
    return None


def flash_stores(tokens: NewTokens, kv_cache: torch.Tensor) -> Calls:
    """A call of vLLM's ``reshape_and_cache_flash`` per slot mapping, as FlashAttentionImpl.do_kv_cache_update calls it;
    all scales are 1.

    Args:
        tokens: what to store.
        kv_cache: [num_blocks, block_size, num_kv_heads, 2 * head_size] bf16 or fp8.
    """
    from vllm.v1.attention.backends.fa_utils import reshape_and_cache_flash

    kind = "fp8" if kv_cache.dtype == FP8 else "auto"
    pages = kv_cache.view(torch.uint8) if kind == "fp8" else kv_cache
    keys, values = pages.split(pages.shape[-1] // 2, dim=-1)
    scale = torch.ones((), device=kv_cache.device)

    def store(slots: torch.Tensor) -> Callable[[], None]:
        return lambda: reshape_and_cache_flash(tokens.key, tokens.value, keys, values, slots, kind, scale, scale)

    return tuple(map(store, tokens.slot_mappings))


def unpacked_format(dtype: torch.dtype, head_size: int) -> CacheFormat:
    """Numbers of one dtype without scales of their own."""
    size = dtype.itemsize
    return CacheFormat("fp8" if dtype == FP8 else "bf16", 8.0 * size, 2 * head_size * size)


class UnpackedCacheKernel(DecodeKernel):
    """A kernel on numbers of fp8 or bf16, without transforms."""

    transformed: ClassVar[bool] = False

    def __init__(self, fp8: bool) -> None:
        self.dtype = FP8 if fp8 else torch.bfloat16

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        return [unpacked_format(self.dtype, head_size)]


class FlashAttention3(UnpackedCacheKernel):
    """``flash_attn_varlen_func`` on pages, as FlashAttentionImpl.forward calls it for decodes.

    Splits come from scheduler metadata that is made once, as the metadata builder makes it once a step for all layers;
    ``max_seqlen_k`` is the longest request. With fp8, queries are fp8 too and all scales are 1.
    """

    def skip_reason(self, heads: LayerHeads, block_size: int) -> str | None:
        if reason := vllm_skip_reason():
            return reason
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=heads.head_size)
        return None if version == 3 else f"vLLM chooses FlashAttention {version} for head size {heads.head_size} here"

    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        from vllm.config import AttentionConfig
        from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata

        heads = batch.heads
        kv_cache = random_rows(batch, self.dtype)
        keys, values = map(canonicalize_singleton_dim_strides, kv_cache.split(heads.head_size, dim=-1))
        num_splits = AttentionConfig.flash_attn_max_num_splits_for_cuda_graph
        query = batch.query.to(self.dtype)
        output = torch.empty_like(batch.query)
        descale = torch.ones((), device=batch.device).expand(batch.num_reqs, heads.num_kv_heads)
        max_len = max(batch.lengths)
        scheduler_metadata = get_scheduler_metadata(
            batch_size=batch.num_reqs,
            max_seqlen_q=batch.query_tokens.most,
            max_seqlen_k=max_len,
            num_heads_q=heads.num_heads,
            num_heads_kv=heads.num_kv_heads,
            headdim=heads.head_size,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=self.dtype,
            cu_seqlens_q=batch.query_start_loc,
            page_size=batch.block_size,
            causal=True,
            window_size=(-1, -1),
            num_splits=num_splits,
        )

        def call(block_table: torch.Tensor) -> Callable[[], None]:
            return lambda: flash_attn_varlen_func(
                q=query,
                k=keys,
                v=values,
                out=output,
                cu_seqlens_q=batch.query_start_loc,
                max_seqlen_q=batch.query_tokens.most,
                seqused_k=batch.seq_lens,
                max_seqlen_k=max_len,
                softmax_scale=batch.attention_shape.scale,
                causal=True,
                alibi_slopes=None,
                window_size=[-1, -1],
                block_table=block_table,
                softcap=0,
                scheduler_metadata=scheduler_metadata,
                fa_version=3,
                q_descale=descale,
                k_descale=descale,
                v_descale=descale,
                num_splits=num_splits,
                s_aux=batch.sinks,
            )

        def rows() -> tuple[torch.Tensor, torch.Tensor]:
            block, offset = token_places(batch)
            return keys[block, offset], values[block, offset]

        stores = flash_stores(newest_tokens(batch), kv_cache)
        return Launches(tuple(map(call, batch.block_tables)), stores, output, query, rows)


class ReshapeAndCacheFlash(StoreKernel):
    """vLLM's ``reshape_and_cache_flash``."""

    transformed: ClassVar[bool] = False

    def __init__(self, kv_cache_dtype: str) -> None:
        self.dtype = FP8 if kv_cache_dtype == "fp8" else torch.bfloat16

    def skip_reason(self) -> str | None:
        return vllm_skip_reason()

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        return [unpacked_format(self.dtype, head_size)]

    def build(self, tokens: StoredTokens, cache_format: CacheFormat, transforms: LayerTransforms) -> Calls:
        heads = tokens.heads
        pages = (tokens.num_blocks, tokens.block_size, heads.num_kv_heads, 2 * heads.head_size)
        return flash_stores(tokens, torch.zeros(pages, dtype=self.dtype, device=tokens.key.device))


def random_rows(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """A cache in layout LBNHC, vLLM's default: [num_blocks, block_size, num_kv_heads, key and value]."""
    size = batch.heads.head_size
    pages = (batch.num_blocks, batch.block_size, batch.heads.num_kv_heads, 2 * size)
    kv_cache = torch.randn(pages, dtype=torch.bfloat16, device=batch.device)
    most = 3 * batch.key_scale  # as in packed pages; fp8 ends at 448
    kv_cache[..., :size].mul_(batch.key_scale).clamp_(-most, most)
    return kv_cache.to(dtype)


class _Int4Cache(NamedTuple):
    """A cache of random int4 rows, all views of one.

    Args:
        keys: [num_blocks, block_size, num_kv_heads, bytes of a key and its scale] uint8.
        values: as keys.
        k_scales: [num_blocks, block_size, num_kv_heads] fp32 with the zero point in their four lowest bits.
        v_scales: as k_scales.
    """

    keys: torch.Tensor
    values: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor

    @classmethod
    def random(cls, batch: Batch, content_bytes: int) -> "_Int4Cache":
        """Values of order 1, and keys of order ``key_scale``."""
        size = batch.heads.head_size
        pages = (batch.num_blocks, batch.block_size, batch.heads.num_kv_heads, content_bytes)
        kv_cache = torch.randint(0, 256, pages, dtype=torch.uint8, device=batch.device)
        # Content: [key nibbles | scale | value nibbles | scale].
        keys, values = kv_cache.split(content_bytes // 2, dim=-1)
        words = kv_cache.view(torch.float32).unflatten(-1, (2, -1))
        cache = cls(keys, values, words[..., 0, -1], words[..., 1, -1])
        for scales, factor in ((cache.k_scales, batch.key_scale), (cache.v_scales, 1.0)):
            # The rotation is not normalized: it multiplies rows by the root of its size.
            step = 0.4 * factor * (size & -size) ** 0.5 * (0.75 + 0.5 * torch.rand_like(scales))
            zero_point = torch.randint(6, 10, step.shape, dtype=torch.int32, device=batch.device)
            scales.copy_(((step.view(torch.int32) & -16) | zero_point).view(torch.float32))
        return cache

    def rows(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first copy of a batch, in model space."""
        block, offset = token_places(batch)
        half = batch.heads.head_size // 2
        return (
            dequantize_int4(self.keys[block, offset][..., :half], self.k_scales[block, offset]),
            dequantize_int4(self.values[block, offset][..., :half], self.v_scales[block, offset]),
        )


class Int4PerTokenHead(DecodeKernel):
    """``unified_attention`` in mode INT4_PER_TOKEN_HEAD, as TritonAttentionImpl.forward calls it for decodes.

    vLLM moves the number of requests up to which it splits the context to the nearest size of its captured CUDA
    graphs; its default sizes hold the number itself.
    """

    transformed: ClassVar[bool] = False

    def skip_reason(self, heads: LayerHeads, block_size: int) -> str | None:
        return vllm_skip_reason()

    def formats(self, pairs: Sequence[PrecisionPair], head_size: int) -> list[CacheFormat]:
        return [CacheFormat("int4", 4.0, head_size + 2 * SCALE_BYTES)]

    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
            triton_reshape_and_cache_flash_per_token_head_quant,
        )
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        heads, device = batch.heads, batch.device
        cache = _Int4Cache.random(batch, cache_format.content_bytes)
        threshold = MIN_LAUNCH_GRID_SIZE_2D // heads.num_kv_heads
        padded = 1 << (heads.head_size - 1).bit_length()
        segments = (threshold, heads.num_heads, NUM_PAR_SOFTMAX_SEGMENTS)
        segment_output = torch.empty((*segments, padded), device=device)
        segment_max, segment_sum = (torch.empty(segments, device=device) for _ in range(2))
        output = torch.empty_like(batch.query)

        def call(block_table: torch.Tensor) -> Callable[[], None]:
            return lambda: unified_attention(
                q=batch.query,
                k=cache.keys,
                v=cache.values,
                out=output,
                cu_seqlens_q=batch.query_start_loc,
                max_seqlen_q=batch.query_tokens.most,
                seqused_k=batch.seq_lens,
                max_seqlen_k=max(batch.lengths),
                softmax_scale=batch.attention_shape.scale,
                causal=True,
                window_size=(-1, -1),
                block_table=block_table,
                softcap=0,
                q_descale=None,
                k_descale=None,
                v_descale=None,
                seq_threshold_3D=threshold,
                num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
                softmax_segm_output=segment_output,
                softmax_segm_max=segment_max,
                softmax_segm_expsum=segment_sum,
                kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD,
                k_scale_cache=cache.k_scales,
                v_scale_cache=cache.v_scales,
                sinks=batch.sinks,
            )

        newest = newest_tokens(batch)

        def store(slots: torch.Tensor) -> Callable[[], None]:
            return lambda: triton_reshape_and_cache_flash_per_token_head_quant(
                newest.key, newest.value, cache.keys, cache.values, cache.k_scales, cache.v_scales, slots,
                kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD,
            )  # fmt: skip

        stores = tuple(map(store, newest.slot_mappings))
        return Launches(tuple(map(call, batch.block_tables)), stores, output, batch.query, lambda: cache.rows(batch))


def dequantize_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows in model space, float64 [..., head_size], of vLLM's int4_per_token_head format.

    A row is multiplied by random signs and by a Hadamard matrix of +1 and -1, then quantized; byte j holds numbers
    2 j and 2 j + 1 from the low bits up.

    Args:
        packed: [..., head_size / 2] uint8.
        scales: [...] fp32 with the zero point in their four lowest bits.
    """
    from vllm.v1.attention.ops.int4_per_token_head import _get_rht_signs

    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).double()
    bits = scales.contiguous().view(torch.int32)
    step = (bits & -16).view(torch.float32).double()[..., None]
    rotated = (codes - (bits & 15).double()[..., None]) * step
    size = rotated.shape[-1]
    block = size & -size
    signs = _get_rht_signs(block, 0, packed.device).double().repeat(size // block)
    return rotated @ hadamard(size, packed.device, torch.float64) / block**0.5 * signs
