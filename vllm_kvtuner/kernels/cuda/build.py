"""Compile a CUDA source of the folder src for a card, once, and launch it: compiled code is kept on disk."""

import ctypes
import functools
import os
import re
import weakref
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from cuda.bindings import driver
from cuda.core import Kernel, ObjectCode, Program, ProgramOptions
from cuda.core.utils import FileStreamProgramCache

from vllm_kvtuner.kernels import cache_folder
from vllm_kvtuner.pages.transforms import LayerTransforms

SOURCES = Path(__file__).parent / "src"
Built = TypeVar("Built")
INCLUDE = re.compile(r'^#include "([\w/]+\.cuh)"\n', re.MULTILINE)


class Source(NamedTuple):
    """What the compiler gets.

    Args:
        stem: name of a .cu in ``SOURCES`` and of the kernel in it.
        macros: their names and values.
        headers: parts that are generated, by the name under which the source includes them.
        one_architecture: whether it takes instructions that only cards of exactly the architecture have.
    """

    stem: str
    macros: tuple[tuple[str, int], ...]
    headers: tuple[tuple[str, str], ...]
    one_architecture: bool = False

    def text(self) -> str:
        """The .cu with its parts in place of their includes, so that text and macros alone decide what is built."""
        headers = dict(self.headers)

        def part(include: re.Match[str]) -> str:
            name = include[1]
            text = headers[name] if name in headers else (SOURCES / name).read_text()
            return text.replace("#pragma once\n", "")

        return INCLUDE.sub(part, (SOURCES / f"{self.stem}.cu").read_text())


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel on one device.

    Args:
        name: of the kernel.
        kernel: keeps the loaded code.
        function: the driver's handle of it.
        block: threads of a CTA.
        shared_bytes: dynamic shared memory of a CTA.
        max_ctas: CTAs that the device runs at once.
        overlaps: whether the device can start it before the kernel before it has ended.
    """

    name: str
    kernel: Kernel
    function: int
    block: int
    shared_bytes: int
    max_ctas: int
    overlaps: bool

    def launch(self, grid: int, arguments: Any, dependent: bool = False) -> None:
        """Launch ``grid`` CTAs on torch's current stream.

        Args:
            grid: their number.
            arguments: a structure of the kernel's :class:`vllm_kvtuner.kernels.arguments.Arguments`.
            dependent: start as soon as the kernel before allows (programmatic dependent launch); the kernel itself
                waits for that one's end before it touches what that one may have written.

        Raises:
            RuntimeError: the driver refuses.
        """
        stream = torch.cuda.current_stream().cuda_stream
        config = _launch_config(grid, self.block, self.shared_bytes, stream, dependent and self.overlaps)
        # Where each argument stands. The driver copies them before it returns.
        parameters = arguments.offsets + ctypes.addressof(arguments)
        (status,) = driver.cuLaunchKernelEx(config, self.function, parameters, 0)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{self.name}: {grid} CTAs of {self.block} threads were refused: {status.name}")


@functools.lru_cache(maxsize=1024)
def _launch_config(grid: int, block: int, shared_bytes: int, stream: int, overlap: bool) -> driver.CUlaunchConfig:
    """How the driver launches; it takes longer to make than to launch a kernel, and nobody changes it afterwards."""
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
    config.sharedMemBytes = shared_bytes
    config.hStream = driver.CUstream(stream)
    if overlap:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    return config


def kept_with_transforms(build: Callable[..., Built]) -> Callable[..., Built]:
    """Remember what ``build(transforms, *key)`` returned, for as long as the transforms live."""
    built: weakref.WeakKeyDictionary[LayerTransforms, dict[tuple[Hashable, ...], Built]] = weakref.WeakKeyDictionary()

    @functools.wraps(build)
    def kept(transforms: LayerTransforms, *key: Hashable) -> Built:
        variants = built.get(transforms)
        if variants is None:
            variants = built[transforms] = {}
        found = variants.get(key)
        if found is None:
            found = variants[key] = build(transforms, *key)
        return found

    return kept


def compile_cubin(source: Source, arch: str, cache: FileStreamProgramCache | None) -> ObjectCode:
    """Compile a source for ``arch`` such as ``sm_90``, or take it from ``cache``.

    The cache's key holds source, options, architecture and the compiler's version (see cuda.core.utils).

    Raises:
        cuda.core.utils.NVRTCError: the source does not compile; with the compiler's log.
        ValueError: what was compiled cannot be kept, since the cache's disk is full or not writable.
    """
    macros = [(name, str(value)) for name, value in sorted(source.macros)]
    arch += "a" if source.one_architecture else ""
    program = Program(source.text(), "c++", ProgramOptions(arch=arch, std="c++20", define_macro=macros or None))
    try:
        return program.compile("cubin", cache=cache)
    except OSError as error:
        raise cache_folder.unusable(error) from error


def kernel_cache() -> FileStreamProgramCache:
    """The cache of compiled kernels on disk.

    Raises:
        ValueError: as :func:`vllm_kvtuner.kernels.cache_folder.make`, or its disk is full.
    """
    folder = cache_folder.make()
    try:
        return FileStreamProgramCache(folder)
    except OSError as error:
        raise cache_folder.unusable(error) from error


def compile_side_by_side(sources: Iterable[Source], device: torch.device) -> dict[Source, Exception]:
    """Compile sources for a device into the cache, from which :func:`build` takes them, one on each CPU at a time.

    The compiler lets other threads run, and the cache takes several that write: each entry is written elsewhere and
    renamed.

    Returns:
        Why, of those that do not compile.

    Raises:
        ValueError: as :func:`kernel_cache`.
    """
    arch, cache = architecture(device), kernel_cache()
    with ThreadPoolExecutor(cpus()) as threads:
        jobs = {source: threads.submit(compile_cubin, source, arch, cache) for source in dict.fromkeys(sources)}
        errors = {source: job.exception() for source, job in jobs.items()}
    return {source: error for source, error in errors.items() if isinstance(error, Exception)}


def cpus() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0))


def architecture(device: torch.device) -> str:
    """What the compiler calls a device's architecture."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def build(source: Source, block: int, shared_bytes: int, device: torch.device) -> BuiltKernel:
    """Compile and load a kernel.

    Args:
        source: of the kernel.
        block: threads of a CTA.
        shared_bytes: dynamic shared memory of a CTA.
        device: a CUDA device.
    """
    with torch.cuda.device(device):
        kernel = compile_cubin(source, architecture(device), kernel_cache()).get_kernel(source.stem)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        index = torch.cuda.current_device() if device.index is None else device.index
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, kernel.handle, driver.CUdevice(index))
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{source.stem}: {shared_bytes} bytes of shared memory were refused: {status.name}")
        per_multiprocessor = kernel.occupancy.max_active_blocks_per_multiprocessor(block, shared_bytes)
        assert per_multiprocessor > 0, (source.stem, source.macros, shared_bytes)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    max_ctas = per_multiprocessor * multiprocessors
    overlaps = torch.cuda.get_device_capability(device) >= (9, 0)
    return BuiltKernel(source.stem, kernel, int(kernel.handle), block, shared_bytes, max_ctas, overlaps)
