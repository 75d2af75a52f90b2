"""What the cache stores, as Prometheus gauges beside vLLM's own.

The process that answers ``/metrics`` is not the one that runs the kernels, so all values follow from what it knows: the
configuration and the card's compute capability. Names begin with ``vllm:``, so that vLLM clears them with its own.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_kvtuner.engine.config import resolved_profile
from vllm_kvtuner.kernels import choice
from vllm_kvtuner.kernels.cpu import kernels as cpu
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.profile import LayerPrecision

UNQUANTIZED_KERNEL = "vllm"
"""Label of layers whose cache and kernel are vLLM's own."""


def publish(
    gauge: type[Any],
    config: VllmConfig,
    engines: Sequence[int],
    capability: tuple[int, int] | None,
    on_cpu: bool,
) -> None:
    """Set the gauges of an engine that has just started.

    Args:
        gauge: prometheus_client's Gauge, or what vLLM takes in its place.
        config: of the engine, with the tokens that fit.
        engines: indices of the engine cores (more than one with data parallelism).
        capability: the GPU's, None for one that is not NVIDIA's.
        on_cpu: whether a CPU serves.
    """
    resolved = resolved_profile(config)
    name = config.model_config.served_model_name
    values = {
        "nominal_bits": ("Mean key and value bits over layers, as papers count.", resolved.nominal_bits),
        "stored_bits": ("Bits a page holds per cached number, scales and minima included.", resolved.stored_bits),
        "kv_bytes_per_token": ("Bytes of one token over all layers and KV heads.", resolved.bytes_per_token),
        "kv_cache_tokens": ("Tokens that fit in the KV cache.", config.cache_config.kv_cache_size_tokens),
    }
    for stem, (documentation, value) in values.items():
        metric = _gauge(gauge, stem, documentation, [])
        for engine in engines:
            metric.labels(name, str(engine)).set(value)
    info = _gauge(gauge, "profile_info", "The precision profile that is served.", ["profile"])
    layers = _gauge(
        gauge,
        "layers",
        "Layers by precision pair and decode kernel, as configuration and card decide: where the rotation of a key "
        "offset is not proportional to the position, or the card fails its self-test, triton serves instead of cuda.",
        ["pair", "decode_kernel"],
    )
    counts = collections.Counter(
        (layer.pair.name, _decode_kernel(layer, capability, on_cpu)) for layer in resolved.layers
    )
    for engine in engines:
        info.labels(name, str(engine), resolved.profile.name).set(1)
        for labels, count in counts.items():
            layers.labels(name, str(engine), *labels).set(count)


def _gauge(gauge: type[Any], stem: str, documentation: str, labels: list[str]) -> Any:
    # Where several API servers run, each sets the same values.
    return gauge(
        name=f"vllm:kvtuner_{stem}",
        documentation=documentation,
        multiprocess_mode="mostrecent",
        labelnames=["model_name", "engine", *labels],
    )


def _decode_kernel(layer: LayerPrecision, capability: tuple[int, int] | None, on_cpu: bool) -> str:
    if not layer.pair.is_quantized:
        return UNQUANTIZED_KERNEL
    if on_cpu:
        return cpu.REFERENCE if cpu.unavailable(layer.shape.head_size) else cpu.COMPILED
    layout = PageLayout(layer.pair, layer.shape.head_size, BLOCK_SIZE_MULTIPLE)
    # Statics and the card's self-test are the workers'; the other transforms do not matter to the choice.
    return choice.choose_decode(layout, LayerTransforms(), 0.0, capability).kernel
