"""Which kernels serve a layer: CUDA's where the card and the layer allow it, else Triton's, the portable ones.

Decided before the first request and never by failure: KVTUNER_DECODE_KERNEL=cuda on a layer whose decode it does not
serve is an error. Store and gather follow the same variable, each layer by what its rows allow.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch

from vllm_kvtuner import envs
from vllm_kvtuner.layout import PageLayout
from vllm_kvtuner.transforms import LayerTransforms

logger = logging.getLogger(f"vllm.{__name__}")

CUDA = "cuda"
TRITON = "triton"
MIN_CAPABILITY = (8, 0)
DEFAULT_MAJORS = (8, 9)
"""Architectures that take the CUDA kernel unless told otherwise; newer ones only by KVTUNER_DECODE_KERNEL=cuda."""


def decode_kernel(layout: PageLayout, transforms: LayerTransforms, logits_soft_cap: float, device: torch.device) -> str:
    """``cuda`` or ``triton`` for a layer's decode; the choice and its reason are logged once.

    Raises:
        ValueError: KVTUNER_DECODE_KERNEL asks for the CUDA kernel where it cannot run.
    """

    def unsupported() -> str | None:
        from vllm_kvtuner.kernels.cuda.paged_attention import unsupported

        return unsupported(layout, transforms, logits_soft_cap, torch.cuda.get_device_capability(device))

    kernel, reason = _choose(unsupported, device)
    if envs.decode_kernel() == CUDA and kernel != CUDA:
        raise ValueError(f"KVTUNER_DECODE_KERNEL is {CUDA!r}, but {reason}; leave it unset or give {TRITON!r}")
    _log(f"decode kernel: {kernel}{reason and f', since {reason}'}")
    return kernel


def row_kernels(layout: PageLayout, device: torch.device) -> str:
    """``cuda`` or ``triton`` for a layer's store and gather; the choice and its reason are logged once."""

    def unsupported() -> str | None:
        from vllm_kvtuner.kernels.cuda.rows import unsupported

        return unsupported(layout)

    kernel, reason = _choose(unsupported, device)
    _log(f"store and gather kernels: {kernel}{reason and f', since {reason}'}")
    return kernel


def _choose(unsupported: Callable[[], str | None], device: torch.device) -> tuple[str, str]:
    """The kernel and why, "" where the CUDA kernel is simply the default."""
    asked = envs.decode_kernel()
    if asked == TRITON:
        return TRITON, f"KVTUNER_DECODE_KERNEL is {TRITON!r}"
    if reason := _no_cuda_kernel(device) or unsupported():
        return TRITON, reason
    if asked == CUDA:
        return CUDA, f"KVTUNER_DECODE_KERNEL is {CUDA!r}"
    if torch.cuda.get_device_capability(device)[0] not in DEFAULT_MAJORS:
        return TRITON, f"CUDA's is not the default on this architecture (KVTUNER_DECODE_KERNEL={CUDA} asks for it)"
    return CUDA, ""


@functools.cache
def _no_cuda_kernel(device: torch.device) -> str | None:
    """Why no CUDA source can run on the device, or None."""
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    if (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        return f"compute capability {capability} is below {MIN_CAPABILITY}"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "the package cuda-core is not installed"
    return None


@functools.cache
def _log(message: str) -> None:
    logger.info(message)
