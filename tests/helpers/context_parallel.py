"""Decode context parallelism in engines on a CPU, where vLLM's own slot mapping does without; all else is vLLM's."""

from typing import Any

import torch

from tests.helpers.ranks import fork_ranks


def allow_on_cpu() -> None:
    """Let engines of this process have it, before the first is made."""
    from vllm.utils import cpu_triton_utils

    from vllm_kvtuner.engine import checks

    fork_ranks()
    cpu_triton_utils._compute_slot_mapping_kernel_impl = slot_mapping
    checks.context_parallel_on_cpu = lambda config: []


def slot_mapping(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,
    slot_mapping: torch.Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int = 1,
    TOTAL_CP_RANK: int = 0,
    CP_KV_CACHE_INTERLEAVE_SIZE: int = 1,
    *_: Any,
) -> None:
    """As ``ComputeSlotMappingKernel`` of vllm/v1/worker/block_table.py."""
    ranks, interleave = TOTAL_CP_WORLD_SIZE, CP_KV_CACHE_INTERLEAVE_SIZE
    lens = query_start_loc.diff()
    requests = torch.arange(len(lens)).repeat_interleave(lens)
    position = positions[: len(requests)].long()
    block, offset = position // (KV_CACHE_BLOCK_SIZE * ranks), position % (KV_CACHE_BLOCK_SIZE * ranks)
    local = offset // (ranks * interleave) * interleave + offset % interleave
    slots = block_table[requests, block].long() * KV_CACHE_BLOCK_SIZE + local
    slot_mapping.fill_(-1)
    slot_mapping[: len(requests)] = torch.where(offset // interleave % ranks == TOTAL_CP_RANK, slots, -1)
