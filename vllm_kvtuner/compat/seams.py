"""Every place where we rely on what vLLM may change in any version: patched names, private ones, and methods that we
override though they are no interface for plugins. tests/compat checks each against the installed vLLM.

Where a version is added, entries that differ get ``since`` and ``before``; those before the oldest served one can go.
"""

from vllm_kvtuner.compat.inspection import ANY_KEYWORD, Seam

_CORE = "vllm.v1.core."
_MANAGERS = _CORE + "single_type_kv_cache_manager:"
_SPECS = "vllm.v1.kv_cache_interface:"
_CONNECTORS = "vllm.distributed.kv_transfer.kv_connector."
_OFFLOADING = _CONNECTORS + "v1.offloading."
_NIXL = _CONNECTORS + "v1.nixl."
_ARGUMENTS = "vllm.engine.arg_utils:"
_ATTENTION = "vllm.model_executor.layers.attention.attention:"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_ROTARY = "vllm.model_executor.layers.rotary_embedding."
_LINEAR = "vllm.model_executor.layers.linear:"

_SETTINGS = (
    Seam(
        "registry of cache dtypes", "vllm.config.cache:register_kv_cache_dtype",
        "compat.settings.register_kv_cache_dtype", ("name",), since="0.33",
    ),
    Seam(
        "handler of a cache dtype", "vllm.config.cache:KVCacheDTypeHandler",
        "compat.settings.register_kv_cache_dtype", attributes=("name", "torch_dtype", "quant_mode"), since="0.33",
    ),
    Seam(
        "no quantization as vLLM knows it", _SPECS + "KVQuantMode.NONE", "compat.settings.register_kv_cache_dtype",
        since="0.33",
    ),
    Seam(
        "closed list of cache dtypes", "vllm.config.cache:CacheDType.__args__",
        "compat.settings.register_kv_cache_dtype", before="0.33",
    ),
    Seam(
        "tensors' dtypes by cache dtype", "vllm.utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE",
        "compat.settings.register_kv_cache_dtype", before="0.33",
    ),
    Seam(
        "arguments kept by configuration class", _ARGUMENTS + "_compute_kwargs.cache_clear",
        "compat.settings.register_kv_cache_dtype", before="0.33",
    ),
    Seam(
        "arguments of the command line", _ARGUMENTS + "EngineArgs.add_cli_args", "compat.settings.add_profile_argument",
        ("parser",), exact=True,
    ),
    Seam(
        "engine arguments from the command line", _ARGUMENTS + "EngineArgs.from_cli_args",
        "compat.settings.add_profile_argument", ("args",), exact=True,
    ),
    Seam(
        "configuration that plugins share", _ARGUMENTS + "EngineArgs", "compat.settings.add_profile_argument",
        attributes=("additional_config",),
    ),
    Seam(
        "engine configuration", _ARGUMENTS + "EngineArgs.create_engine_config", "compat.settings.check_engine_config"
    ),
)  # fmt: skip

_LAYERS = (
    Seam(
        "names of attention backends", "vllm.v1.attention.backends.registry:register_backend",
        "compat.layers.register_backend", ("backend", "class_path"),
    ),
    Seam(
        "new names of attention backends", "vllm.v1.attention.backends.registry:AttentionBackendEnum.register",
        "compat.layers.register_backend", ("name", "value"),
    ),
    Seam(
        "a layer's backend by its name", _ATTENTION + "AttentionBackendEnum.__members__",
        "compat.layers.register_backend",
    ),
    Seam(
        "construction of an attention layer", _ATTENTION + "Attention.__init__",
        "compat.layers.give_layers_their_backend",
        ("cache_config", "prefix", "attn_type", "kv_sharing_target_layer_name", "attn_backend", ANY_KEYWORD),
    ),
    Seam(
        "an attention layer's parts", _ATTENTION + "Attention", "compat.layers.give_layers_their_backend",
        attributes=("head_size", "head_size_v", "impl", "kv_cache", "layer_name", "num_kv_heads"),
    ),
    Seam(
        "construction of a model", "vllm.model_executor.model_loader.base_loader:BaseModelLoader.create_model",
        "compat.layers.check_layers_are_met", ("vllm_config", "model_config", "prefix"), exact=True,
    ),
    Seam(
        "KV cache scheme of a checkpoint",
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors:CompressedTensorsConfig",
        "compat.layers.give_layers_their_backend", attributes=("get_quant_method", "kv_cache_scheme"),
    ),
    Seam(
        "tag of the model that is being built", "vllm.compilation.backends:model_tag",
        "compat.layers.give_layers_their_backend",
    ),
    Seam(
        "layers by name", "vllm.config:CompilationConfig", "compat.layers.bind_statics_after_loading",
        attributes=("static_forward_context",),
    ),
    Seam("loading", _WORKER + ".load_model", "compat.layers.bind_statics_after_loading"),
    Seam("the loaded model", _WORKER + ".get_model", "compat.layers.bind_statics_after_loading", exact=True),
    Seam(
        "a worker's configuration", _WORKER, "compat.layers.bind_statics_after_loading", attributes=("vllm_config",)
    ),
    Seam(
        "projection of queries, keys and values", _LINEAR + "QKVParallelLinear", "engine.key_bias.key_bias",
        attributes=("bias", "head_size", "input_size", "num_heads", "num_kv_heads", "skip_bias_add"),
    ),
    Seam(
        "projection of keys alone", _LINEAR + "ColumnParallelLinear", "engine.key_bias.key_bias",
        attributes=("bias", "input_size", "skip_bias_add"),
    ),
    Seam(
        "sums over ranks", "vllm.distributed:tensor_model_parallel_all_reduce", "engine.key_bias.largest_pairs",
        ("input_",), exact=True,
    ),
    Seam(
        "rotary table before rounding", _ROTARY + "base:RotaryEmbeddingBase._compute_cos_sin_cache",
        "engine.statics.rotary_table", exact=True,
    ),
    Seam(
        "rotary table", _ROTARY + "base:RotaryEmbeddingBase", "engine.statics.rotary_table",
        attributes=("cos_sin_cache", "is_neox_style"),
    ),
    Seam(
        "Phi-3's rotary tables", _ROTARY + "phi3_long_rope_scaled_rope:Phi3LongRoPEScaledRotaryEmbedding",
        "engine.statics.rotary_table",
        attributes=("long_short_cos_sin_cache", "original_max_position_embeddings", "use_long_rope"),
    ),
    Seam(
        "M-RoPE", _ROTARY + "mrope:MRotaryEmbedding", "engine.statics.rotary_table",
        attributes=("head_size", "mrope_section"),
    ),
    Seam(
        "models of several positions", "vllm.config:ModelConfig", "engine.mrope.has_several_positions",
        attributes=("supports_multimodal_inputs", "uses_mrope"),
    ),
    Seam(
        "positions of a batch", "vllm.v1.worker.gpu_model_runner:GPUModelRunner", "engine.mrope.MRope",
        attributes=("mrope_positions",),
    ),
    Seam(
        "positions of a batch, as model runner V2 has them", "vllm.v1.worker.gpu.mm.rope:RopeState",
        "engine.mrope.MRope", attributes=("positions",),
    ),
    Seam(
        "a model's state in model runner V2", "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        "engine.mrope.MRope", attributes=("rope_state",),
    ),
    Seam(
        "what a batch's attention is", "vllm.v1.attention.backend:CommonAttentionMetadata",
        "attention.backend.KVTunerMetadataBuilder", attributes=("causal", "mm_req_doc_ranges", "positions"),
    ),
    Seam(
        "pictures in one step", "vllm.config:SchedulerConfig", "engine.checks.check_config",
        attributes=("disable_chunked_mm_input",),
    ),
    Seam(
        "what is not causal", "vllm.config:ModelConfig", "engine.causality.causality",
        attributes=("is_mm_prefix_lm",),
    ),
    Seam(
        "batches that are not causal", "vllm.config:AttentionConfig", "engine.causality.causality",
        attributes=("use_non_causal",),
    ),
    Seam(
        "CUDA graphs of a metadata builder", "vllm.v1.attention.backend:AttentionMetadataBuilder._cudagraph_support",
        "attention.backend.KVTunerMetadataBuilder",
    ),
)  # fmt: skip

_CONTEXT_PARALLEL = (
    Seam(
        "what a rank stores of a request", "vllm.v1.attention.backends.utils:get_dcp_local_seq_lens",
        "attention.context_parallel.ContextShards",
        ("seq_lens", "dcp_size", "dcp_rank", "cp_kv_cache_interleave_size"), exact=True,
    ),
    Seam(
        "parts of attention become one", "vllm.v1.attention.ops.dcp:cp_lse_ag_out_rs",
        "attention.context_parallel.ContextShards", ("cp_attn_out", "cp_attn_lse", "cp_group", "return_lse"),
    ),
    Seam(
        "the same by other messages", "vllm.v1.attention.ops.dcp:dcp_a2a_lse_reduce",
        "attention.context_parallel.ContextShards", ("cp_attn_out", "cp_attn_lse", "cp_group", "return_lse"),
    ),
    Seam(
        "ranks of an implementation", "vllm.v1.attention.backend:AttentionImplBase", "attention.impl.KVTunerImpl",
        attributes=("dcp_world_size", "can_return_lse_for_decode", "supports_dcp"),
    ),
    Seam(
        "a batch's lengths on a rank", "vllm.v1.attention.backend:CommonAttentionMetadata",
        "attention.backend.KVTunerMetadataBuilder", attributes=("dcp_local_seq_lens",),
    ),
)  # fmt: skip

_WORKERS = (
    Seam("warm-up", _WORKER + ".compile_or_warm_up_model", "compat.worker.warm_kernels_up", exact=True),
    Seam("waking up", _WORKER + ".wake_up", "compat.worker.wake_kernels_up", ("tags",), exact=True),
    Seam(
        "calls of workers, loading among them", "vllm.v1.engine.core:EngineCore.collective_rpc",
        "compat.weights.renew_what_follows_weights", ("method", "timeout", "args", "kwargs"), exact=True,
    ),
    Seam("a step", "vllm.v1.engine.core:EngineCore.step", "compat.weights.renew_what_follows_weights", exact=True),
    Seam(
        "a step of several in flight", "vllm.v1.engine.core:EngineCore.step_with_batch_queue",
        "compat.weights.renew_what_follows_weights", exact=True,
    ),
    Seam("loading anew", _WORKER + ".reload_weights", "compat.weights.renew_what_follows_weights"),
    Seam("end of an update", _WORKER + ".finish_weight_update", "compat.weights.renew_what_follows_weights"),
    Seam(
        "forgetting the cache", _CORE + "sched.scheduler:Scheduler.reset_prefix_cache",
        "compat.weights.renew_what_follows_weights", ("reset_running_requests",),
    ),
)  # fmt: skip

_BLOCKS = (
    Seam(
        "block sizes of hybrid models", "vllm.platforms.interface:Platform._align_hybrid_block_size",
        "compat.blocks.size_blocks_by_the_mean_page", ("vllm_config", "backend_cls"), exact=True,
    ),
    Seam(
        "page of a backend", "vllm.v1.attention.backend:AttentionBackend.customize_spec",
        "compat.blocks.size_blocks_by_the_mean_page", ("spec",), exact=True,
    ),
    Seam(
        "groups of unequal pages", _CORE + "kv_cache_utils:_get_packed_kv_cache_groups",
        "compat.blocks.group_layers_by_the_block", ("vllm_config", "kv_cache_spec"), exact=True, before="0.33",
    ),
    Seam(
        "groups of unequal pages", _CORE + "kv_cache_planning:_get_packed_kv_cache_groups",
        "compat.blocks.group_layers_by_the_block", ("vllm_config", "kv_cache_spec"), exact=True, since="0.33",
    ),
    Seam(
        "layout of a run", "vllm.config:CacheConfig.get_resolved_kv_cache_layout",
        "compat.blocks.group_layers_by_the_block", exact=True,
    ),
    Seam(
        "block-outermost layouts", _SPECS + "KVCacheLayout", "compat.blocks.group_layers_by_the_block",
        attributes=("is_block_outermost",),
    ),
    Seam(
        "layers that may share a group", _SPECS + "UniformTypeKVCacheSpecs.is_uniform_type",
        "blocks.sliding_groups.uniform_buckets", ("kv_cache_specs",), exact=True,
    ),
    Seam(
        "a group's specs", _SPECS + "UniformTypeKVCacheSpecs.from_specs", "blocks.sliding_groups.uniform_buckets",
        ("kv_cache_specs",), exact=True,
    ),
    Seam(
        "managers by spec", _MANAGERS + "register_all_kvcache_specs", "compat.blocks.register_recent_windows",
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
        "the scheduler's manager of blocks", _CORE + "sched.scheduler:Scheduler", "compat.blocks.allocate_where_needed",
        attributes=("vllm_config", "kv_cache_manager"),
    ),
    Seam(
        "allocation for a request", _CORE + "kv_cache_manager:KVCacheManager.allocate_slots",
        "blocks.allocation.methods_where_needed", ("request", "num_new_tokens", "num_lookahead_tokens"),
    ),
    Seam(
        "what the prefix cache is told", _CORE + "kv_cache_manager:KVCacheManager.cache_blocks",
        "blocks.allocation.methods_where_needed", ("request", "num_computed_tokens"), exact=True,
    ),
    Seam(
        "a manager's parts", _CORE + "kv_cache_manager:KVCacheManager", "blocks.allocation.methods_where_needed",
        attributes=("coordinator", "block_pool", "empty_kv_cache_blocks", "max_model_len"),
    ),
    Seam(
        "a coordinator's parts", _CORE + "kv_cache_coordinator:KVCacheCoordinator", "blocks.allocation.steps_of",
        attributes=("single_type_managers", "scheduler_block_size"),
    ),
    Seam(
        "what is known of a request", "vllm.v1.request:Request", "blocks.allocation.Steps",
        attributes=(
            "num_computed_tokens", "num_in_flight_tokens", "num_prompt_tokens", "num_tokens", "shared_prefix_boundary",
        ),
    ),
    Seam(
        "where a prompt's hits end", _CORE + "kv_cache_coordinator:replay_boundaries",
        "blocks.window_manager.tell_managers", ("num_prompt_tokens", "scheduler_block_size", "use_eagle"), exact=True,
    ),
)  # fmt: skip

_WINDOWS = (
    Seam(
        "tokens that a window keeps", _SPECS + "SlidingWindowSpec", "blocks.window_manager.RecentSpec",
        attributes=("sliding_window", "extra_retained_tokens"),
    ),
    Seam(
        "tokens that a window's block table keeps", _SPECS + "SlidingWindowSpec", "blocks.window_manager.RecentSpec",
        attributes=("num_retained_tokens",), since="0.33",
    ),
    Seam(
        "blocks of a request", _SPECS + "SlidingWindowSpec.max_admission_blocks_per_request",
        "blocks.window_manager.RecentSpec", ("max_in_flight_tokens", "max_model_len"), exact=True,
    ),
    Seam(
        "bytes of a request", _SPECS + "SlidingWindowSpec.max_memory_usage_bytes", "blocks.window_manager.RecentSpec",
        ("vllm_config",), exact=True,
    ),
    Seam(
        "construction of a window's manager", _MANAGERS + "SlidingWindowManager.__init__",
        "blocks.window_manager.RecentManager", ("kv_cache_spec", ANY_KEYWORD), exact=True,
    ),
    Seam(
        "a window's manager", _MANAGERS + "SlidingWindowManager", "blocks.window_manager.RecentManager",
        attributes=(
            "block_pool", "block_size", "cache_hit_alignment_tokens", "enable_caching", "new_block_ids",
            "req_to_blocks", "sliding_window", "use_eagle", "_null_block", "_record_new_block_ids",
        ),
    ),
    Seam(
        "tokens before a window", _MANAGERS + "SlidingWindowManager.get_num_skipped_tokens",
        "blocks.window_manager.RecentManager", ("num_computed_tokens",), exact=True,
    ),
    Seam(
        "blocks that a hit needs", _MANAGERS + "SlidingWindowManager._contiguous_blocks_for_hit",
        "blocks.window_manager.RecentManager", ("window_size", "block_size", "use_eagle"), exact=True,
    ),
    Seam(
        "blocks that are counted when found", _MANAGERS + "SlidingWindowManager._get_num_evictable_blocks",
        "blocks.window_manager.RecentManager", ("blocks",), exact=True,
    ),
    Seam(
        "hits", _MANAGERS + "SlidingWindowManager.find_longest_cache_hit", "blocks.window_manager.RecentManager",
        (
            "block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec", "drop_eagle_block",
            "alignment_tokens",
        ),
    ),
    Seam(
        "blocks that hits can reach", _MANAGERS + "SlidingWindowManager.reachable_block_mask",
        "blocks.window_manager.RecentManager", ("start_block", "end_block", "alignment_tokens", "kv_cache_spec"),
    ),
    Seam(
        "count of blocks to allocate", _MANAGERS + "SlidingWindowManager.get_num_blocks_to_allocate",
        "blocks.window_manager.RecentManager",
        ("request_id", "num_tokens", "new_computed_blocks", "total_computed_tokens", "apply_admission_cap"),
    ),
    Seam(
        "blocks that were found", _MANAGERS + "SlidingWindowManager.add_local_computed_blocks",
        "blocks.window_manager.RecentManager", ("request_id", "new_computed_blocks"),
    ),
    Seam(
        "new blocks", _MANAGERS + "SlidingWindowManager.allocate_new_blocks", "blocks.window_manager.RecentManager",
        ("request_id", "num_tokens", "num_tokens_main_model"), exact=True,
    ),
    Seam(
        "blocks behind a window", _MANAGERS + "SlidingWindowManager.remove_skipped_blocks",
        "blocks.window_manager.RecentManager",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"), exact=True,
    ),
    Seam(
        "blocks of a request that ends", _MANAGERS + "SlidingWindowManager.pop_blocks_for_free",
        "blocks.window_manager.RecentManager", ("request_id",), exact=True,
    ),
    Seam(
        "cached block by hash", _CORE + "block_pool:BlockPool.get_cached_block", "blocks.window_manager.RecentManager",
        ("block_hash", "kv_cache_group_ids"),
    ),
    Seam(
        "the pool", _CORE + "block_pool:BlockPool", "blocks.window_manager.RecentManager",
        attributes=("free_blocks", "get_new_blocks", "hash_block_size", "touch"),
    ),
    Seam(
        "a prompt's hashes", _CORE + "kv_cache_utils:resolve_block_hashes", "blocks.window_manager.RecentManager",
        ("block_hashes", "hash_block_size", "block_size", "supports_fine_grained_hash_lookup", "alignment_tokens"),
    ),
)  # fmt: skip

_CONNECTORS_AND_REPORTS = (
    Seam(
        "connectors by name", _CONNECTORS + "factory:KVConnectorFactory.get_connector_class",
        "compat.connectors.tell_connectors_of_the_profile", ("kv_transfer_config",), exact=True,
    ),
    Seam(
        "names of offloaded files", _CONNECTORS + "v1.offloading_connector:build_offloading_config",
        "compat.connectors.tell_connectors_of_the_profile", ("vllm_config",),
    ),
    Seam(
        "a model's name in offloaded files", "vllm.v1.kv_offload.config:OffloadingModelConfig",
        "compat.connectors.tell_connectors_of_the_profile", attributes=("dtype",),
    ),
    Seam(
        "where the example's files are", _CONNECTORS + "v1.example_connector:ExampleConnector",
        "compat.connectors.tell_connectors_of_the_profile", attributes=("_storage_path",),
    ),
    Seam(
        "the example's hits, and what it stores", _CONNECTORS + "v1.example_connector:ExampleConnector",
        "compat.example_files.keep_whole_files",
        attributes=(
            "_block_size", "_found_match_for_prompt", "_generate_filename_debug", "_kv_cache_config", "save_kv_layer",
        ),
    ),
    Seam(
        "tokens in the example's files", _CONNECTORS + "v1.example_connector:align_to_block_size",
        "compat.example_files.keep_whole_files", ("num_tokens", "block_size"), exact=True,
    ),
    Seam(
        "what is offloaded of a request", _OFFLOADING + "scheduler:OffloadingConnectorScheduler",
        "compat.offloading.loads_sink_tokens",
        attributes=(
            "config", "manager", "_chunks_being_loaded", "_current_batch_allocated_block_ids",
            "_current_batch_load_jobs", "_jobs", "_req_status",
        ),
    ),
    Seam(
        "what a hit on offloaded blocks finds",
        _OFFLOADING + "scheduler:OffloadingConnectorScheduler._lookup_complete_chunks",
        "compat.offloading.loads_sink_tokens", ("req_status",),
    ),
    Seam(
        "which blocks are loaded", _OFFLOADING + "scheduler:OffloadingConnectorScheduler.update_state_after_alloc",
        "compat.offloading.loads_sink_tokens", ("request", "blocks", "num_external_tokens"), exact=True,
    ),
    Seam(
        "state of an offloaded request", _OFFLOADING + "scheduler:RequestOffloadState",
        "compat.offloading.loads_sink_tokens",
        attributes=("group_states", "num_locally_computed_tokens", "req_context", "transfer_jobs"),
    ),
    Seam(
        "a load", _OFFLOADING + "common:TransferJob", "compat.offloading.loads_sink_tokens",
        attributes=("src_spec", "dst_spec"),
    ),
    Seam(
        "blocks of a load", "vllm.v1.kv_offload.base:GPULoadStoreSpec", "compat.offloading.loads_sink_tokens",
        attributes=("block_ids", "group_sizes", "block_indices"),
    ),
    Seam(
        "what an end of a transfer says of itself", _NIXL + "base_worker:compute_nixl_compatibility_hash",
        "compat.transfers.refuse_other_pages", ("vllm_config",),
    ),
    Seam(
        "handshake of transfers", _NIXL + "base_worker:NixlBaseConnectorWorker._nixl_handshake",
        "compat.transfers.refuse_other_pages",
    ),
    Seam(
        "layout for transfers", _NIXL + "connector:NixlBaseConnector.get_required_kvcache_layout",
        "compat.transfers.pack_pages_for_transfers", ("vllm_config",), exact=True,
    ),
    Seam(
        "descriptors of this end", _NIXL + "base_worker:NixlBaseConnectorWorker.register_local_xfer_handler",
        "compat.transfers.transfer_whole_pages",
    ),
    Seam(
        "regions of memory", _NIXL + "base_worker:NixlBaseConnectorWorker",
        "compat.transfers.transfer_whole_pages",
        attributes=(
            "_layer_specs", "_physical_blocks_per_logical_kv_block", "block_len_per_layer", "block_stride_per_layer",
            "compat_hash", "device_kv_caches", "engine_id", "host_xfer_buffers", "kv_caches_base_addr", "tp_rank",
            "vllm_config",
        ),
    ),
    Seam(
        "tokens that the reader of a transfer computes",
        _NIXL + "base_scheduler:NixlBaseConnectorScheduler._prefill_backoff",
        "compat.transfers.leave_last_token_to_reader", exact=True,
    ),
    Seam(
        "blocks of a request that are transferred",
        _NIXL + "base_scheduler:NixlBaseConnectorScheduler.get_exchange_clipped_blocks",
        "compat.transfers.bring_sink_tokens", ("block_ids",),
    ),
    Seam(
        "which blocks are read", _NIXL + "pull_scheduler:NixlPullConnectorScheduler.update_state_after_alloc",
        "compat.transfers.bring_sink_tokens", ("request", "blocks", "num_external_tokens"), exact=True,
    ),
    Seam(
        "requests that are to be read", _NIXL + "base_scheduler:NixlBaseConnectorScheduler",
        "compat.transfers.bring_sink_tokens", attributes=("_reqs_need_recv", "kv_cache_config", "vllm_config"),
    ),
    Seam(
        "groups that are transferred", _SPECS + "KVCacheConfig.select_transfer_block_ids",
        "compat.transfers.bring_sink_tokens", ("block_ids",), exact=True,
    ),
    Seam(
        "states of linear attention", "vllm.model_executor.models:ModelRegistry", "engine.page_facts.refused_transfers",
        attributes=("resolve_model_cls",),
    ),
    Seam(
        "capacity", _CORE + "kv_cache_utils:update_kv_cache_capacity", "compat.reporting.log_capacity_once",
        ("vllm_config", "kv_cache_config"), exact=True,
    ),
    Seam(
        "capacity, as the engine core has it", "vllm.v1.engine.core:update_kv_cache_capacity",
        "compat.reporting.log_capacity_once",
    ),
    Seam(
        "tokens that fit", _CORE + "kv_cache_utils:get_kv_cache_capacity", "blocks.capacity.log_capacity",
        ("vllm_config", "kv_cache_config"), exact=True,
    ),
    Seam(
        "where layers lie in the pool", _SPECS + "KVCacheTensor", "blocks.capacity.log_capacity",
        attributes=("size", "layers", "layer_stride", "block_stride"),
    ),
    Seam(
        "start of the cache", "vllm.v1.engine.core:EngineCore._initialize_kv_caches",
        "compat.reporting.tell_front_end_of_kernels", ("vllm_config",), exact=True,
    ),
    Seam(
        "the workers of an engine core", "vllm.v1.engine.core:EngineCore",
        "compat.reporting.tell_front_end_of_kernels", attributes=("model_executor", "vllm_config"),
    ),
    Seam(
        "an engine core's word that it is ready", "vllm.v1.engine.core:EngineCoreProc._make_ready_response",
        "compat.reporting.tell_front_end_of_kernels", exact=True,
    ),
    Seam(
        "the number of an engine core", "vllm.v1.engine.core:EngineCoreProc",
        "compat.reporting.tell_front_end_of_kernels", attributes=("engine_index",),
    ),
    Seam(
        "what an engine core says when it is ready", "vllm.v1.engine:EngineCoreReadyResponse",
        "compat.reporting.tell_front_end_of_kernels", attributes=("data_parallel_rank",),
    ),
    Seam(
        "what a front end makes of it", "vllm.v1.engine.core_client:MPClient._apply_ready_response",
        "compat.reporting.tell_front_end_of_kernels", ("payload",), exact=True,
    ),
    Seam(
        "start of metrics", "vllm.v1.metrics.loggers:PrometheusStatLogger.log_engine_initialized",
        "compat.reporting.publish_metrics", exact=True,
    ),
    Seam(
        "metrics' parts", "vllm.v1.metrics.loggers:PrometheusStatLogger", "compat.reporting.publish_metrics",
        attributes=("_gauge_cls", "engine_indexes", "vllm_config"),
    ),
)  # fmt: skip

SEAMS = _SETTINGS + _LAYERS + _CONTEXT_PARALLEL + _WORKERS + _BLOCKS + _WINDOWS + _CONNECTORS_AND_REPORTS


def seams_of(version: str) -> list[Seam]:
    """Those of a vLLM version."""
    return [seam for seam in SEAMS if seam.is_in(version)]


def broken_seams(version: str) -> list[str]:
    """What the installed vLLM of that version lacks, each problem in one line."""
    return [problem for seam in seams_of(version) if (problem := seam.problem())]
