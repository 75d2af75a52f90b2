"""What is logged and published of the cache."""

from vllm_kvtuner.compat.inspection import Seam
from vllm_kvtuner.compat.seams.names import CORE, SPECS

SEAMS = (
    Seam(
        "capacity", CORE + "kv_cache_utils:update_kv_cache_capacity", "compat.reporting.log_capacity_once",
        ("vllm_config", "kv_cache_config"), exact=True,
    ),
    Seam(
        "capacity, as the engine core has it", "vllm.v1.engine.core:update_kv_cache_capacity",
        "compat.reporting.log_capacity_once",
    ),
    Seam(
        "tokens that fit", CORE + "kv_cache_utils:get_kv_cache_capacity", "blocks.capacity.log_capacity",
        ("vllm_config", "kv_cache_config"), exact=True,
    ),
    Seam(
        "where layers lie in the pool", SPECS + "KVCacheTensor", "blocks.capacity.log_capacity",
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
