"""What the cache stores, as Prometheus gauges beside vLLM's own.

The process that answers ``/metrics`` is not the one that runs the kernels. What the configuration does not say, which
kernels decode, the workers have told it by then (:func:`keep_decode_kernels`). Names begin with ``vllm:``, so that vLLM
clears them with its own.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_kvtuner.engine.config import AUTO_KEY, DIGEST_KEY, resolved_profile
from vllm_kvtuner.kernels import choice
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.profile import LayerPrecision

UNQUANTIZED_KERNEL = "vllm"
"""Label of layers whose cache and kernel are vLLM's own."""
GIVEN = "given"
"""Source of a profile that was named, not looked for."""
REFERENCE_KERNEL = ReferenceKernels.decode_kernel
"""Label of the CPU's."""
_KEPT = "_kvtuner_decode_kernels"
"""Where a configuration has what :func:`keep_decode_kernels` was given."""


def merge_decode_kernels(workers: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """Names of decode kernels by layer, of an engine whose workers have these.

    Layers are split among workers, or their heads are. Where one card fails its self-test, a layer counts as triton's.
    """
    merged: dict[int, str] = {}
    for kernels in workers:
        for layer, kernel in kernels.items():
            if merged.get(layer) != choice.TRITON:
                merged[layer] = kernel
    return merged


def keep_decode_kernels(config: VllmConfig, engine: int, kernels: Mapping[int, str]) -> None:
    """Remember with an engine's configuration which kernels decode, by layer; for this process alone."""
    vars(config).setdefault(_KEPT, {})[engine] = dict(kernels)


def kept_decode_kernels(config: VllmConfig, engine: int) -> dict[int, str]:
    """What :func:`keep_decode_kernels` was given, nothing without."""
    return vars(config).get(_KEPT, {}).get(engine, {})


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
    info = _gauge(
        gauge,
        "profile_info",
        "The precision profile that is served, where it was found, and a digest of what it says.",
        ["profile", "source", "digest"],
    )
    _, _, source = config.additional_config.get(AUTO_KEY, ("", "", GIVEN))
    layers = _gauge(
        gauge,
        "layers",
        "Layers by precision pair and by the kernel that decodes them; triton where any of a layer's workers has it.",
        ["pair", "decode_kernel"],
    )
    for engine in engines:
        kernels = kept_decode_kernels(config, engine)
        counts = collections.Counter(
            (layer.pair.name, kernels.get(layer.index) or _decode_kernel(layer, capability, on_cpu))
            for layer in resolved.layers
        )
        digest = config.additional_config.get(DIGEST_KEY, "")
        info.labels(name, str(engine), resolved.profile.name, source, digest).set(1)
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
        return REFERENCE_KERNEL
    layout = PageLayout(layer.pair, layer.shape.head_size, BLOCK_SIZE_MULTIPLE)
    # By configuration and card, of a layer that no worker has spoken of.
    return choice.choose_decode(layout, LayerTransforms(), 0.0, capability).kernel
