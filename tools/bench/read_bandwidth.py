"""The card's read bandwidth, as a plain kernel sees it."""

import functools

import torch
import triton
import triton.language as tl

from kvtuner_tools.bench.timing import time_calls

BYTES = 2 << 30
SAMPLES, SAMPLE_MS = 5, 5.0
CONFIGS = ((2048, 4), (4096, 4), (4096, 8), (8192, 8))
"""Numbers a program reads at once, and its warps; the quickest counts."""
STEPS = 4


@triton.jit
def _sum_kernel(source_ptr, sink_ptr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Sum of BLOCK * STEPS int32 numbers per program, so that no load can be left out."""
    begin = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        total += tl.load(source_ptr + begin + step * BLOCK + index)
    tl.store(sink_ptr + tl.program_id(0), tl.sum(total))


def read_sums(source: torch.Tensor, block: int, num_warps: int) -> torch.Tensor:
    """Sums int32 of consecutive ``block * STEPS`` numbers of ``source`` int32, whose size they divide."""
    programs = source.numel() // (block * STEPS)
    sink = torch.empty(programs, dtype=torch.int32, device=source.device)
    _sum_kernel[(programs,)](source, sink, BLOCK=block, STEPS=STEPS, num_warps=num_warps)
    return sink


def measure_read_bandwidth(device: torch.device) -> float:
    """Bytes per second of one large contiguous read with the quickest of ``CONFIGS``, timed as kernels are."""
    source = torch.zeros(BYTES // 4, dtype=torch.int32, device=device)
    calls = (functools.partial(read_sums, source, block, num_warps) for block, num_warps in CONFIGS)
    return BYTES / (min(time_calls([call], SAMPLES, SAMPLE_MS).us for call in calls) * 1e-6)
