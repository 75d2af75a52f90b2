"""FlashInfer's XQA decode kernel, called as vLLM's FlashInfer backend of version 0.33.0 calls it in a full CUDA graph.

vLLM takes it on compute capabilities 9.0 and 12.x by ``--attention-backend FLASHINFER``. FlashInfer compiles a variant
with nvcc at its first use.
"""

from collections.abc import Callable, Sequence

import torch

from kvtuner_tools.bench.kernel_inputs import Batch, newest_tokens, token_places
from kvtuner_tools.bench.kernels.base import CacheFormat, Launches
from kvtuner_tools.bench.kernels.vllm import UnpackedCacheKernel, flash_stores, random_rows, vllm_skip_reason
from kvtuner_tools.bench.points import LayerHeads
from kvtuner_tools.bench.xqa_build import missing_for_xqa
from vllm_kvtuner.pages.transforms import LayerTransforms

CAPABILITIES = (9, 10, 12)
"""Major compute capabilities that FlashInfer's XQA has kernels for."""
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_SIZE = 256
"""With several query tokens; a head size is a multiple of 16."""
QUERY_BYTES = 16 << 10
"""Room for one KV head's queries in shared memory, each padded to 64, 128 or 256 numbers of 2 bytes."""
WORKSPACE_BYTES = 394 << 20
"""vLLM's default, semaphores included; zeros at first."""


def unserved_shape(heads: LayerHeads, block_size: int) -> str | None:
    """Why XQA has no kernel for a layer, by what its sources assert, or None."""
    if heads.sinks:
        return "attention sinks are not measured with XQA"
    if heads.head_size % 16 or not 16 <= heads.head_size <= MAX_HEAD_SIZE:
        return f"XQA's head sizes are multiples of 16 up to {MAX_HEAD_SIZE}, not {heads.head_size}"
    if block_size not in BLOCK_SIZES:
        return f"XQA's block sizes are {', '.join(map(str, BLOCK_SIZES))}, not {block_size}"
    padded = max(64, 1 << (heads.head_size - 1).bit_length())
    most = QUERY_BYTES // (2 * padded)
    if heads.group > most:
        return f"XQA serves at most {most} query heads per KV head at head size {heads.head_size}, not {heads.group}"
    return None


def draft_mask(query_lens: Sequence[int], device: torch.device) -> torch.Tensor:
    """Which of its request's query tokens each of them sees: itself and those before.

    Args:
        query_lens: query tokens of each request.
        device: of the mask.

    Returns:
        [query tokens of all requests, 2 * words] uint16, bit j of a row's 32-bit words for token j.
    """
    words = -(-max(query_lens) // 32)
    row = torch.cat([torch.arange(count) for count in query_lens])
    seen = torch.arange(32 * words) <= row[:, None]
    bits = (seen.view(len(row), 2 * words, 16).long() << torch.arange(16)).sum(-1)
    return bits.to(torch.uint16).to(device)


class Xqa(UnpackedCacheKernel):
    """``xqa_batch_decode_with_kv_cache``; queries are bf16 beside either cache, and all scales are 1.

    Requests with unequal query tokens are served as ragged ones, as vLLM serves them.
    """

    def skip_reason(self, heads: LayerHeads, block_size: int) -> str | None:
        # Its stores are vLLM's.
        if reason := vllm_skip_reason():
            return reason
        if (capability := torch.cuda.get_device_capability())[0] not in CAPABILITIES:
            return f"XQA needs compute capability 9, 10 or 12, and the card has {capability[0]}.{capability[1]}"
        return missing_for_xqa() or unserved_shape(heads, block_size)

    def build(self, batch: Batch, cache_format: CacheFormat, transforms: LayerTransforms) -> Launches:
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        kv_cache = random_rows(batch, self.dtype)
        keys, values = kv_cache.split(batch.heads.head_size, dim=-1)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=batch.device)
        output = torch.empty_like(batch.query)
        most, ragged = batch.query_tokens.most, len(set(batch.query_lens)) > 1
        mask = draft_mask(batch.query_lens, batch.device) if most > 1 else None
        if mask is not None and not ragged:
            mask = mask.view(batch.num_reqs, most, -1)

        def call(block_table: torch.Tensor) -> Callable[[], None]:
            def attend() -> None:
                xqa_batch_decode_with_kv_cache(
                    query=batch.query,
                    kv_cache=(keys, values),
                    workspace_buffer=workspace,
                    block_tables=block_table,
                    seq_lens=batch.seq_lens,
                    max_seq_len=max(batch.lengths),
                    bmm1_scale=batch.attention_shape.scale,
                    bmm2_scale=1.0,
                    window_left=-1,
                    out=output,
                    kv_layout="NHD",
                    q_len_per_req=most,
                    mask=mask,
                    q_cu_seq_lens=batch.query_start_loc if ragged else None,
                )

            return attend

        def rows() -> tuple[torch.Tensor, torch.Tensor]:
            block, offset = token_places(batch)
            return keys[block, offset], values[block, offset]

        stores = flash_stores(newest_tokens(batch), kv_cache)
        return Launches(tuple(map(call, batch.block_tables)), stores, output, batch.query, rows)
