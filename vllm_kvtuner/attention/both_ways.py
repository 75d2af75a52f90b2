"""Tokens of a prompt that attend to each other in both directions: a picture's, in Gemma 3 and prefix language models.

Causal attention gives a token what lies before it. What is missing are the later tokens of its own picture, which are
fresh as it is: vLLM computes a picture in one step. Reversed, with each query beside the key after it, that is causal
attention again,

    queries  b-1 b-2 ... a        keys  b b-1 ... a+1        of a picture's fresh tokens a .. b

so any causal kernel serves it, and it is merged by log-sum-exp as a segment of its own. All of it is stored packed, and
decoding, which comes after all pictures, needs to know nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_kvtuner.attention.prefill_plan import to_device


class Run(NamedTuple):
    """Fresh tokens that follow each other and attend in both directions.

    Args:
        request: of the batch.
        first: its first row among the batch's tokens.
        last: its last row.
    """

    request: int
    first: int
    last: int

    @property
    def num_queries(self) -> int:
        """Tokens that have a later one in their run."""
        return self.last - self.first


@dataclass(frozen=True)
class BothWays:
    """What of a batch attends in both directions.

    Args:
        runs: of tokens; in the order of requests.
        query_rows: [n] int64 on the device, rows of the batch's tokens, run by run from the one before the last on.
        key_rows: [n] int64 on the device, for each the row after it.
        cu_lens: [num_runs + 1] int32 on the device, where each run begins among the n.
        longest: the most queries of a run.
    """

    runs: tuple[Run, ...]
    query_rows: torch.Tensor
    key_rows: torch.Tensor
    cu_lens: torch.Tensor
    longest: int


def both_ways(
    ranges: Mapping[int, Sequence[tuple[int, int]]] | None,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    num_reqs: int,
    device: torch.device,
) -> BothWays | None:
    """What of a batch attends in both directions; None if nothing does.

    Args:
        ranges: by request of the batch, the first and the last token of each picture, counted in the request.
        query_start_loc: [>= num_reqs + 1] int32 on the host.
        seq_lens: [>= num_reqs] on the host, exact for prompts.
        num_reqs: requests of the batch.
        device: where the kernels read it.
    """
    if not ranges or not any(ranges.values()):
        return None
    starts, ends = query_start_loc[: num_reqs + 1].tolist(), seq_lens[:num_reqs].tolist()
    runs = []
    for request, (begin, end, length) in enumerate(zip(starts, starts[1:], ends, strict=False)):
        context = length - (end - begin)
        for first, last in ranges.get(request, ()):
            run = Run(request, begin + max(first - context, 0), begin + min(last - context, length - 1 - context))
            if run.num_queries > 0:
                runs.append(run)
    if not runs:
        return None
    queries = torch.cat([torch.arange(run.last - 1, run.first - 1, -1) for run in runs])
    lens = torch.tensor([run.num_queries for run in runs], dtype=torch.int32)
    cumulative = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
    rows, keys, bounds = (to_device(each, device) for each in (queries, queries + 1, cumulative))
    return BothWays(tuple(runs), rows, keys, bounds, int(lens.max()))


def window_of_run(sliding_window: int | None, clamped: bool, longest: int) -> int | None:
    """The sliding window of the reversed attention: tokens that a query sees, the key beside it included.

    Args:
        sliding_window: of the layer, or None.
        clamped: it holds within pictures too (Gemma 4).
        longest: the most queries of a run.

    Raises:
        ValueError: a picture is longer than a window that does not hold within it, so that what causal attention gives
            of the picture is cut off. vLLM leaves such pictures causal.
    """
    if sliding_window is None:
        return None
    if clamped:
        return sliding_window - 1
    if longest >= sliding_window:
        raise ValueError(
            f"a picture of {longest + 1} tokens that attend in both directions must fit the layer's sliding window of "
            f"{sliding_window}"
        )
    return None
