"""Which decode kernel serves a layer: CUDA's where the card and the layer allow it, else Triton's, the portable one.

Decided before the first request and never by failure: KVTUNER_DECODE_KERNEL=cuda on a layer that it does not serve is
an error.
"""

import functools
import importlib.util
import logging

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
    """``cuda`` or ``triton``; the choice and its reason are logged once.

    Raises:
        ValueError: KVTUNER_DECODE_KERNEL asks for the CUDA kernel where it cannot run.
    """
    asked = envs.decode_kernel()
    if asked == TRITON:
        _log(f"decode kernel: {TRITON}, as KVTUNER_DECODE_KERNEL says")
        return TRITON
    reason = _no_cuda_kernel(device)
    if reason is None:
        from vllm_kvtuner.kernels.cuda.paged_attention import unsupported

        reason = unsupported(layout, transforms, logits_soft_cap)
    if asked == CUDA:
        if reason is not None:
            raise ValueError(f"KVTUNER_DECODE_KERNEL is {asked!r}, but {reason}; leave it unset or give {TRITON!r}")
        _log(f"decode kernel: {CUDA}, as KVTUNER_DECODE_KERNEL says")
        return CUDA
    if reason is None and torch.cuda.get_device_capability(device)[0] not in DEFAULT_MAJORS:
        reason = f"{CUDA} is not the default on this architecture (KVTUNER_DECODE_KERNEL={CUDA} asks for it)"
    if reason is not None:
        _log(f"decode kernel: {TRITON}, since {reason}")
        return TRITON
    _log(f"decode kernel: {CUDA}")
    return CUDA


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
