"""An engine's ranks: what each has of a model, and how that comes together. All of it runs in vLLM's workers.

Tensor-parallel ranks hold parts of each layer's heads, and pipeline-parallel stages hold layers. With fewer KV heads
than tensor-parallel ranks, each KV head is on several.
"""

from typing import Any

import torch


def writes() -> bool:
    """Whether this rank writes for its pipeline stage: the first of those that have the same layers."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0


def gives_logits() -> bool:
    """Whether this rank is the one whose logits count: the first of the last pipeline stage."""
    from vllm.distributed import get_pp_group

    return writes() and get_pp_group().is_last_rank


def make_room_for_stage_before(runner: Any) -> None:
    """Give a model runner the tensors that take what the pipeline stage before gives, where it has none.

    vLLM makes them in its first pass on a GPU, and on a CPU where a model is compiled, which engines that measure do
    without.
    """
    from vllm.distributed import get_pp_group

    if runner.device.type == "cpu" and not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def num_ranks() -> int:
    """Tensor-parallel ranks."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_world_size()


def kv_head_copies(local: int, total: int) -> int:
    """Ranks that have the same KV head.

    Args:
        local: KV heads of a rank.
        total: of the model.
    """
    return local * num_ranks() // total if num_ranks() > 1 else 1


def whole_heads(rows: torch.Tensor, copies: int = 1) -> torch.Tensor:
    """The heads of all ranks, [num_tokens, heads, head_size], of this rank's; every rank must ask.

    Args:
        rows: [num_tokens, heads of this rank, head_size].
        copies: ranks that have the same heads.
    """
    from vllm.distributed import tensor_model_parallel_all_gather

    if num_ranks() == 1:
        return rows
    return tensor_model_parallel_all_gather(rows.contiguous(), dim=1)[:, ::copies]


def whole_sum(part: torch.Tensor) -> torch.Tensor:
    """The sum over the tensor-parallel ranks; every rank must ask."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    return part if num_ranks() == 1 else tensor_model_parallel_all_reduce(part)


def from_first(value: Any) -> Any:
    """What the first tensor-parallel rank has, pickled; every rank must ask."""
    from vllm.distributed import get_tp_group

    return value if num_ranks() == 1 else get_tp_group().broadcast_object(value, src=0)
