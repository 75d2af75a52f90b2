"""How vLLM's pool is cut into blocks, and who gets them."""

import functools
import importlib
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms.interface import Platform
from vllm.v1.core import kv_cache_utils, single_type_kv_cache_manager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvtuner.blocks import sliding_groups
from vllm_kvtuner.blocks.allocation import methods_where_needed
from vllm_kvtuner.blocks.state_groups import backend_of_mean_page, group_states
from vllm_kvtuner.blocks.window_manager import RecentManager, RecentSpec
from vllm_kvtuner.compat.patching import after, replace_in_core
from vllm_kvtuner.engine.config import mean_token_bytes, uses_kvtuner


def size_blocks_by_the_mean_page() -> None:
    """Choose blocks whose mean attention page holds the state of a linear-attention layer.

    Symptom: with unlike pairs, blocks are too large or hold few states. Cause: the page of the first attention layer's
    backend, for the run's dtype, stands for all. Can go when vLLM asks every layer.
    """
    original = Platform._align_hybrid_block_size.__func__

    @functools.wraps(original)
    def align(cls: type[Platform], config: VllmConfig, backend: Any) -> None:
        if uses_kvtuner(config):
            backend = backend_of_mean_page(backend, mean_token_bytes(config))
        original(cls, config, backend)

    Platform._align_hybrid_block_size = classmethod(align)


def group_layers_by_the_block() -> None:
    """Where pages are unequal, fill blocks with the states of linear-attention layers and with sliding-window layers.

    Symptom: half-empty blocks, "Mamba SSU backend has not been initialized", and a StopIteration where unlike pairs
    of sliding-window layers are in unequal numbers. Cause: vLLM splits both by the pattern of the layers' pages, which
    it takes for a repeating one, and wraps states' specs, behind which it does not look. Can go when it does not.
    """
    planning: Any = kv_cache_utils
    if not hasattr(kv_cache_utils, "_get_packed_kv_cache_groups"):  # 0.33.0
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
    original = planning._get_packed_kv_cache_groups

    @functools.wraps(original)
    def packed_groups(vllm_config: VllmConfig, kv_cache_spec: dict[str, Any]) -> Any:
        if not uses_kvtuner(vllm_config):
            return original(vllm_config, kv_cache_spec)
        buckets = sliding_groups.unequal_buckets(kv_cache_spec)
        layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
        if not buckets or not layout.is_block_outermost:
            groups = original(vllm_config, kv_cache_spec)
        else:
            rest = {name: kv_cache_spec[name] for name in kv_cache_spec if not any(name in each for each in buckets)}
            groups = original(vllm_config, rest) if rest else []
            if groups is None:  # pages that are all equal need no packing by themselves
                groups = [sliding_groups.whole_group(bucket) for bucket in sliding_groups.uniform_buckets(rest)]
            room = sliding_groups.block_bytes(groups)
            for bucket in buckets:
                groups += sliding_groups.split_to_fit(bucket, room)
        return group_states(groups) if groups and vllm_config.model_config.is_hybrid else groups

    planning._get_packed_kv_cache_groups = packed_groups


def register_recent_windows() -> None:
    """Give the caches of recent windows their manager.

    Symptom: such a cache gets the manager of sliding windows. Cause: vLLM's registry takes managers at any time, but
    registers its own only while it is empty. Can go when it tells the two apart.
    """
    original = single_type_kv_cache_manager.register_all_kvcache_specs

    @functools.wraps(original)
    def register_all_and_ours(vllm_config: Any) -> None:
        original(vllm_config)
        KVCacheSpecRegistry.register(RecentSpec, RecentManager)

    replace_in_core(single_type_kv_cache_manager, register_all_and_ours)


def allocate_where_needed() -> None:
    """Ask for a request's blocks only in steps that need some, and tell the managers of recent windows what is known of
    a request before they allocate.

    Symptoms: with 1,024 requests a fifth of the engine core's time goes there, with windows of 16 bits, which take
    several groups, more, and short steps wait for it; and the prefix cache would find nothing of a window but the end
    of a prompt. Causes: every group is asked five times for each request of each step, though it needs something only
    where a block begins or ends; a manager sees a request only once its blocks are allocated. Can go when managers are
    asked to allocate for a request, not for its name, and only where blocks end.
    """

    def watch(_: None, scheduler: Scheduler, *args: Any, **kwargs: Any) -> None:
        if uses_kvtuner(scheduler.vllm_config):
            manager = scheduler.kv_cache_manager
            for name, method in methods_where_needed(manager).items():
                setattr(manager, name, method)

    after(Scheduler, "__init__", watch)
