"""Which kernels serve a layer: CUDA's where the card and the layer allow it, else Triton's, the portable ones.

Decided before the first request, by rule and by the card's self-test (trial.py), and never by failure under a request:
KVTUNER_DECODE_KERNEL=cuda on a layer whose decode it does not serve, or on a card that fails, is an error. Store and
gather follow the same variable, each layer by what its rows allow.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from vllm_kvtuner import envs
from vllm_kvtuner.kernels.cuda import rows
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms

logger = logging.getLogger(f"vllm.{__name__}")

CUDA = "cuda"
TRITON = "triton"
MIN_CAPABILITY = (8, 0)

NO_TRANSFORMS = LayerTransforms()

Failure = Callable[[], str | None]
"""Asks how the CUDA kernels failed on the card, None if they did not; asked only where they would serve otherwise."""


class Choice(NamedTuple):
    """A kernel and why.

    Args:
        kernel: ``cuda`` or ``triton``.
        reason: "" where the CUDA kernel is simply the default.
    """

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}{self.reason and f', since {self.reason}'}"


def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU, None where torch is built without CUDA."""
    return None if torch.version.cuda is None else torch.cuda.get_device_capability(device)


def choose_decode(
    layout: PageLayout,
    transforms: LayerTransforms,
    logits_soft_cap: float,
    capability: tuple[int, int] | None,
    write_lse: bool = False,
    failure: Failure = lambda: None,
    has_sinks: bool = False,
) -> Choice:
    """The decode kernel of a layer on cards of a compute capability.

    Args:
        layout: of the pages.
        transforms: of the layer.
        logits_soft_cap: of its attention.
        capability: of the card, None for one that is not NVIDIA's.
        write_lse: the layer has a recent window.
        failure: of the CUDA kernels on the card; by default the rules alone decide.
        has_sinks: the layer has attention sinks.

    Raises:
        ValueError: KVTUNER_DECODE_KERNEL asks for the CUDA kernel where it cannot run or fails.
    """

    def unsupported() -> str | None:
        # Needs cuda-core, which is looked for first.
        from vllm_kvtuner.kernels.cuda.paged_attention import unsupported

        assert capability is not None
        return unsupported(layout, transforms, logits_soft_cap, capability, write_lse, has_sinks)

    choice = _choose(unsupported, capability, failure)
    if envs.decode_kernel() == CUDA and choice.kernel != CUDA:
        raise ValueError(f"KVTUNER_DECODE_KERNEL is {CUDA!r}, but {choice.reason}; leave it unset or give {TRITON!r}")
    return choice


def choose_rows(
    layout: PageLayout,
    capability: tuple[int, int] | None,
    failure: Failure = lambda: None,
    transforms: LayerTransforms = NO_TRANSFORMS,
) -> Choice:
    """The store and gather kernels of a layer on cards of a compute capability; arguments as :func:`choose_decode`."""
    return _choose(lambda: rows.unsupported(layout, transforms), capability, failure)


def may_take_cuda(layout: PageLayout, capability: tuple[int, int] | None) -> bool:
    """Whether a layer has the CUDA kernels, for its rows at least, unless they fail on the card."""
    return choose_rows(layout, capability).kernel == CUDA


def decode_kernel(
    layout: PageLayout,
    transforms: LayerTransforms,
    logits_soft_cap: float,
    device: torch.device,
    write_lse: bool,
    failure: Failure,
    has_sinks: bool = False,
) -> str:
    """``cuda`` or ``triton`` for a layer's decode; the choice and its reason are logged once.

    Raises:
        ValueError: as :func:`choose_decode`.
    """
    capability = device_capability(device)
    choice = choose_decode(layout, transforms, logits_soft_cap, capability, write_lse, failure, has_sinks)
    _log(f"decode kernel: {choice}")
    return choice.kernel


def row_kernels(
    layout: PageLayout, device: torch.device, failure: Failure, transforms: LayerTransforms = NO_TRANSFORMS
) -> str:
    """``cuda`` or ``triton`` for a layer's store and gather; the choice and its reason are logged once."""
    choice = choose_rows(layout, device_capability(device), failure, transforms)
    _log(f"store and gather kernels: {choice}")
    return choice.kernel


def _choose(unsupported: Callable[[], str | None], capability: tuple[int, int] | None, failure: Failure) -> Choice:
    asked = envs.decode_kernel()
    if asked == TRITON:
        return Choice(TRITON, f"KVTUNER_DECODE_KERNEL is {TRITON!r}")
    if reason := _no_cuda_kernel(capability) or unsupported():
        return Choice(TRITON, reason)
    if reason := failure():
        return Choice(TRITON, f"the CUDA kernels failed their self-test on this card ({reason})")
    return Choice(CUDA, f"KVTUNER_DECODE_KERNEL is {CUDA!r}" if asked == CUDA else "")


@functools.cache
def _no_cuda_kernel(capability: tuple[int, int] | None) -> str | None:
    """Why no CUDA source can run on cards of a compute capability, or None."""
    if capability is None:
        return "torch is built without CUDA"
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability} is below {MIN_CAPABILITY}"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "the package cuda-core is not installed"
    return None


@functools.cache
def _log(message: str) -> None:
    logger.info(message)
