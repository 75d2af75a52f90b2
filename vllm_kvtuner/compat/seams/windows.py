"""Slots and metadata of recent windows."""

from vllm_kvtuner.compat.inspection import ANY_KEYWORD, Seam
from vllm_kvtuner.compat.seams.names import CORE, MANAGERS, SPECS

SEAMS = (
    Seam(
        "tokens that a window keeps", SPECS + "SlidingWindowSpec", "blocks.window_manager.RecentSpec",
        attributes=("sliding_window", "extra_retained_tokens"),
    ),
    Seam(
        "tokens that a window's block table keeps", SPECS + "SlidingWindowSpec", "blocks.window_manager.RecentSpec",
        attributes=("num_retained_tokens",), since="0.33",
    ),
    Seam(
        "blocks of a request", SPECS + "SlidingWindowSpec.max_admission_blocks_per_request",
        "blocks.window_manager.RecentSpec", ("max_in_flight_tokens", "max_model_len"), exact=True,
    ),
    Seam(
        "bytes of a request", SPECS + "SlidingWindowSpec.max_memory_usage_bytes", "blocks.window_manager.RecentSpec",
        ("vllm_config",), exact=True,
    ),
    Seam(
        "construction of a window's manager", MANAGERS + "SlidingWindowManager.__init__",
        "blocks.window_manager.RecentManager", ("kv_cache_spec", ANY_KEYWORD), exact=True,
    ),
    Seam(
        "a window's manager", MANAGERS + "SlidingWindowManager", "blocks.window_manager.RecentManager",
        attributes=(
            "block_pool", "block_size", "cache_hit_alignment_tokens", "enable_caching", "new_block_ids",
            "req_to_blocks", "sliding_window", "use_eagle", "_null_block", "_record_new_block_ids",
        ),
    ),
    Seam(
        "tokens before a window", MANAGERS + "SlidingWindowManager.get_num_skipped_tokens",
        "blocks.window_manager.RecentManager", ("num_computed_tokens",), exact=True,
    ),
    Seam(
        "blocks that a hit needs", MANAGERS + "SlidingWindowManager._contiguous_blocks_for_hit",
        "blocks.window_manager.RecentManager", ("window_size", "block_size", "use_eagle"), exact=True,
    ),
    Seam(
        "blocks that are counted when found", MANAGERS + "SlidingWindowManager._get_num_evictable_blocks",
        "blocks.window_manager.RecentManager", ("blocks",), exact=True,
    ),
    Seam(
        "hits", MANAGERS + "SlidingWindowManager.find_longest_cache_hit", "blocks.window_manager.RecentManager",
        (
            "block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec", "drop_eagle_block",
            "alignment_tokens",
        ),
    ),
    Seam(
        "blocks that hits can reach", MANAGERS + "SlidingWindowManager.reachable_block_mask",
        "blocks.window_manager.RecentManager", ("start_block", "end_block", "alignment_tokens", "kv_cache_spec"),
    ),
    Seam(
        "count of blocks to allocate", MANAGERS + "SlidingWindowManager.get_num_blocks_to_allocate",
        "blocks.window_manager.RecentManager",
        ("request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens", "apply_admission_cap"),
    ),
    Seam(
        "blocks that were found", MANAGERS + "SlidingWindowManager.add_local_computed_blocks",
        "blocks.window_manager.RecentManager", ("request_id", "new_computed_blocks"),
    ),
    Seam(
        "new blocks", MANAGERS + "SlidingWindowManager.allocate_new_blocks", "blocks.window_manager.RecentManager",
        ("request_id", "num_tokens", "num_tokens_main_model"), exact=True,
    ),
    Seam(
        "blocks behind a window", MANAGERS + "SlidingWindowManager.remove_skipped_blocks",
        "blocks.window_manager.RecentManager",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"), exact=True,
    ),
    Seam(
        "blocks of a request that ends", MANAGERS + "SlidingWindowManager.pop_blocks_for_free",
        "blocks.window_manager.RecentManager", ("request_id",), exact=True,
    ),
    Seam(
        "cached block by hash", CORE + "block_pool:BlockPool.get_cached_block", "blocks.window_manager.RecentManager",
        ("block_hash", "kv_cache_group_ids"),
    ),
    Seam(
        "the pool", CORE + "block_pool:BlockPool", "blocks.window_manager.RecentManager",
        attributes=("free_blocks", "get_new_blocks", "hash_block_size", "touch"),
    ),
    Seam(
        "a prompt's hashes", CORE + "kv_cache_utils:resolve_block_hashes", "blocks.window_manager.RecentManager",
        ("block_hashes", "hash_block_size", "block_size", "supports_fine_grained_hash_lookup", "alignment_tokens"),
    ),
)  # fmt: skip
