"""Capture queries, keys and values of every attention layer from calibration text run through vLLM itself.

Each file is written when its layer has run, so the engine's process holds one layer of one window at a time:
num_tokens (2 num_kv_heads + num_heads) head_size numbers, beside the Gram of what reads the residual stream,
2 hidden_size^2. On disk a capture takes, per layer, tokens (2 num_kv_heads + num_heads) head_size numbers in the
model's dtype, and (num_heads head_size)^2 / num_kv_heads in fp32; captured.py has the format.

Windows run one at a time, each in one engine step, so an interrupted capture that goes on at the first window that
lacks a layer ends with the files of an undisturbed one.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from kvtuner_tools.calibration.artifacts import digest
from kvtuner_tools.calibration.calibration_text import CalibrationText
from kvtuner_tools.calibration.captured import CAPTURE_SCHEMA, Capture, model_identity
from kvtuner_tools.engine_arguments import EngineWords, computed_by, model_source
from kvtuner_tools.engines.capture import CaptureJob, capture_windows, run_capture_engine
from kvtuner_tools.engines.unquantized import UnquantizedEngine
from kvtuner_tools.model_files import load_model_shape
from kvtuner_tools.processes import in_own_process
from kvtuner_tools.results import provenance
from vllm_kvtuner.profile.problems import ProfileError

CAPTURE_FOLDER = "capture"
"""Name of the capture's folder in a calibration's output folder."""


@dataclass(frozen=True)
class CaptureRequest:
    """What to capture.

    Args:
        model: folder or id.
        text: windows to run.
        queries: query rows per window that errors are measured on.
        seed: of the drawing of rows.
        dtype: the model's dtype as vLLM takes it.
        kv_memory_bytes: memory of the engine's KV cache on each rank.
        words: vLLM's engine arguments.
    """

    model: str
    text: CalibrationText
    queries: int = 64
    seed: int = 0
    dtype: str = "auto"
    kv_memory_bytes: int = 1 << 30
    words: EngineWords = field(default_factory=dict)


def run_capture(request: CaptureRequest, out_dir: Path, engine: UnquantizedEngine | None = None) -> Capture:
    """Capture into ``out_dir / "capture"``, or go on with what an interrupted run of the same request left there.

    A capture of another request, other text or other versions is replaced.

    Args:
        request: what to capture.
        out_dir: the calibration's output folder; made if it does not exist.
        engine: captures, beside what else it does; None starts one for this alone.

    Raises:
        ValueError: the model is not served.
    """
    shape = load_model_shape(request.model, model_source(request.words))
    if shape.unsupported:
        raise ProfileError(shape.refusals)
    text = request.text
    context = max(map(len, text.windows))
    versions = provenance()["versions"]
    inputs = digest(
        {
            "schema": CAPTURE_SCHEMA,
            "model": model_identity(shape),
            "text": [text.identity, text.windows],
            "context": context,
            "queries": request.queries,
            "seed": request.seed,
            "dtype": request.dtype,
            "versions": versions,
            **({"engine": computed} if (computed := computed_by(request.words)) else {}),
        }
    )
    folder = out_dir / CAPTURE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found = _find(folder)
    if found is None or found.inputs != inputs:
        _clear(folder)
    elif not found.missing_windows():
        return found
    job = CaptureJob(
        shape=shape,
        text=text,
        context=context,
        queries=request.queries,
        seed=request.seed,
        dtype=request.dtype,
        inputs=inputs,
        versions=versions,
        folder=folder,
        kv_memory_bytes=request.kv_memory_bytes,
        words=request.words,
    )
    if engine is None:
        in_own_process(run_capture_engine, job)
    else:
        engine.run(capture_windows, job)
    return Capture.read(folder)


def _find(folder: Path) -> Capture | None:
    """The capture in a folder, complete or not; None if there is none that this version reads."""
    try:
        return Capture.read_incomplete(folder)
    except ProfileError:
        return None


def _clear(folder: Path) -> None:
    """Remove a capture, and nothing else that may lie in its folder."""
    for pattern in (
        "capture.json",
        ".capture.json.*",
        "rotary-*.safetensors",
        ".rotary-*.safetensors.*",
        "gram-*.safetensors",
        ".gram-*.safetensors.*",
    ):
        for path in folder.glob(pattern):
            path.unlink()
    for window in folder.glob("window-[0-9]*"):
        shutil.rmtree(window)
