"""The environment variables of this package; nothing else reads os.environ."""

import os
from pathlib import Path

DEFAULT_PREFILL_WORKSPACE_TOKENS = 65536


def profile() -> str | None:
    """KVTUNER_PROFILE: the profile for vLLM entry points that parse no flags of ours."""
    return os.environ.get("KVTUNER_PROFILE") or None


def without_profile() -> dict[str, str]:
    """The environment of a process that calibrates, which is given its settings by its arguments."""
    return {name: value for name, value in os.environ.items() if name != "KVTUNER_PROFILE"}


def prefill_workspace_tokens() -> int:
    """KVTUNER_PREFILL_WORKSPACE_TOKENS: cached tokens dequantized at once for prefill over a cached prefix.

    Raises:
        ValueError: not a positive integer.
    """
    name = "KVTUNER_PREFILL_WORKSPACE_TOKENS"
    text = os.environ.get(name)
    if text is None:
        return DEFAULT_PREFILL_WORKSPACE_TOKENS
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"{name} must be a positive integer, but got {text!r}")
    return int(text)


def kernel_cache() -> Path:
    """KVTUNER_KERNEL_CACHE: folder of compiled kernels; by default in the user's cache folder."""
    if folder := os.environ.get("KVTUNER_KERNEL_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vllm_kvtuner" / "kernels"


def profile_folder() -> Path:
    """KVTUNER_PROFILE_FOLDER: the user's folder of calibrated profiles; by default in the user's data folder."""
    if folder := os.environ.get("KVTUNER_PROFILE_FOLDER"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "vllm_kvtuner" / "profiles"


def cxx() -> str | None:
    """CXX: the C++ compiler that kernels for a CPU are compiled by."""
    return os.environ.get("CXX") or None


def cpu_kernels() -> str | None:
    """KVTUNER_CPU_KERNELS: ``compiled`` or ``reference``; None takes the compiled ones where they can be compiled.

    Raises:
        ValueError: neither of the two.
    """
    name = os.environ.get("KVTUNER_CPU_KERNELS") or None
    if name not in (None, "compiled", "reference"):
        raise ValueError(f"KVTUNER_CPU_KERNELS must be compiled or reference, but got {name!r}")
    return name


def decode_kernel() -> str | None:
    """KVTUNER_DECODE_KERNEL: ``cuda`` or ``triton``; None takes CUDA's where layer and card allow it.

    Raises:
        ValueError: neither of the two.
    """
    name = os.environ.get("KVTUNER_DECODE_KERNEL") or None
    if name not in (None, "cuda", "triton"):
        raise ValueError(f"KVTUNER_DECODE_KERNEL must be cuda or triton, but got {name!r}")
    return name
