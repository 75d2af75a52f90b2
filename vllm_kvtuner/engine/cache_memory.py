"""How much memory an engine will have for keys and values, as far as that can be told before it loads its weights.

A budget by need must choose bits then. What vLLM really has, it measures later: blocks/capacity.py compares it with
the need, and refuses to start where the estimate was too high.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvtuner.profile.hub import is_model_id
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.weights import weights_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.model_files import ModelFiles

OVERHEAD_BYTES, OVERHEAD_SHARE = 3 << 30, 0.04
"""What a device needs besides weights and cache, activations and CUDA graphs among it: the larger of the two."""


def memory_of_keys_and_values(config: VllmConfig, files: ModelFiles, spec: str, shape: ModelShape) -> int:
    """Bytes for all layers' keys and values, over all ranks of one replica.

    Args:
        config: of the engine.
        files: of its model.
        spec: what was asked for.
        shape: the model's.

    Raises:
        ProfileError: it can only be told with --kv-cache-memory-bytes.
    """
    parallel = config.parallel_config
    tensor_ranks = parallel.tensor_parallel_size
    # Ranks beyond the KV heads hold copies of them.
    heads = min((shape.layers[layer].num_kv_heads for layer in shape.attention_layers), default=1)
    return _of_a_rank(config, files, spec) * min(tensor_ranks, heads) * parallel.pipeline_parallel_size


def _of_a_rank(config: VllmConfig, files: ModelFiles, spec: str) -> int:
    from vllm.platforms import current_platform

    cache = config.cache_config
    if cache.kv_cache_memory_bytes:
        return int(cache.kv_cache_memory_bytes)
    parallel = config.parallel_config
    weights = None if files.folder is None else weights_bytes(files.folder)
    if weights is None:
        here = "which are not on this machine yet" if is_model_id(files.model) else "which cannot be read"
        rule = "the memory must be given (--kv-cache-memory-bytes) where the size of the weights is not known"
        raise ProfileError([f"{spec}: {rule}, but got none, and weights {here}"])
    total = current_platform.get_device_total_memory()
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    overhead = max(OVERHEAD_BYTES, int(OVERHEAD_SHARE * total))
    left = int(total * cache.gpu_memory_utilization) - -(-weights // ranks) - overhead
    if left <= 0:
        rule = "weights must leave memory for keys and values"
        got = f"{weights:,} bytes of weights on {ranks} devices of {total:,} bytes each"
        raise ProfileError([f"{spec}: {rule}, but got {got}; --kv-cache-memory-bytes sets it by hand"])
    return left
