"""Where in vLLM the seams lie, as more than one file begins their names."""

CORE = "vllm.v1.core."
MANAGERS = CORE + "single_type_kv_cache_manager:"
SPECS = "vllm.v1.kv_cache_interface:"
WORKER = "vllm.v1.worker.gpu_worker:Worker"
