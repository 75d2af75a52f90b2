"""The engine that captures: taps the attention layers inside vLLM and writes what they see.

Works with both model runners: a layer's ``forward`` is tapped, which eager execution calls in either.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtuner_tools.calibration.calibration_text import CalibrationText
from kvtuner_tools.calibration.captured import (
    Capture,
    CapturedLayer,
    layer_file,
    model_identity,
    save_rotary,
    save_tensors,
)
from kvtuner_tools.engines.evaluate import cache_memory, max_model_len_for
from kvtuner_tools.engines.residual_readers import ResidualReaders
from kvtuner_tools.model_files import max_positions
from kvtuner_tools.progress import track
from vllm_kvtuner.engine.layer_names import layer_index
from vllm_kvtuner.engine.statics import layer_rotary
from vllm_kvtuner.pages.transforms import RotaryTable
from vllm_kvtuner.profile.model_shape import ModelShape

KV_CACHE_BYTES = 1 << 30
"""KV cache memory of the engine, which runs one window at a time."""


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


@dataclass
class _Tap:
    """Writes what the layers see of the window in flight; in the worker.

    Args:
        folder: the capture's.
        window: the window.
        num_tokens: its tokens.
        rows: [num_queries] int64, the sample of query rows, ascending.
        pending: layers that have not run yet.
    """

    folder: Path
    window: int = 0
    num_tokens: int = 0
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    pending: set[int] = field(default_factory=set)

    def begin(self, window: int, num_tokens: int, layers: tuple[CapturedLayer, ...], job: CaptureJob) -> None:
        """Expect every layer once, over the tokens of a window."""
        folder = layer_file(self.folder, window, 0).parent
        shutil.rmtree(folder, ignore_errors=True)  # part of a window, where a run was killed
        folder.mkdir()
        # The first token attends to itself alone: its output has no error of the scores.
        drawn = np.random.default_rng([job.seed, window]).permutation(num_tokens - 1)[: job.queries] + 1
        self.window, self.num_tokens, self.rows = window, num_tokens, torch.from_numpy(np.sort(drawn))
        self.pending = {layer.index for layer in layers}

    def take(self, layer: Any, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one layer's tensors, [num_tokens, heads * head_size] each or with heads apart."""
        if index not in self.pending:
            return
        self.pending.remove(index)
        if query.shape[0] < self.num_tokens:
            rule = f"a window of {self.num_tokens} tokens must run in one step"
            raise RuntimeError(f"layer {index}: {rule}, but got a step of {query.shape[0]}")
        seen = {
            "query": (query, layer.num_heads),
            "key": (key, layer.num_kv_heads),
            "value": (value, layer.num_kv_heads),
        }
        tensors = {
            name: rows.view(-1, heads, layer.head_size)[: self.num_tokens].cpu().clone()
            for name, (rows, heads) in seen.items()
        }
        save_tensors(layer_file(self.folder, self.window, index), {**tensors, "query_position": self.rows})


def run_capture_engine(job: CaptureJob) -> None:
    """Build the engine in this process and run the windows that are missing. Meant for a process of its own."""
    # In-process, so that the tap needs no pickling and the memory is this process's; read when vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=job.shape.name,
        dtype=job.dtype,
        max_model_len=max_model_len_for(job.context, max_positions(job.shape.name)),
        max_num_seqs=1,
        max_num_batched_tokens=job.context,
        **cache_memory(KV_CACHE_BYTES),
        enable_prefix_caching=False,
        enforce_eager=True,  # compiled graphs do not call the layers' forward
    )
    try:
        tap = _Tap(job.folder)
        dtype, layers = llm.collective_rpc(_install, args=(tap, job))[0]
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
        )
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        readers = ResidualReaders()
        llm.collective_rpc(_watch, args=(readers,))
        llm.generate([{"prompt_token_ids": list(job.text.windows[0])}], params, use_tqdm=False)
        problem = llm.collective_rpc(_write_grams, args=(readers, layers, job.folder))[0]
        capture = replace(capture, gram_unsupported=problem)
        capture.write()
        missing = capture.missing_windows()
        total = len(capture.windows)
        for window in track(missing, "capture", "window", total=total, done=total - len(missing)):
            tap.begin(window, capture.windows[window], layers, job)
            llm.generate([{"prompt_token_ids": list(job.text.windows[window])}], params, use_tqdm=False)
            if tap.pending:
                raise RuntimeError(f"every layer must run once per step, but layers {sorted(tap.pending)} did not")
    finally:
        llm.llm_engine.engine_core.shutdown()


def _install(worker: Any, tap: _Tap, job: CaptureJob) -> tuple[str, tuple[CapturedLayer, ...]]:
    """Tap every attention layer and write the rotary tables. Runs in the worker.

    Returns:
        The model's dtype and the layers, in order.
    """
    config, model = worker.vllm_config, worker.model_runner.get_model()
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    tables: list[RotaryTable] = []
    layers: dict[int, CapturedLayer] = {}
    for name, layer in config.compilation_config.static_forward_context.items():
        if id(layer) not in names or not hasattr(layer, "num_kv_heads"):  # not an attention layer with a cache
            continue
        index = layer_index(config, name)
        if index is None or index in layers:
            rule = "must have a number of its own in its name"
            raise RuntimeError(f"{job.shape.name}: attention layer {name} {rule}")
        rotary, problem = None, job.shape.offset_unsupported
        try:
            parent = modules[names[id(layer)].rpartition(".")[0]]
            table = layer_rotary(parent, config, index)
            if problem is None and table is not None:
                rotary = _number(tables, table)
        except ValueError as error:
            problem = problem or str(error)
        layers[index] = CapturedLayer(
            index=index,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            scale=float(layer.impl.scale),
            sliding_window=layer.sliding_window,
            logits_soft_cap=float(layer.impl.logits_soft_cap or 0.0),
            rotary=rotary,
            offset_unsupported=problem,
            sinks=_sinks(layer),
        )
        _tap_forward(layer, index, tap)
    if set(layers) != set(job.shape.attention_layers):
        rule = f"layers {list(job.shape.attention_layers)} must have attention"
        raise RuntimeError(f"{job.shape.name}: {rule}, but got {sorted(layers)}")
    for number, table in enumerate(tables):
        save_rotary(job.folder, number, table, job.context)
    return str(config.model_config.dtype).removeprefix("torch."), tuple(layers[index] for index in sorted(layers))


def _sinks(layer: Any) -> tuple[float, ...] | None:
    """A layer's attention sinks, which vLLM's backends keep under one name."""
    if not layer.has_sink:
        return None
    # -inf, as a head that only pads a rank's has, is no number of JSON; this one has no weight either.
    return tuple(layer.impl.sinks.float().clamp(min=torch.finfo(torch.float32).min).tolist())


def _watch(worker: Any, readers: ResidualReaders) -> None:
    """Note what the next step runs through. Runs in the worker."""
    config, model = worker.vllm_config, worker.model_runner.get_model()
    known = {id(module) for module in model.modules()}
    attention = {
        layer_index(config, name): layer
        for name, layer in config.compilation_config.static_forward_context.items()
        if id(layer) in known and hasattr(layer, "num_kv_heads")
    }
    readers.watch(model, config.model_config.get_hidden_size(), attention)


def _write_grams(worker: Any, readers: ResidualReaders, layers: tuple[CapturedLayer, ...], folder: Path) -> str | None:
    """Why the Grams of the attention outputs cannot be had, or None. Runs in the worker."""
    with torch.inference_mode():
        return readers.write(worker.model_runner.get_model(), layers, folder)


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
