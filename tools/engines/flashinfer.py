"""How an engine with vLLM's FlashInfer backend comes to decode by the kernel that the card has for it."""

import importlib.util
import os

from kvtuner_tools.bench.xqa_build import missing_compiler, missing_for_xqa
from kvtuner_tools.cache_setting import CacheSetting

FLASHINFER = "FLASHINFER"
"""Name of the attention backend."""
CUBIN = "VLLM_HAS_FLASHINFER_CUBIN"
"""Variable by which vLLM takes FlashInfer's precompiled kernels for installed."""


def decode_environment(setting: CacheSetting) -> dict[str, str]:
    """Variables that a setting's engine needs so that vLLM does not take another decode kernel, and does not say so.

    On compute capabilities 9.0 and 12.x the FlashInfer backend decodes by XQA. vLLM asks for FlashInfer's precompiled
    kernels before it does, though XQA is not among them: FlashInfer compiles it. Where it can, ``CUBIN`` answers vLLM.
    The variable changes nothing else then: vLLM takes FlashInfer for usable as soon as its compiler is there.

    Meant for a process of its own: vLLM remembers what it found.

    Returns:
        Variables and values; empty where vLLM needs none, and for other backends.

    Raises:
        ValueError: vLLM would decode by FlashInfer's general kernel, or FlashInfer cannot have XQA.
    """
    if setting.attention_backend != FLASHINFER:
        return {}
    from vllm.platforms import current_platform

    is_xqa = current_platform.is_device_capability(90) or current_platform.is_device_capability_family(120)
    if not (is_xqa or current_platform.is_device_capability_family(100)):
        return {}  # the general kernel is what vLLM has for this card
    if is_xqa and (missing := missing_for_xqa()):
        raise ValueError(f"{setting.label}: vLLM must decode by XQA, but {missing}")
    environment = {}
    # Without a compiler, the variable would turn FlashInfer on in the whole of vLLM.
    if is_xqa and CUBIN not in os.environ and not _has_cubin_package() and missing_compiler() is None:
        environment[CUBIN] = "1"
    os.environ.update(environment)
    kernel = "XQA" if is_xqa else "TensorRT-LLM's kernels"
    if reason := _refused_by_vllm():
        raise ValueError(f"{setting.label}: vLLM must decode by {kernel}, but {reason}")
    return environment


def _has_cubin_package() -> bool:
    return importlib.util.find_spec("flashinfer_cubin") is not None


def _refused_by_vllm() -> str | None:
    """Why vLLM would decode by FlashInfer's general kernel on a card that has another, or None."""
    from vllm import envs
    from vllm.utils.flashinfer import supports_trtllm_attention

    if supports_trtllm_attention():
        return None
    if envs.VLLM_BATCH_INVARIANT:
        return "VLLM_BATCH_INVARIANT turns that off"
    given = f", and {CUBIN} is {os.environ[CUBIN]!r}" if CUBIN in os.environ else ""
    return (
        f"finds neither the package flashinfer-cubin nor NVIDIA's server that has its kernels{given}; "
        "install it in FlashInfer's version"
    )
