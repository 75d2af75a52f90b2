"""What the log and ``/metrics`` say of our cache."""

import dataclasses
import functools
from typing import Any

import msgspec
from vllm.platforms import current_platform
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine import EngineCoreReadyResponse
from vllm.v1.engine.core import EngineCore, EngineCoreProc
from vllm.v1.engine.core_client import MPClient
from vllm.v1.metrics.loggers import PrometheusStatLogger

from vllm_kvtuner.blocks import capacity
from vllm_kvtuner.compat.patching import after, replace_in_core
from vllm_kvtuner.compat.worker import decode_kernels
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


@dataclasses.dataclass
class ReadyResponse(EngineCoreReadyResponse):
    """What an engine core tells a front end when it is ready, and a word of ours, which vLLM's decoder passes over."""

    kvtuner_decode_kernels: dict[int, str] | None = None


def tell_front_end_of_kernels() -> None:
    """Let the process that answers ``/metrics`` know which kernels decode.

    Symptom: its gauge says ``cuda`` on a card whose self-test has failed. Cause: workers alone know, and what an engine
    core tells of itself when it is ready has no room for plugins. Can go when it has, or when workers publish metrics.
    """

    def ask_workers(_: Any, core: EngineCore, vllm_config: Any) -> None:
        # Behind the warm-up, in which each layer chooses.
        if uses_kvtuner(vllm_config):
            kernels = metrics.merge_decode_kernels(core.model_executor.collective_rpc(decode_kernels))
            # An engine in the front end's own process has no index; there the configuration is the front end's too.
            metrics.keep_decode_kernels(vllm_config, getattr(core, "engine_index", 0), kernels)

    ready_response = EngineCoreProc._make_ready_response

    @functools.wraps(ready_response)
    def make_ready_response(self: EngineCoreProc) -> Any:
        response = ready_response(self)
        if not uses_kvtuner(self.vllm_config):
            return response
        kernels = metrics.kept_decode_kernels(self.vllm_config, self.engine_index)
        return ReadyResponse(**vars(response), kvtuner_decode_kernels=kernels)

    def remember(_: None, client: MPClient, payload: bytes) -> None:
        if payload and uses_kvtuner(client.vllm_config):
            told = msgspec.msgpack.decode(payload)
            kernels = told.get("kvtuner_decode_kernels") or {}
            metrics.keep_decode_kernels(client.vllm_config, told["data_parallel_rank"], kernels)

    after(EngineCore, "_initialize_kv_caches", ask_workers)
    EngineCoreProc._make_ready_response = make_ready_response
    after(MPClient, "_apply_ready_response", remember)


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
