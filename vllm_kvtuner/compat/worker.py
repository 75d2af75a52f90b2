"""When kernels are compiled, and what they are told after a sleep."""

import functools
from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvtuner.attention.impl import KVTunerImpl
from vllm_kvtuner.compat.patching import after
from vllm_kvtuner.engine.config import uses_kvtuner


def warm_kernels_up() -> None:
    """Compile our kernels before the first request.

    Symptom: the first long prompt waits seconds for Triton, since neither profiling nor graph capture runs the store
    and gather kernels at its sizes. Cause: no warm-up hook for attention backends. Can go when there is one.
    """
    original = Worker.compile_or_warm_up_model

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Worker) -> Any:
        for layer in _layers(self.vllm_config):
            layer.impl.warm_up(layer.kv_cache)
        return original(self)

    Worker.compile_or_warm_up_model = compile_or_warm_up_model


def wake_kernels_up() -> None:
    """Zero the decode kernel's counters after a sleep.

    Symptom: after a sleep of level 2 decoding may hang or give wrong text. Cause: the counters, which are zero between
    launches, are allocated while the model loads, so that vLLM counts them, and level 2 discards that memory; vLLM
    restores the model's buffers alone. Can go when attention implementations are told of waking up.
    """

    def wake_up(_: None, worker: Worker, tags: list[str] | None = None) -> None:
        if tags is not None and "weights" not in tags:
            return
        for layer in _layers(worker.vllm_config):
            layer.impl.wake_up()

    after(Worker, "wake_up", wake_up)


def decode_kernels(worker: Any) -> dict[int, str]:
    """Names of the kernels that decode a worker's layers, by layer; run there by the engine core."""
    layers = ((layer.impl.settings.precision.index, layer.impl.served.kernels) for layer in _layers(worker.vllm_config))
    return {index: kernels.decode_kernel for index, kernels in layers if kernels.decode_kernel is not None}


def _layers(config: VllmConfig) -> Iterator[Any]:
    """The attention layers of a run that have packed pages."""
    if uses_kvtuner(config):
        for layer in config.compilation_config.static_forward_context.values():
            if isinstance(getattr(layer, "impl", None), KVTunerImpl):
                yield layer
