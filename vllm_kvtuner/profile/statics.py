"""Static per-channel tensors of key transforms: a safetensors file beside the profile.

Tensors are float32, one per transform and layer, before tensor parallelism slices their heads::

    layers.{i}.key_offset         [num_kv_heads, head_size]   mean (or bias) of the keys before RoPE
    layers.{i}.key_equalization   [num_kv_heads, head_size]   positive factor that keys are divided by

Channels stand in the order in which the k projection emits a head. Equalization commutes with RoPE only where both
channels of a RoPE pair have one factor; the file's metadata says which channels pair: ``rotary_dim`` (default: all of
head_size) and ``rope_style``, ``neox`` (default: i with i + rotary_dim / 2) or ``interleaved`` (2 i with 2 i + 1).
"""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_kvtuner.profile.problems import Problems, show
from vllm_kvtuner.profile.profile import LayerPrecision, ResolvedProfile

KINDS = ("key_offset", "key_equalization")
ROPE_STYLES = ("neox", "interleaved")

_NAME = re.compile(r"layers\.(?:0|[1-9][0-9]*)\.(?:key_offset|key_equalization)")


@dataclass(frozen=True)
class LayerStatics:
    """Static tensors of one layer, each [num_kv_heads, head_size] float32 or None where the layer does without.

    Args:
        key_offset: subtracted, rotated to the key's position.
        key_equalization: divided out of the key after that.
    """

    key_offset: np.ndarray | None = None
    key_equalization: np.ndarray | None = None


def load_statics(path: Path, resolved: ResolvedProfile) -> dict[int, LayerStatics]:
    """Read what the layers of a profile use.

    Args:
        path: the safetensors file.
        resolved: the profile, matched with its model.

    Returns:
        One entry for each layer that uses a static tensor; tensors of transforms that are off are not read.

    Raises:
        ProfileError: everything wrong with the file: not readable, tensors missing, unknown or of another shape or
            dtype, numbers that are not finite, factors that are not positive or not equal within a RoPE pair.
    """
    problems = Problems(str(path))
    statics: dict[int, LayerStatics] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if unknown := sorted(name for name in names if not _NAME.fullmatch(name)):
                rule = f"must be named layers.<layer>.{' or layers.<layer>.'.join(KINDS)}"
                problems.add("tensors", rule, show(unknown))
            metadata = file.metadata() or {}
            for layer in resolved.layers:
                wanted = {kind: f"layers.{layer.index}.{kind}" for kind in KINDS if getattr(layer.transforms, kind)}
                tensors = {kind: _read(problems, file, names, name, layer) for kind, name in wanted.items()}
                if (factors := tensors.get("key_equalization")) is not None:
                    _check_factors(problems, wanted["key_equalization"], factors, metadata)
                if tensors:
                    statics[layer.index] = LayerStatics(**tensors)
    except OSError as error:
        problems.add("the file", "must be readable", error.strerror or "no such file")
    except SafetensorError as error:
        problems.add("the file", "must be a complete safetensors file", str(error))
    problems.raise_if_any()
    return statics


def _read(problems: Problems, file: Any, names: set[str], name: str, layer: LayerPrecision) -> np.ndarray | None:
    if name not in names:
        problems.add(name, "must be there, since the profile uses it", "none")
        return None
    expected = (layer.shape.num_kv_heads, layer.shape.head_size)
    stored = file.get_slice(name)
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shape != expected:
        problems.add(name, f"must have the shape {expected} (num_kv_heads, head_size)", str(shape))
    if dtype != "F32":
        problems.add(name, "must be F32", dtype)
    if shape != expected or dtype != "F32":
        return None
    tensor = file.get_tensor(name)
    if not np.isfinite(tensor).all():
        problems.add(name, "must be finite", _first_bad(tensor, ~np.isfinite(tensor)))
        return None
    return tensor


def _check_factors(problems: Problems, name: str, factors: np.ndarray, metadata: Mapping[str, str]) -> None:
    if (factors <= 0).any():
        problems.add(name, "must be positive", _first_bad(factors, factors <= 0))
    head_size = factors.shape[1]
    rotary_dim = metadata.get("rotary_dim", str(head_size))
    style = metadata.get("rope_style", "neox")
    known_dim = re.fullmatch("[0-9]{1,4}", rotary_dim) is not None and int(rotary_dim) <= head_size
    if not known_dim or int(rotary_dim) % 2:
        problems.add("metadata.rotary_dim", f"must be an even number up to head_size {head_size}", show(rotary_dim))
        return
    if style not in ROPE_STYLES:
        problems.add("metadata.rope_style", f"must be one of {', '.join(ROPE_STYLES)}", show(style))
        return
    first, second = rope_pairs(head_size, int(rotary_dim), style)
    unequal = np.zeros(factors.shape, dtype=bool)
    unequal[:, first] = factors[:, first] != factors[:, second]
    if unequal.any():
        head, channel = np.argwhere(unequal)[0]
        partner = second[list(first).index(channel)]
        rule = f"must be equal within a RoPE pair ({style}, rotary_dim {rotary_dim})"
        got = f"{factors[head, channel]:g} and {factors[head, partner]:g} in channels {channel} and {partner}"
        problems.add(name, rule, f"{got} of head {head}")


def rope_pairs(head_size: int, rotary_dim: int, style: str) -> tuple[np.ndarray, np.ndarray]:
    """Channels of the first and of the second number of every RoPE pair, each [rotary_dim / 2].

    Args:
        head_size: channels per head.
        rotary_dim: leading channels that RoPE rotates, at most head_size.
        style: ``neox`` or ``interleaved``.
    """
    assert rotary_dim <= head_size, (rotary_dim, head_size)
    index = np.arange(rotary_dim // 2)
    return (index, index + rotary_dim // 2) if style == "neox" else (2 * index, 2 * index + 1)


def _first_bad(tensor: np.ndarray, bad: np.ndarray) -> str:
    head, channel = np.argwhere(bad)[0]
    return f"{tensor[head, channel]:g} in channel {channel} of head {head}"


def save_statics(path: Path, statics: Mapping[int, LayerStatics], metadata: Mapping[str, str]) -> None:
    """Write the file at once, complete, or not at all.

    Args:
        path: where to; replaced if it exists.
        statics: tensors per layer, [num_kv_heads, head_size].
        metadata: how they were made; ``rotary_dim`` and ``rope_style`` where they are not the defaults.
    """
    tensors = {
        f"layers.{layer}.{kind}": np.ascontiguousarray(tensor, dtype=np.float32)
        for layer, each in statics.items()
        for kind in KINDS
        if (tensor := getattr(each, kind)) is not None
    }
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not np.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} must be finite and [num_kv_heads, head_size], but got {tensor.shape}")
    data = save(tensors, metadata=dict(metadata))
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            # A temporary file is private to its owner; the finished one should be as readable as any other.
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
