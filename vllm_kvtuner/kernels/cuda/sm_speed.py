"""Launch sm_speed.cu: which multiprocessors read memory faster than the others, and by how much.

Multiprocessors of a smaller cluster share its way to memory with fewer others: on one H200, 22 of 132 read 8% faster
than the rest. A kernel that gives all of them the same work ends with the slower ones.
"""

import ctypes
import functools
from dataclasses import dataclass

import torch

from vllm_kvtuner.kernels.cuda.build import build

DATA_BYTES = 1 << 29
"""Several times any L2 cache."""
ROUNDS = 128
REPEATS = 5
MIN_GAIN = 1.04
"""Fast multiprocessors read at least this much faster than the median one."""
SLOW_SHARE = 32
MAX_FAST_SHARE = 38


@dataclass(frozen=True)
class SmShares:
    """How work is shared out between two kinds of multiprocessors.

    Args:
        fast: [multiprocessors] uint8, 1 where it gets ``fast_share``.
        num_fast: how many do.
        fast_share: of a fast one, where a slow one gets SLOW_SHARE.
    """

    fast: torch.Tensor
    num_fast: int
    fast_share: int


@functools.cache
def sm_shares(device: torch.device) -> SmShares:
    """Measured once per process, in a few milliseconds; DATA_BYTES are taken for as long.

    Two kinds and coarse shares, so that noise decides nothing: what a request is answered must not depend on it.
    """
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    kernel = build("sm_speed", (), 256, 0, device)
    ctas = 2 * num_sms
    data = torch.empty(DATA_BYTES, dtype=torch.uint8, device=device)
    elapsed = torch.zeros(ctas, dtype=torch.int64, device=device)
    where = torch.zeros(ctas, dtype=torch.int32, device=device)
    runs = []
    for _ in range(REPEATS):
        kernel.launch(
            ctas,
            data.data_ptr(),
            ctypes.c_uint64(DATA_BYTES // 16),
            ctypes.c_int32(ROUNDS),
            elapsed.data_ptr(),
            where.data_ptr(),
            data.data_ptr(),
        )
        index = where.long()
        count = torch.bincount(index, minlength=num_sms)
        time = torch.bincount(index, weights=elapsed.double(), minlength=num_sms)
        runs.append(count / time)
    speed = torch.stack(runs).median(dim=0).values
    return shares_of(speed.cpu().tolist(), device)


def shares_of(speed: list[float], device: torch.device | str) -> SmShares:
    """Shares for multiprocessors of this speed; NaN where none was measured."""
    measured = sorted(x for x in speed if x == x)
    median = measured[len(measured) // 2]
    is_fast = [x > MIN_GAIN * median for x in speed]
    num_fast = sum(is_fast)
    share = SLOW_SHARE
    if num_fast:
        mean_fast = sum(x for x, fast in zip(speed, is_fast, strict=True) if fast) / num_fast
        slow = [x for x, fast in zip(speed, is_fast, strict=True) if not fast and x == x]
        share = min(MAX_FAST_SHARE, round(SLOW_SHARE * mean_fast / (sum(slow) / len(slow))))
    return SmShares(torch.tensor(is_fast, dtype=torch.uint8, device=device), num_fast, share)
