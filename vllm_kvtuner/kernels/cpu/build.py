"""Compile the C++ sources of the folder src on the user's machine, once, and load them: libraries are kept on disk.

Neither torch's nor Python's headers are needed, only a compiler with OpenMP. A library is compiled for this very
processor, and found again by its source, the compiler's version and command, and the processor's features. It is
written beside its final name and renamed once it is whole, so that processes may build at once or be interrupted.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from vllm_kvtuner import envs
from vllm_kvtuner.kernels import cache_folder
from vllm_kvtuner.kernels.cpu.arguments import DECLARATIONS, declare

SOURCES = Path(__file__).parent / "src"
PARTS = ("numbers.h", "pages.h", "transforms.h", "store.h", "gather.h", "attend.h", "kernels.cpp")
"""In order; the structures of arguments.py come behind the first."""
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""Without errno and traps, floors and square roots become vector instructions; no number changes by that."""
LINK_OPTIONS = ("-shared", "-fPIC")
COMPILE_SECONDS = 300.0


class BuildError(Exception):
    """Nothing could be compiled; the message says why, in one line."""


def source() -> str:
    """The whole C++ source."""
    texts = [f'#line 1 "{name}"\n{(SOURCES / name).read_text()}' for name in PARTS]
    return "\n".join([texts[0], "namespace {", DECLARATIONS, "}", *texts[1:]])


@functools.cache
def compiler() -> str:
    """Path of the C++ compiler: the one that CXX names, or the first that is installed.

    Raises:
        BuildError: there is none.
    """
    asked = envs.cxx()
    for name in (asked,) if asked else COMPILERS:
        if found := shutil.which(name):
            return found
    names = (
        f"CXX names {asked}, which is not there" if asked else f"no C++ compiler ({', '.join(COMPILERS)}) is installed"
    )
    raise BuildError(names)


@functools.cache
def compiler_version() -> str:
    """First line of what the compiler says of itself.

    Raises:
        BuildError: as :func:`compiler`, or it does not run.
    """
    return _run([compiler(), "--version"], "").partition("\n")[0]


@functools.cache
def processor() -> str:
    """What -march=native follows: the processor's architecture and features."""
    features = {"flags", "Features", "model name", "CPU part"}
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.processor()]
    return "\n".join([platform.machine(), *(line for line in lines if line.partition("\t")[0].strip() in features)])


def library_path(head_size: int, folder: Path) -> Path:
    """Where the library for a head size is kept.

    Raises:
        BuildError: as :func:`compiler_version`.
    """
    parts = [source(), compiler(), compiler_version(), processor(), *_options(head_size)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return folder / f"head{head_size}-{digest}.so"


def library(head_size: int) -> ctypes.CDLL:
    """The operations for rows of ``head_size``, compiled if they are not kept yet. A process tries once.

    Raises:
        BuildError: no compiler, none that compiles them, or no folder to keep them in.
    """
    found = _library(head_size)
    if isinstance(found, BuildError):
        raise found
    return found


@functools.cache
def _library(head_size: int) -> ctypes.CDLL | BuildError:
    try:
        folder = cache_folder.make() / cache_folder.LIBRARIES
        path = library_path(head_size, folder)
        if not path.exists():
            _compile(head_size, path)
        loaded = ctypes.CDLL(str(path))
    except BuildError as error:
        return error
    except (ValueError, OSError) as error:  # a folder that is not the user's, is full, or forbids to run what it holds
        return BuildError(str(error))
    declare(loaded)
    return loaded


def _compile(head_size: int, path: Path) -> None:
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".unfinished")
    os.close(handle)
    try:
        _run([compiler(), *_options(head_size), "-x", "c++", "-", "-o", unfinished], source())
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _options(head_size: int) -> tuple[str, ...]:
    return (*OPTIONS, f"-DHEAD_SIZE={head_size}", *LINK_OPTIONS)


def _run(command: list[str], text: str) -> str:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"{command[0]} failed: {errors[0] if errors else f'status {done.returncode}'}")
    return done.stdout
