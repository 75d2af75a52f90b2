"""Time of a kernel call on the card, without the host: replayed CUDA graphs."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MIN_CALLS = 8
"""Calls a graph holds at least, so that the gap between two replays counts for little."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, quickest and slowest sample."""

    us: float
    us_min: float
    us_max: float


def time_calls(calls: Sequence[Callable[[], object]], samples: int, sample_ms: float) -> Timing:
    """Time calls that run one after the other, as a replayed CUDA graph that holds each of them at least once.

    Args:
        calls: equal work on different data, which together exceed the L2 cache.
        samples: timed samples.
        sample_ms: least duration of one, in milliseconds.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles, and makes what kernels keep between calls
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    rounds = math.ceil(MIN_CALLS / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()

    def replay(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    replay(1)
    count = max(1, math.ceil(sample_ms / replay(1)))
    times = [replay(count) * 1e3 / (count * rounds * len(calls)) for _ in range(samples)]
    return Timing(statistics.median(times), min(times), max(times))
