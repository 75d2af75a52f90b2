"""The engine that captures: taps the attention layers inside vLLM and writes what they see.

Works with both model runners: a layer's ``forward`` is tapped, which eager execution calls in either. Every rank of an
engine has a tap, in its worker; the heads of a layer come together, and one rank of its pipeline stage writes them. All
nodes of an engine must see the capture's folder.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtuner_tools.cache_setting import AUTO
from kvtuner_tools.calibration.calibration_text import CalibrationText
from kvtuner_tools.calibration.captured import (
    Capture,
    CapturedLayer,
    layer_file,
    model_identity,
    save_rotary,
    save_tensors,
)
from kvtuner_tools.engine_arguments import EngineWords, model_source
from kvtuner_tools.engines.evaluate import EngineOptions, MeasuringEngine, max_model_len_for
from kvtuner_tools.engines.ranks import kv_head_copies, make_room_for_stage_before, num_ranks, whole_heads, writes
from kvtuner_tools.engines.residual_readers import ResidualReaders
from kvtuner_tools.model_files import max_positions
from kvtuner_tools.progress import track
from vllm_kvtuner.engine.layer_names import layer_index
from vllm_kvtuner.engine.statics import layer_rotary
from vllm_kvtuner.pages.transforms import RotaryTable
from vllm_kvtuner.profile.model_shape import ModelShape


@dataclass(frozen=True)
class CaptureJob:
    """What an engine's process gets.

    Args:
        shape: the model.
        text: windows to run.
        context: tokens of the longest window at most.
        queries: query rows of a window in its sample.
        seed: of their drawing.
        dtype: the model's dtype as vLLM takes it.
        inputs: digest of everything the capture follows from.
        versions: package -> version.
        folder: the capture's.
        kv_memory_bytes: memory of the KV cache on each rank; the engine runs one window at a time.
        words: vLLM's engine arguments.
    """

    shape: ModelShape
    text: CalibrationText
    context: int
    queries: int
    seed: int
    dtype: str
    inputs: str
    versions: Mapping[str, str]
    folder: Path
    kv_memory_bytes: int = 1 << 30
    words: EngineWords = field(default_factory=dict)


@dataclass(frozen=True)
class _Stage:
    """What a pipeline stage has of a model.

    Args:
        dtype: the model's.
        layers: of the stage, in order; their rotary tables are numbered within the stage.
        tables: digests of its rotary tables.
    """

    dtype: str
    layers: tuple[CapturedLayer, ...]
    tables: tuple[str, ...]


@dataclass
class _Tap:
    """Writes what the layers see of the window in flight; in the worker.

    Args:
        folder: the capture's.
        layers: of this rank's stage, of all ranks' heads.
        copies: of each layer, the ranks that have the same KV head.
        tables: rotary tables of the stage.
        readers: what the layers' outputs are read by.
        window: the window.
        num_tokens: its tokens.
        rows: [num_queries] int64, the sample of query rows, ascending.
        pending: layers that have not run yet.
    """

    folder: Path
    layers: dict[int, CapturedLayer] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    tables: list[RotaryTable] = field(default_factory=list)
    readers: ResidualReaders = field(default_factory=ResidualReaders)
    window: int = 0
    num_tokens: int = 0
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    pending: set[int] = field(default_factory=set)

    def begin(self, window: int, num_tokens: int, rows: torch.Tensor) -> None:
        """Expect every layer once, over the tokens of a window."""
        self.window, self.num_tokens, self.rows = window, num_tokens, rows
        self.pending = set(self.layers)

    def take(self, layer: Any, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one layer's tensors, [num_tokens, heads * head_size] each or with heads apart."""
        if index not in self.pending:
            return
        self.pending.remove(index)
        if query.shape[0] < self.num_tokens:
            rule = f"a window of {self.num_tokens} tokens must run in one step"
            raise RuntimeError(f"layer {index}: {rule}, but got a step of {query.shape[0]}")
        copies = self.copies[index]
        seen = {
            "query": (query, layer.num_heads, 1),
            "key": (key, layer.num_kv_heads, copies),
            "value": (value, layer.num_kv_heads, copies),
        }
        whole = {
            name: whole_heads(rows.view(-1, heads, layer.head_size)[: self.num_tokens], times)
            for name, (rows, heads, times) in seen.items()
        }
        if writes():
            tensors = {name: rows.cpu().clone(memory_format=torch.contiguous_format) for name, rows in whole.items()}
            save_tensors(layer_file(self.folder, self.window, index), {**tensors, "query_position": self.rows})


def run_capture_engine(job: CaptureJob) -> None:
    """Run the windows in an engine for them alone, in this process. Meant for a process of its own."""
    source = model_source(job.words)
    options = EngineOptions(
        label="capture",
        model=job.shape.name,
        dtype=job.dtype,
        setting=AUTO,
        max_model_len=max_model_len_for(job.context, max_positions(job.shape.name, source)),
        chunk=job.context,
        kv_memory_bytes=job.kv_memory_bytes,
        prefix_caching=False,
        words=job.words,
    )
    engine = MeasuringEngine(options, Path(os.devnull))
    try:
        capture_windows(engine, job)
    finally:
        engine.close()


def capture_windows(engine: MeasuringEngine, job: CaptureJob) -> None:
    """Run the windows that are missing.

    Args:
        engine: with an unquantized cache, since what layers see follows from what those before them read of it; without
            prefix caching, and with steps that hold a window.
        job: what to capture.
    """
    dtype, layers, numbers = _joined(engine.in_workers(_install, job), job.shape)
    engine.in_workers(_write_tables, numbers, job.context)
    engine.in_workers(_watch)
    engine.prefill(job.text.windows[0])
    problem = engine.in_workers(_write_grams, layers)[0]
    capture = Capture(
        folder=job.folder,
        inputs=job.inputs,
        model=model_identity(job.shape),
        data=job.text.identity,
        seed=job.seed,
        versions=job.versions,
        dtype=dtype,
        windows=tuple(map(len, job.text.windows)),
        layers=layers,
        gram_unsupported=problem,
    )
    capture.write()
    missing = capture.missing_windows()
    total = len(capture.windows)
    for window in track(missing, "capture", "window", total=total, done=total - len(missing)):
        folder = layer_file(job.folder, window, 0).parent
        shutil.rmtree(folder, ignore_errors=True)  # part of a window, where a run was killed
        folder.mkdir()
        num_tokens = capture.windows[window]
        engine.in_workers(_begin, window, num_tokens, _sample(job, window, num_tokens))
        engine.prefill(job.text.windows[window])
        if pending := set().union(*engine.in_workers(_pending)):
            raise RuntimeError(f"every layer must run once per step, but layers {sorted(pending)} did not")


def _sample(job: CaptureJob, window: int, num_tokens: int) -> torch.Tensor:
    """Query rows of a window's sample, [num_queries] int64, ascending."""
    # The first token attends to itself alone: its output has no error of the scores.
    drawn = np.random.default_rng([job.seed, window]).permutation(num_tokens - 1)[: job.queries] + 1
    return torch.from_numpy(np.sort(drawn))


def _joined(stages: list[_Stage | None], shape: ModelShape) -> tuple[str, tuple[CapturedLayer, ...], dict[str, int]]:
    """The model's dtype, its layers, and the numbers of its rotary tables by their digests.

    Raises:
        RuntimeError: layers that the model should not have, or lacks.
    """
    numbers: dict[str, int] = {}
    layers: dict[int, CapturedLayer] = {}
    found = [stage for stage in stages if stage is not None]
    for stage in found:
        for table in stage.tables:
            numbers.setdefault(table, len(numbers))
        for layer in stage.layers:
            rotary = None if layer.rotary is None else numbers[stage.tables[layer.rotary]]
            layers[layer.index] = replace(layer, rotary=rotary)
    if set(layers) != set(shape.attention_layers):
        rule = f"layers {list(shape.attention_layers)} must have attention"
        raise RuntimeError(f"{shape.name}: {rule}, but got {sorted(layers)}")
    return found[0].dtype, tuple(layers[index] for index in sorted(layers)), numbers


def _install(worker: Any, job: CaptureJob) -> _Stage | None:
    """Tap every attention layer. Runs in the worker.

    Returns:
        What the stage has, in the worker that writes for it; None in the others.
    """
    config, model = worker.vllm_config, worker.model_runner.get_model()
    make_room_for_stage_before(worker.model_runner)
    tap = worker.model_runner.kvtuner_capture = _Tap(job.folder)
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    for name, layer in config.compilation_config.static_forward_context.items():
        if id(layer) not in names or not hasattr(layer, "num_kv_heads"):  # not an attention layer with a cache
            continue
        index = layer_index(config, name)
        if index is None or index in tap.layers:
            rule = "must have a number of its own in its name"
            raise RuntimeError(f"{job.shape.name}: attention layer {name} {rule}")
        rotary, problem = None, None
        try:
            parent = modules[names[id(layer)].rpartition(".")[0]]
            table = layer_rotary(parent, config, index)
            if table is not None:
                rotary = _number(tap.tables, table)
        except ValueError as error:
            problem = str(error)
        copies = tap.copies[index] = kv_head_copies(layer.num_kv_heads, job.shape.layers[index].num_kv_heads)
        tap.layers[index] = CapturedLayer(
            index=index,
            num_heads=layer.num_heads * num_ranks(),
            num_kv_heads=layer.num_kv_heads * num_ranks() // copies,
            head_size=layer.head_size,
            scale=float(layer.impl.scale),
            sliding_window=layer.sliding_window,
            logits_soft_cap=float(layer.impl.logits_soft_cap or 0.0),
            rotary=rotary,
            offset_unsupported=problem,
            sinks=_sinks(layer),
        )
        _tap_forward(layer, index, tap)
    if not writes():
        return None
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    layers = tuple(tap.layers[index] for index in sorted(tap.layers))
    return _Stage(dtype, layers, tuple(map(_digest, tap.tables)))


def _write_tables(worker: Any, numbers: Mapping[str, int], context: int) -> None:
    """Write the stage's rotary tables under their numbers in the model. Runs in the worker."""
    tap = worker.model_runner.kvtuner_capture
    if writes():
        for table in tap.tables:
            save_rotary(tap.folder, numbers[_digest(table)], table, context)


def _begin(worker: Any, window: int, num_tokens: int, rows: torch.Tensor) -> None:
    worker.model_runner.kvtuner_capture.begin(window, num_tokens, rows)


def _pending(worker: Any) -> set[int]:
    return worker.model_runner.kvtuner_capture.pending


def _sinks(layer: Any) -> tuple[float, ...] | None:
    """A layer's attention sinks of all ranks' heads, which vLLM's backends keep under one name."""
    if not layer.has_sink:
        return None
    # -inf, as a head that only pads a rank's has, is no number of JSON; this one has no weight either.
    sinks = layer.impl.sinks.float().clamp(min=torch.finfo(torch.float32).min)
    return tuple(whole_heads(sinks.view(1, -1, 1)).flatten().tolist())


def _watch(worker: Any) -> None:
    """Note what the next step runs through. Runs in the worker."""
    config, model = worker.vllm_config, worker.model_runner.get_model()
    known = {id(module) for module in model.modules()}
    attention = {
        layer_index(config, name): layer
        for name, layer in config.compilation_config.static_forward_context.items()
        if id(layer) in known and hasattr(layer, "num_kv_heads")
    }
    worker.model_runner.kvtuner_capture.readers.watch(model, config.model_config.get_hidden_size(), attention)


def _write_grams(worker: Any, layers: tuple[CapturedLayer, ...]) -> str | None:
    """Why the Grams of the attention outputs cannot be had, or None. Runs in the worker."""
    tap = worker.model_runner.kvtuner_capture
    with torch.inference_mode():
        return tap.readers.write(worker.model_runner.get_model(), layers, tap.folder)


def _tap_forward(layer: Any, index: int, tap: _Tap) -> None:
    forward = layer.forward

    def tapped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tap.take(layer, index, query, key, value)
        return forward(query, key, value, *args, **kwargs)

    layer.forward = tapped


def _number(tables: list[RotaryTable], table: RotaryTable) -> int:
    """Place of a table in the list of distinct ones, appended if it is new."""
    for number, known in enumerate(tables):
        if known.is_neox == table.is_neox and torch.equal(known.cos_sin, table.cos_sin):
            return number
    tables.append(table)
    return len(tables) - 1


def _digest(table: RotaryTable) -> str:
    numbers = table.cos_sin.float().cpu().contiguous().numpy()
    return hashlib.sha256(numbers.tobytes() + bytes([table.is_neox])).hexdigest()
