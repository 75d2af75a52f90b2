"""A capture on disk: queries, keys and values of every attention layer over calibration text.

``capture.json`` describes it; ``window-<w>/layer-<i>.safetensors`` holds what layer i saw of window w, after RoPE, in
the model's dtype::

    key, value       [num_tokens, num_kv_heads, head_size]    the whole window, positions 0 to num_tokens - 1
    query            [num_tokens, num_heads, head_size]       likewise
    query_position   [num_queries] int64                      a random sample of its rows, ascending

``gram-<i>.safetensors`` holds what the model makes of errors of layer i's attention output: ``output_gram``, fp32
[num_kv_heads, group, head_size, group, head_size]. There is none where ``gram_unsupported`` says why.

``rotary-<n>.safetensors`` holds rows of a rotary table of the model, [context, rotary_dim] in its dtype: ``near`` those
of positions 0 to context - 1, ``far`` the table's last ones. With both, keys are known before RoPE and at positions far
beyond those they were captured at. ``turns`` is fp64, the moments of :class:`Turns` over the positions that are served.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvtuner_tools.calibration.artifacts import read_artifact
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.transforms import RotaryTable
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError

CAPTURE_SCHEMA = "kvtuner-capture/2"
SERVED_POSITIONS = 32768
"""Positions that :class:`Turns` averages over at most: statics of fewer fit those better, but fail beyond them, and
those of more are about the same."""

_FILE = "capture.json"
_KEYS = ("inputs", "model", "data", "seed", "versions", "dtype", "windows", "layers", "gram_unsupported")


@dataclass(frozen=True)
class CapturedLayer:
    """An attention layer as vLLM built it.

    Args:
        index: decoder layer.
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_size: numbers per head.
        scale: factor on the logits.
        sliding_window: tokens a query sees, itself included, or None for all.
        logits_soft_cap: c > 0 replaces each logit x by c tanh(x / c).
        rotary: number of its rotary table, or None if it rotates nothing or has no table of one row per position.
        offset_unsupported: why keys before RoPE cannot be had, or None.
        sinks: attention sinks, a logit of each query head in every softmax; None where the layer has none.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None
    logits_soft_cap: float
    rotary: int | None
    offset_unsupported: str | None
    sinks: tuple[float, ...] | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CapturedLayer":
        """Read what :func:`dataclasses.asdict` gives, once it has been JSON."""
        sinks = values.get("sinks")
        return cls(**{**values, "sinks": None if sinks is None else tuple(sinks)})

    def softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Attention weights of tokens; with sinks, which take the rest, a row's sum is below 1.

        Args:
            logits: [num_kv_heads, group, num_queries, num_tokens] fp32, capped; -inf for a token that is not seen.
        """
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = torch.tensor(self.sinks, device=logits.device).view(*logits.shape[:2], 1, 1)
        return torch.cat([logits, sinks.expand(*logits.shape[:3], 1)], -1).softmax(-1)[..., :-1]


@dataclass(frozen=True)
class Window:
    """What one layer saw of one window, after RoPE, fp32; position t is row t.

    Args:
        key: [num_tokens, num_kv_heads, head_size].
        value: likewise.
        query: [num_queries, num_heads, head_size].
        query_position: [num_queries] int64.
    """

    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    query_position: torch.Tensor


@dataclass(frozen=True)
class Turns:
    """Mean products of a rotary table's cosines and sines over positions.

    Args:
        moments: [3, pairs + 1, pairs + 1] fp64: of RoPE pairs i and j the means of cos_i cos_j, cos_i sin_j and
            sin_i sin_j. The last pair stands for channels that are not rotated: its cosine is 1 and its sine 0.
        is_neox: as in RotaryTable.
    """

    moments: torch.Tensor
    is_neox: bool

    @classmethod
    def over(cls, table: RotaryTable, positions: int = SERVED_POSITIONS) -> "Turns":
        """Over the first ``positions`` of a table, or all that it has."""
        cos, sin = table.cos_sin[:positions].double().chunk(2, dim=-1)
        cos, sin = torch.nn.functional.pad(cos, (0, 1), value=1.0), torch.nn.functional.pad(sin, (0, 1))
        return cls(torch.stack([cos.mT @ cos, cos.mT @ sin, sin.mT @ sin]) / len(cos), table.is_neox)

    def mean(self, metric: torch.Tensor) -> torch.Tensor:
        """Mean of R_t M R_t^T over the positions t, for M [num_kv_heads, head_size, head_size] fp64."""
        moments = self.moments.to(metric)
        pairs, size = moments.shape[-1] - 1, metric.shape[-1]
        first, second = RotaryTable(moments.new_empty(0, 2 * pairs), self.is_neox).pairs(metric.device)
        pair = torch.full((size,), pairs, device=metric.device)
        pair[first] = pair[second] = torch.arange(pairs, device=metric.device)
        # R = C + S J, with C and S diagonal and J what the sines multiply.
        turn = torch.zeros(size, size, dtype=metric.dtype, device=metric.device)
        turn[first, second], turn[second, first] = -1.0, 1.0
        cos_cos, cos_sin, sin_sin = (each[pair][:, pair] for each in moments)
        crossed = cos_sin * (metric @ turn.mT)
        return cos_cos * metric + crossed + crossed.mT + sin_sin * (turn @ metric @ turn.mT)


@dataclass(frozen=True)
class RotaryRows:
    """Rows of a rotary table as the model rotates by it.

    Args:
        near: positions 0 to context - 1.
        far: as many rows from ``far_position`` on; row t is position far_position + t.
        far_position: the first position of ``far``.
        turns: over the positions that are served.
    """

    near: RotaryTable
    far: RotaryTable
    far_position: int
    turns: Turns


@dataclass(frozen=True)
class Capture:
    """A capture's description.

    Args:
        folder: where it is.
        inputs: digest of everything it follows from; stages that read it key their own results by this.
        model: identity, as in a profile's ``model`` section.
        data: identity of the text: source, sha256, tokens.
        seed: of the drawing of windows and query rows.
        versions: package -> version.
        dtype: the model's, as torch names it.
        windows: tokens of each window.
        layers: every layer that caches keys and values, in order.
        gram_unsupported: why what reads the attention outputs cannot be had, or None.
    """

    folder: Path
    inputs: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    seed: int
    versions: Mapping[str, str]
    dtype: str
    windows: tuple[int, ...]
    layers: tuple[CapturedLayer, ...]
    gram_unsupported: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Capture":
        """Read the description of a complete capture.

        Raises:
            ProfileError: no capture, one of another schema, or one that was interrupted.
        """
        capture = cls.read_incomplete(folder)
        if missing := capture.missing_windows():
            rule = f"must hold all {len(capture.windows)} windows; run the capture again to go on with it"
            raise ProfileError([f"{folder}: the capture {rule}, but got {len(capture.windows) - len(missing)}"])
        return capture

    @classmethod
    def read_incomplete(cls, folder: Path) -> "Capture":
        """As :meth:`read`, windows missing or not."""
        document = read_artifact(folder / _FILE, CAPTURE_SCHEMA, _KEYS)
        layers = tuple(CapturedLayer.from_json(layer) for layer in document.pop("layers"))
        return cls(folder=folder, layers=layers, windows=tuple(document.pop("windows")), **document)

    def write(self) -> None:
        """Write the description."""
        values = asdict(self)
        del values["folder"]
        write_json(self.folder / _FILE, {"schema": CAPTURE_SCHEMA, **values})

    def missing_windows(self) -> list[int]:
        """Windows that lack a layer, ascending."""
        return [
            window
            for window in range(len(self.windows))
            if not all(layer_file(self.folder, window, layer.index).exists() for layer in self.layers)
        ]

    def load_layer(
        self, layer: CapturedLayer, device: torch.device | str = "cpu", windows: Iterable[int] | None = None
    ) -> list[Window]:
        """Some windows of a layer, or all, with the sampled queries.

        Takes 4 (2 tokens num_kv_heads + windows num_queries num_heads) head_size bytes.
        """
        chosen = range(len(self.windows)) if windows is None else windows
        return [self._load(layer, window, device, sampled=True) for window in chosen]

    def load_windows(
        self, layer: CapturedLayer, windows: Iterable[int], device: torch.device | str = "cpu"
    ) -> Iterator[Window]:
        """Some windows of a layer, one at a time, with every token's query."""
        return (self._load(layer, window, device, sampled=False) for window in windows)

    def _load(self, layer: CapturedLayer, window: int, device: torch.device | str, *, sampled: bool) -> Window:
        tensors = load_file(layer_file(self.folder, window, layer.index), device=str(device))
        query, position = tensors["query"], tensors["query_position"]
        if not sampled:
            position = torch.arange(len(query), device=query.device)
        return Window(tensors["key"].float(), tensors["value"].float(), query[position].float(), position)

    def load_output_gram(self, layer: CapturedLayer, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """[num_kv_heads, group, head_size, group, head_size] fp32 of a layer; None where the capture has none."""
        if self.gram_unsupported is not None:
            return None
        return load_file(gram_file(self.folder, layer.index), device=str(device))["output_gram"]

    def load_rotary(self, layer: CapturedLayer, device: torch.device | str = "cpu") -> RotaryRows | None:
        """The rotary table's rows of a layer, or None where it has none."""
        if layer.rotary is None:
            return None
        with safe_open(rotary_file(self.folder, layer.rotary), framework="pt", device=str(device)) as file:
            metadata = file.metadata()
            is_neox = metadata["is_neox"] == "True"
            near, far = (RotaryTable(file.get_tensor(name), is_neox) for name in ("near", "far"))
            turns = Turns(file.get_tensor("turns"), is_neox)
        return RotaryRows(near, far, int(metadata["far_position"]), turns)


def save_rotary(folder: Path, number: int, table: RotaryTable, context: int) -> None:
    """Write the rows of a table that :class:`RotaryRows` describes."""
    far_position = table.cos_sin.shape[0] - context
    rows = {
        "near": table.cos_sin[:context],
        "far": table.cos_sin[far_position:],
        "turns": Turns.over(table).moments,
    }
    metadata = {"is_neox": str(table.is_neox), "far_position": str(far_position)}
    save_tensors(rotary_file(folder, number), {name: each.cpu().clone() for name, each in rows.items()}, metadata)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that a reader sees all of it or none."""
    # Named by the process, since one that outlives its killed parent may write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)


def layer_file(folder: Path, window: int, layer: int) -> Path:
    """Where a capture holds a layer's tensors of a window."""
    return folder / f"window-{window:04d}" / f"layer-{layer:03d}.safetensors"


def gram_file(folder: Path, layer: int) -> Path:
    """Where a capture holds the Gram of a layer's attention output."""
    return folder / f"gram-{layer:03d}.safetensors"


def rotary_file(folder: Path, number: int) -> Path:
    """Where a capture holds the rows of a rotary table."""
    return folder / f"rotary-{number}.safetensors"


def model_identity(shape: ModelShape) -> dict[str, Any]:
    """A model as a profile's ``model`` section names it; heads and sizes are one number where all layers agree."""
    per_layer = {name: [getattr(layer, name) for layer in shape.layers] for name in ("num_kv_heads", "head_size")}
    return {
        "name": shape.name,
        "architecture": shape.architecture,
        "num_layers": len(shape.layers),
        **{name: values[0] if len(set(values)) == 1 else values for name, values in per_layer.items()},
    }
