"""What the log and ``/metrics`` say of our cache."""

import functools
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_kvtuner.blocks import capacity
from vllm_kvtuner.compat.patching import after, replace_in_core
from vllm_kvtuner.engine import metrics
from vllm_kvtuner.engine.config import uses_kvtuner


def log_capacity_once() -> None:
    """Log our summary next to vLLM's "GPU KV cache size", and refuse a pool that is too small for one request.

    Symptoms: vLLM's line does not say bits, and a request may wait for ever. Causes: vLLM knows no bits, and counts
    what a request holds while it decodes, not the recent windows of a prompt in flight. Needed by nothing else.
    """
    original = kv_cache_utils.update_kv_cache_capacity

    @functools.wraps(original)
    def update_and_log(vllm_config: Any, kv_cache_config: Any) -> None:
        original(vllm_config, kv_cache_config)
        if uses_kvtuner(vllm_config):
            capacity.check_capacity(vllm_config, kv_cache_config)
            capacity.log_capacity(vllm_config, kv_cache_config)

    replace_in_core(kv_cache_utils, update_and_log)


def publish_metrics() -> None:
    """Add our gauges to ``/metrics``.

    Symptom: a dashboard sees tokens, but neither bits nor kernels. Cause: vLLM's stat logger plugins cannot add to its
    Prometheus logger, and each engine that is made anew clears what is named ``vllm:``. Can go when it takes gauges.
    """

    def publish(_: None, stat_logger: PrometheusStatLogger) -> None:
        config = stat_logger.vllm_config
        if not uses_kvtuner(config):
            return
        # By NVML, since this process is to make no CUDA context.
        capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
        metrics.publish(
            stat_logger._gauge_cls,
            config,
            stat_logger.engine_indexes,
            None if capability is None else (capability.major, capability.minor),
            current_platform.is_cpu(),
        )

    after(PrometheusStatLogger, "log_engine_initialized", publish)
