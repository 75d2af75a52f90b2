"""The block pool, its managers and specifications."""

from vllm_kvtuner.compat.inspection import Seam
from vllm_kvtuner.compat.seams.names import CORE, MANAGERS, SPECS

SEAMS = (
    Seam(
        "block sizes of hybrid models", "vllm.platforms.interface:Platform._align_hybrid_block_size",
        "compat.blocks.size_blocks_by_the_mean_page", ("vllm_config", "backend_cls"), exact=True,
    ),
    Seam(
        "page of a backend", "vllm.v1.attention.backend:AttentionBackend.customize_spec",
        "compat.blocks.size_blocks_by_the_mean_page", ("spec",), exact=True,
    ),
    Seam(
        "groups of unequal pages", CORE + "kv_cache_utils:_get_packed_kv_cache_groups",
        "compat.blocks.group_layers_by_the_block", ("vllm_config", "kv_cache_spec"), exact=True, before="0.33",
    ),
    Seam(
        "groups of unequal pages", CORE + "kv_cache_planning:_get_packed_kv_cache_groups",
        "compat.blocks.group_layers_by_the_block", ("vllm_config", "kv_cache_spec"), exact=True, since="0.33",
    ),
    Seam(
        "layout of a run", "vllm.config:CacheConfig.get_resolved_kv_cache_layout",
        "compat.blocks.group_layers_by_the_block", exact=True,
    ),
    Seam(
        "block-outermost layouts", SPECS + "KVCacheLayout", "compat.blocks.group_layers_by_the_block",
        attributes=("is_block_outermost",),
    ),
    Seam(
        "layers that may share a group", SPECS + "UniformTypeKVCacheSpecs.is_uniform_type",
        "blocks.sliding_groups.uniform_buckets", ("kv_cache_specs",), exact=True,
    ),
    Seam(
        "a group's specs", SPECS + "UniformTypeKVCacheSpecs.from_specs", "blocks.sliding_groups.uniform_buckets",
        ("kv_cache_specs",), exact=True,
    ),
    Seam(
        "managers by spec", MANAGERS + "register_all_kvcache_specs", "compat.blocks.register_recent_windows",
        ("vllm_config",), exact=True,
    ),
    Seam(
        "managers by spec, as the engine core has them", "vllm.v1.engine.core:register_all_kvcache_specs",
        "compat.blocks.register_recent_windows",
    ),
    Seam(
        "registry of managers", "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register",
        "compat.blocks.register_recent_windows", ("kvcache_spec_cls", "manager_class"),
    ),
    Seam(
        "the scheduler's manager of blocks", CORE + "sched.scheduler:Scheduler", "compat.blocks.allocate_where_needed",
        attributes=("vllm_config", "kv_cache_manager"),
    ),
    Seam(
        "allocation for a request", CORE + "kv_cache_manager:KVCacheManager.allocate_slots",
        "blocks.allocation.methods_where_needed", ("request", "num_new_tokens", "num_lookahead_tokens"),
    ),
    Seam(
        "what the prefix cache is told", CORE + "kv_cache_manager:KVCacheManager.cache_blocks",
        "blocks.allocation.methods_where_needed", ("request", "num_computed_tokens"), exact=True,
    ),
    Seam(
        "a manager's parts", CORE + "kv_cache_manager:KVCacheManager", "blocks.allocation.methods_where_needed",
        attributes=("coordinator", "block_pool", "empty_kv_cache_blocks", "max_model_len"),
    ),
    Seam(
        "a coordinator's parts", CORE + "kv_cache_coordinator:KVCacheCoordinator", "blocks.allocation.steps_of",
        attributes=("single_type_managers", "scheduler_block_size"),
    ),
    Seam(
        "what is known of a request", "vllm.v1.request:Request", "blocks.allocation.Steps",
        attributes=(
            "num_computed_tokens", "num_in_flight_tokens", "num_prompt_tokens", "num_tokens", "shared_prefix_boundary",
        ),
    ),
    Seam(
        "where a prompt's hits end", CORE + "kv_cache_coordinator:replay_boundaries",
        "blocks.window_manager.tell_managers", ("num_prompt_tokens", "scheduler_block_size", "use_eagle"), exact=True,
    ),
)  # fmt: skip
