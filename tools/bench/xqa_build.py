"""What FlashInfer needs to have its XQA kernels: its wheel of compiled ones, or what compiles them at first use."""

import importlib.util
import os
import shutil


def missing_compiler() -> str | None:
    """What FlashInfer lacks to compile kernels, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # Where FlashInfer looks for it, in this order.
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if not any(map(shutil.which, places)):
        return "nvcc"
    return "ninja" if shutil.which("ninja") is None else None


def missing_for_xqa() -> str | None:
    """Why FlashInfer cannot have XQA's kernels, or None."""
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed"
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return None
    missing = missing_compiler()
    return f"FlashInfer compiles XQA at its first use, but {missing} is missing" if missing else None
