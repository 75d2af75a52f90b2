"""What moves blocks: connectors, NIXL, offloading."""

from vllm_kvtuner.compat.inspection import Seam
from vllm_kvtuner.compat.seams.names import SPECS

_CONNECTORS = "vllm.distributed.kv_transfer.kv_connector."
_OFFLOADING = _CONNECTORS + "v1.offloading."
_NIXL = _CONNECTORS + "v1.nixl."

SEAMS = (
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
        "groups that are transferred", SPECS + "KVCacheConfig.select_transfer_block_ids",
        "compat.transfers.bring_sink_tokens", ("block_ids",), exact=True,
    ),
    Seam(
        "states of linear attention", "vllm.model_executor.models:ModelRegistry", "engine.page_facts.refused_transfers",
        attributes=("resolve_model_cls",),
    ),
)  # fmt: skip
