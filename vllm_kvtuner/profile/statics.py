"""Static tensors of transforms: a safetensors file beside the profile.

Tensors are named by layer and transform, and cover all KV heads, before tensor parallelism slices them::

    layers.{i}.key_offset            F32 [num_kv_heads, head_size]   mean (or bias) of the keys before RoPE
    layers.{i}.key_equalization      F32 [num_kv_heads, head_size]   positive factor that keys are divided by
    layers.{i}.key_round_feedback    F16 [num_kv_heads, head_size, head_size]   factors of pages/feedback.py
    layers.{i}.key_round_feedback_ranges_{bits}bit   F32 [1 to 3]   rising factors on the range of a key's row

and value_round_feedback, with its ranges, likewise. Round feedback is for rows that went through certain transforms, so
the metadata says under its tensor's name which: of keys, those of key_equalization and key_hadamard that were on; of
values, value_hadamard; ``none`` if none was. A layer with others would round by the wrong factors, and is refused.

Channels of keys stand in the order in which the k projection emits a head. Equalization commutes with RoPE only where
both channels of a RoPE pair have one factor; the file's metadata says which channels pair: ``rotary_dim`` (default:
all of head_size) and ``rope_style``, ``neox`` (default: i with i + rotary_dim / 2) or ``interleaved`` (2 i with
2 i + 1).
"""

import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vllm_kvtuner.pages.layout import FEEDBACK_BITS, MAX_RANGES
from vllm_kvtuner.profile.problems import Problems, show
from vllm_kvtuner.profile.profile import LayerPrecision, ResolvedProfile

KINDS = ("key_offset", "key_equalization")
FEEDBACK_KINDS = ("key_round_feedback", "value_round_feedback")
RANGES_SUFFIX = "_ranges_{bits}bit"
"""What follows a feedback's name in that of its ranges in codes of some bits."""
LINEAR_TRANSFORMS = {
    "key_round_feedback": ("key_equalization", "key_hadamard"),
    "value_round_feedback": ("value_hadamard",),
}
"""Per feedback the transforms that change what its factors must be."""
NO_TRANSFORMS = "none"
ROWS = "num_kv_heads, head_size"
SQUARES = "num_kv_heads, head_size, head_size"
RANGES = "ranges"
MAX_RANGE = 2.0
"""Factor on a row's range above which it is a mistake: half of the codes would stay unused."""
ROPE_STYLES = ("neox", "interleaved")

_TENSORS = (
    *KINDS,
    *FEEDBACK_KINDS,
    *(kind + RANGES_SUFFIX.format(bits=bits) for kind in FEEDBACK_KINDS for bits in FEEDBACK_BITS),
)
_NAME = re.compile(rf"layers\.(?:0|[1-9][0-9]*)\.(?:{'|'.join(_TENSORS)})")


@dataclass(frozen=True)
class FeedbackStatics:
    """Of the keys or the values of one layer.

    Args:
        factors: [num_kv_heads, head_size, head_size] float16, upper triangular with a positive diagonal.
        ranges: per bits of a code, 1 to 3 rising factors on a row's range.
        transforms: names of those in LINEAR_TRANSFORMS that the rows had gone through.
    """

    factors: np.ndarray
    ranges: Mapping[int, tuple[float, ...]]
    transforms: tuple[str, ...]


@dataclass(frozen=True)
class LayerStatics:
    """Static tensors of one layer, each None where the layer does without.

    Args:
        key_offset: [num_kv_heads, head_size] float32, subtracted, rotated to the key's position.
        key_equalization: [num_kv_heads, head_size] float32, divided out of the key after that.
        key_round_feedback: of its keys.
        value_round_feedback: of its values.
    """

    key_offset: np.ndarray | None = None
    key_equalization: np.ndarray | None = None
    key_round_feedback: FeedbackStatics | None = None
    value_round_feedback: FeedbackStatics | None = None


def load_statics(path: Path, resolved: ResolvedProfile) -> dict[int, LayerStatics]:
    """Read what the layers of a profile use.

    Args:
        path: the safetensors file.
        resolved: the profile, matched with its model.

    Returns:
        One entry for each layer that uses a static tensor; tensors of transforms that are off are not read.

    Raises:
        ProfileError: everything wrong with the file: not readable, tensors missing, unknown or of another shape or
            dtype, numbers that are not finite, factors that are not positive or not equal within a RoPE pair, feedback
            that is not triangular, or is for other transforms than the layer's.
    """
    problems = Problems(str(path))
    statics: dict[int, LayerStatics] = {}
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if unknown := sorted(name for name in names if not _NAME.fullmatch(name)):
                rule = f"must be named layers.<layer>.{' or layers.<layer>.'.join(_TENSORS)}"
                problems.add("tensors", rule, show(unknown))
            reader = _Reader(problems, file, names, file.metadata() or {})
            for layer in resolved.layers:
                if static := reader.layer(layer):
                    statics[layer.index] = LayerStatics(**static)
    except OSError as error:
        problems.add("the file", "must be readable", error.strerror or "no such file")
    except SafetensorError as error:
        problems.add("the file", "must be a complete safetensors file", str(error))
    problems.raise_if_any()
    return statics


class _Reader:
    """Reads tensors of an open file and reports what is wrong with them.

    Args:
        problems: collects it.
        file: from safe_open.
        names: of its tensors.
        metadata: of the file.
    """

    def __init__(self, problems: Problems, file: Any, names: set[str], metadata: Mapping[str, str]) -> None:
        self._problems = problems
        self._file = file
        self._names = names
        self._metadata = metadata

    def layer(self, layer: LayerPrecision) -> dict[str, Any]:
        """What the layer's transforms use, by the fields of :class:`LayerStatics`."""
        shape = layer.shape.num_kv_heads, layer.shape.head_size
        found: dict[str, Any] = {}
        for kind in KINDS:
            if getattr(layer.transforms, kind) is True:
                name = f"layers.{layer.index}.{kind}"
                found[kind] = self._tensor(name, ROWS, (shape,), "F32")
                if kind == "key_equalization" and found[kind] is not None:
                    _check_factors(self._problems, name, found[kind], self._metadata)
        for kind, bits in zip(FEEDBACK_KINDS, (layer.pair.k_bits, layer.pair.v_bits), strict=True):
            if getattr(layer.transforms, kind) is True:
                found[kind] = self._feedback(kind, layer, bits)
        return found

    def _feedback(self, kind: str, layer: LayerPrecision, bits: int) -> FeedbackStatics | None:
        name = f"layers.{layer.index}.{kind}"
        shape = layer.shape.num_kv_heads, layer.shape.head_size, layer.shape.head_size
        factors = self._tensor(name, SQUARES, (shape,), "F16")
        ranges = self._ranges(name + RANGES_SUFFIX.format(bits=bits))
        if factors is not None:
            _check_triangular(self._problems, name, factors)
        chosen = tuple(each for each in LINEAR_TRANSFORMS[kind] if getattr(layer.transforms, each))
        if name in self._names and self._metadata.get(name) != _listed(chosen):
            rule = f"must be {_listed(chosen)!r}, the layer's transforms"
            self._problems.add(f"metadata.{name}", rule, show(self._metadata.get(name)))
        return None if factors is None or ranges is None else FeedbackStatics(factors, {bits: ranges}, chosen)

    def _ranges(self, name: str) -> tuple[float, ...] | None:
        tensor = self._tensor(name, RANGES, tuple((count,) for count in range(1, MAX_RANGES + 1)), "F32")
        if tensor is None:
            return None
        ranges = tuple(map(float, tensor))
        if not all(low < high for low, high in itertools.pairwise((0.0, *ranges))) or ranges[-1] > MAX_RANGE:
            rule = f"must be positive, rise and be at most {MAX_RANGE:g}"
            self._problems.add(name, rule, ", ".join(f"{factor:g}" for factor in ranges))
        return ranges

    def _tensor(self, name: str, axes: str, shapes: tuple[tuple[int, ...], ...], dtype: str) -> np.ndarray | None:
        """The tensor, of one of these shapes, or None if it is not as it must be."""
        problems = self._problems
        if name not in self._names:
            problems.add(name, "must be there, since the profile uses it", "none")
            return None
        stored = self._file.get_slice(name)
        got, got_dtype = tuple(stored.get_shape()), stored.get_dtype()
        if got not in shapes:
            problems.add(name, f"must have the shape {' or '.join(map(str, shapes))} ({axes})", str(got))
        if got_dtype != dtype:
            problems.add(name, f"must be {dtype}", got_dtype)
        if got not in shapes or got_dtype != dtype:
            return None
        tensor = self._file.get_tensor(name)
        if not np.isfinite(tensor).all():
            problems.add(name, "must be finite", _first_bad(tensor, ~np.isfinite(tensor)))
            return None
        return tensor


def _listed(transforms: Iterable[str]) -> str:
    return ", ".join(transforms) or NO_TRANSFORMS


def _check_triangular(problems: Problems, name: str, factors: np.ndarray) -> None:
    below = np.tril(factors, -1) != 0
    if below.any():
        problems.add(name, "must be 0 below the diagonal", _first_bad(factors, below))
    diagonal = np.diagonal(factors, axis1=1, axis2=2)
    if (diagonal <= 0).any():
        problems.add(name, "must be positive on the diagonal", _first_bad(diagonal, diagonal <= 0))


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
    where = tuple(map(int, np.argwhere(bad)[0]))
    names = {
        1: "in range {}",
        2: "in channel {1} of head {0}",
        3: "in row {1}, column {2} of head {0}",
    }
    return f"{tensor[where]:g} {names[tensor.ndim].format(*where)}"


def save_statics(path: Path, statics: Mapping[int, LayerStatics], metadata: Mapping[str, str]) -> None:
    """Write the file at once, complete, or not at all.

    Args:
        path: where to; replaced if it exists.
        statics: tensors per layer.
        metadata: how they were made; ``rotary_dim`` and ``rope_style`` where they are not the defaults.

    Raises:
        ValueError: numbers that are not finite, or a tensor of other dimensions.
    """
    tensors: dict[str, np.ndarray] = {}
    metadata = dict(metadata)

    def add(name: str, axes: str, numbers: Any, dtype: type = np.float32) -> None:
        tensor = tensors[name] = np.ascontiguousarray(numbers, dtype=dtype)
        if tensor.ndim != len(axes.split(", ")) or not np.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} must be finite and [{axes}], but got {tensor.shape}")

    for layer, each in statics.items():
        for kind in KINDS:
            if (numbers := getattr(each, kind)) is not None:
                add(f"layers.{layer}.{kind}", ROWS, numbers)
        for kind in FEEDBACK_KINDS:
            feedback: FeedbackStatics | None = getattr(each, kind)
            if feedback is not None:
                name = f"layers.{layer}.{kind}"
                add(name, SQUARES, feedback.factors, np.float16)
                metadata[name] = _listed(feedback.transforms)
                for bits, ranges in feedback.ranges.items():
                    add(name + RANGES_SUFFIX.format(bits=bits), RANGES, ranges)
    data = save(tensors, metadata=metadata)
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
