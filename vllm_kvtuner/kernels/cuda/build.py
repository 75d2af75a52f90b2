"""Compile a CUDA source of the folder src for a card, once: compiled code is kept on disk."""

import functools
import re
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from cuda.bindings import driver
from cuda.core import Kernel, LaunchConfig, ObjectCode, Program, ProgramOptions, Stream, launch
from cuda.core.utils import FileStreamProgramCache

from vllm_kvtuner.kernels.cuda import cache_folder
from vllm_kvtuner.pages.transforms import LayerTransforms

SOURCES = Path(__file__).parent / "src"
Built = TypeVar("Built")
INCLUDE = re.compile(r'^#include "([\w/]+\.cuh)"\n', re.MULTILINE)


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel on one device.

    Args:
        kernel: as cuda.core launches it.
        block: threads of a CTA.
        shared_bytes: dynamic shared memory of a CTA.
        max_ctas: CTAs that the device runs at once.
        overlaps: whether the device can start it before the kernel before it has ended.
    """

    kernel: Kernel
    block: int
    shared_bytes: int
    max_ctas: int
    overlaps: bool

    def launch(self, grid: int, *arguments: object, dependent: bool = False) -> None:
        """Launch ``grid`` CTAs on torch's current stream.

        Args:
            grid: their number.
            arguments: ctypes or numpy scalars or device addresses.
            dependent: start as soon as the kernel before allows (programmatic dependent launch); the kernel itself
                waits for that one's end before it touches what that one may have written.
        """
        current = torch.cuda.current_stream()
        stream = _stream(current.cuda_stream, current.device_index)
        overlap = dependent and self.overlaps
        config = LaunchConfig(
            grid=grid, block=self.block, shmem_size=self.shared_bytes, programmatic_stream_serialization=overlap
        )
        launch(stream, config, self.kernel, *arguments)


def kept_with_transforms(build: Callable[..., Built]) -> Callable[..., Built]:
    """Remember what ``build(transforms, *key)`` returned, for as long as the transforms live."""
    built: weakref.WeakKeyDictionary[LayerTransforms, dict[tuple[Hashable, ...], Built]] = weakref.WeakKeyDictionary()

    @functools.wraps(build)
    def kept(transforms: LayerTransforms, *key: Hashable) -> Built:
        variants = built.get(transforms)
        if variants is None:
            variants = built[transforms] = {}
        if key not in variants:
            variants[key] = build(transforms, *key)
        return variants[key]

    return kept


@functools.lru_cache(maxsize=64)
def _stream(handle: int, device_index: int) -> Stream:
    """cuda.core's view of a stream. It takes longer to make than to launch a kernel."""
    return Stream.from_handle(handle)


def source(stem: str) -> str:
    """Text of ``stem``.cu with its parts in place of their includes, so that the text alone decides what is built."""

    def part(include: re.Match[str]) -> str:
        return (SOURCES / include[1]).read_text().replace("#pragma once\n", "")

    return INCLUDE.sub(part, (SOURCES / f"{stem}.cu").read_text())


def compile_cubin(stem: str, defines: Mapping[str, int], arch: str, cache: FileStreamProgramCache | None) -> ObjectCode:
    """Compile ``stem``.cu for ``arch`` such as ``sm_90``, or take it from ``cache``.

    The cache's key holds source, options, architecture and the compiler's version (see cuda.core.utils).

    Raises:
        cuda.core.utils.NVRTCError: the source does not compile; with the compiler's log.
        ValueError: what was compiled cannot be kept, since the cache's disk is full or not writable.
    """
    options = ProgramOptions(
        arch=arch,
        std="c++17",
        define_macro=[(name, str(value)) for name, value in sorted(defines.items())] or None,
    )
    program = Program(source(stem), "c++", options)
    try:
        return program.compile("cubin", cache=cache)
    except OSError as error:
        raise cache_folder.unusable(error) from error


def kernel_cache() -> FileStreamProgramCache:
    """The cache of compiled kernels on disk.

    Raises:
        ValueError: as :func:`vllm_kvtuner.kernels.cuda.cache_folder.make`, or its disk is full.
    """
    folder = cache_folder.make()
    try:
        return FileStreamProgramCache(folder)
    except OSError as error:
        raise cache_folder.unusable(error) from error


@functools.cache
def build(
    stem: str, defines: tuple[tuple[str, int], ...], block: int, shared_bytes: int, device: torch.device
) -> BuiltKernel:
    """Compile and load the kernel that ``stem``.cu defines under the same name.

    Args:
        stem: name of the source and of its kernel.
        defines: macros and their values.
        block: threads of a CTA.
        shared_bytes: dynamic shared memory of a CTA.
        device: a CUDA device.
    """
    with torch.cuda.device(device):
        major, minor = torch.cuda.get_device_capability(device)
        code = compile_cubin(stem, dict(defines), f"sm_{major}{minor}", kernel_cache())
        kernel = code.get_kernel(stem)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        index = torch.cuda.current_device() if device.index is None else device.index
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, driver.CUdevice(index))
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{stem}: {shared_bytes} bytes of shared memory were refused: {status.name}")
        per_multiprocessor = kernel.occupancy.max_active_blocks_per_multiprocessor(block, shared_bytes)
        assert per_multiprocessor > 0, (stem, defines, shared_bytes)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return BuiltKernel(kernel, block, shared_bytes, per_multiprocessor * multiprocessors, major >= 9)
