"""Launch knobs of paged_attention and the heuristic that sets them, apart from the kernel so that they can be swept."""

import functools
from dataclasses import dataclass

import torch
import triton

from vllm_kvtuner.pages.layout import MAX_HEAD_SIZE, PageLayout

MAX_SPLITS = 128
PROGRAMS_PER_MULTIPROCESSOR = 24
"""Programs to aim at: about two waves of single-warp programs, so that a request that is done early leaves no hole."""
PROGRAMS_OF_MANY_REQUESTS = 12
"""The same where requests alone fill the card twice over and tiles are cheap: fewer splits, less to merge (H200)."""
MIN_BLOCK_M = 16 if torch.version.hip else 8
"""The narrowest matrix instruction."""
MAX_BLOCK_M = 32
"""Query rows per program; the rest of a wide group goes to other programs, which find the bytes in the L2 cache."""


@dataclass(frozen=True)
class DecodeConfig:
    """Launch knobs of one shape.

    Args:
        block_m: query rows (heads of the group times query tokens) per program.
        block_n: cached tokens per tile, a power of two of at least 16.
        num_splits: programs that share a request's tokens.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the card; 1 where kernels are interpreted on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def decode_config(
    num_reqs: int, num_kv_heads: int, rows: int, layout: PageLayout, has_offset: bool, num_sms: int
) -> DecodeConfig:
    """Knobs for ``rows`` query rows per KV head and request; only shapes count, so that a CUDA graph may hold them.

    A warp's accumulators are block_m * head_size numbers and padding, 1024 of which take 32 registers a thread, as do
    64 tokens of codes at head_size 128 and 32 tokens of a rotary table.
    """
    block_m = min(max(MIN_BLOCK_M, triton.next_power_of_2(rows)), MAX_BLOCK_M)
    if layout.head_size > MAX_HEAD_SIZE:
        block_m = MIN_BLOCK_M  # with 2 warps: with 4, Triton takes Hopper's warp-group products (window_attention.py)
    elif layout.head_size > 128:
        block_m = min(block_m, MAX_BLOCK_M // 2)
    accumulators = block_m * triton.next_power_of_2(layout.head_size)
    programs = num_reqs * num_kv_heads * triton.cdiv(rows, block_m)
    narrow = layout.k_bits < 8
    wanted = PROGRAMS_OF_MANY_REQUESTS if narrow and programs >= 2 * num_sms else PROGRAMS_PER_MULTIPROCESSOR
    if layout.head_size > MAX_HEAD_SIZE:
        # What fits into 99 KB of shared memory beside two tiles of a key offset's angles.
        block_n, num_stages = 16, 2
    else:
        block_n, num_stages = 64 if narrow and accumulators <= 1024 and not has_offset else 32, 3
    return DecodeConfig(
        block_m=block_m,
        block_n=block_n,
        num_splits=min(MAX_SPLITS, triton.cdiv(wanted * num_sms, programs)),
        num_warps=max(1, accumulators // 2048),
        num_stages=num_stages,
    )
