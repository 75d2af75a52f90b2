"""Quality of any assignment of precision pairs in one engine, by switching its layers at run time.

The unquantized reference runs once, in an engine and a process of its own. The calibration engine then lives in a
second process; a trial switches every layer's pair (and transforms), empties the prefix cache, and scores.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import yaml

from kvtuner_tools.cache_setting import KVTUNER, CacheSetting
from kvtuner_tools.calibration.artifacts import Quality, plain_window
from kvtuner_tools.divergence import TokenScores
from kvtuner_tools.engine_arguments import NO_WORDS, EngineWords, model_source
from kvtuner_tools.engines.evaluate import (
    TASK_MAX_NUM_SEQS,
    Asked,
    EngineJob,
    EngineOptions,
    MeasuringEngine,
    ReferenceLogits,
    Window,
    max_model_len_for,
    run_engine,
)
from kvtuner_tools.engines.unquantized import RecordedText
from kvtuner_tools.model_files import load_model_shape, max_positions
from kvtuner_tools.processes import OwnProcess, in_own_process
from kvtuner_tools.task_accuracy import Completion, Task, TaskScore
from vllm_kvtuner.pages.layout import UNQUANTIZED, PrecisionPair
from vllm_kvtuner.profile.profile import Profile, RecentWindow, ResolvedProfile, TransformSettings
from vllm_kvtuner.profile.statics import load_statics

ROOM = PrecisionPair(8, 8)
"""What every quantized layer's pages have room for."""
CHUNK = 2048
"""Tokens whose logits a step computes at most: those of a long window would take more memory than a model."""
_NONE = TransformSettings()

logger = logging.getLogger(__name__)

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelTransforms:
    """What the quantized layers of a model do before they store.

    Args:
        default: transforms of every layer without an override.
        overrides: transforms of single layers.
        statics: safetensors file that key_offset and key_equalization read.
    """

    default: TransformSettings = _NONE
    overrides: Mapping[int, TransformSettings] = field(default_factory=dict)
    statics: Path | None = None


@dataclass(frozen=True)
class CacheRoom:
    """What an engine's cache has room for, for the engine's whole life.

    Args:
        unquantized_layers: layers left to vLLM's own cache (K16V16); the others' pages have room for ``ROOM``.
        recent_window: that of every quantized layer, if any.
        kv_memory_bytes: memory of the KV cache on each rank.
    """

    unquantized_layers: Collection[int] = ()
    recent_window: RecentWindow | None = None
    kv_memory_bytes: int = 1 << 30


NO_TRANSFORMS = ModelTransforms()
PAGES_ALONE = CacheRoom()


class CalibrationEngine:
    """An Evaluator on vLLM itself. A context manager; ``close`` ends its process.

    Args:
        model: folder or model id.
        windows: token ids, as ``kvtuner_tools.heldout.load_windows`` gives them; or a text that an UnquantizedEngine
            has recorded. With that the engine starts while its owner goes on, and the first score waits for it.
        transforms: what layers do before they store, until :meth:`set_transforms`.
        room: what the cache is laid out for.
        task: questions for :meth:`score_task`.
        chunk: prompt tokens per engine step; by default the longest window, at most ``CHUNK``, or as recorded.
        dtype: of the model.
        words: vLLM's engine arguments.

    Attributes:
        start_seconds: what the reference's pass and the calibration engine's start took together; of a recorded text
            what its owner waited.
        trial_seconds: what the latest score took.

    Raises:
        ValueError: windows, a task, layers or statics that do not fit the model, or a model that is not served.
    """

    def __init__(
        self,
        model: str,
        windows: Sequence[Sequence[int]] | RecordedText,
        *,
        transforms: ModelTransforms = NO_TRANSFORMS,
        room: CacheRoom = PAGES_ALONE,
        task: Task | None = None,
        chunk: int | None = None,
        dtype: str = "bfloat16",
        words: EngineWords = NO_WORDS,
    ) -> None:
        self.start_seconds = self.trial_seconds = 0.0
        source = model_source(words)
        self._shape = load_model_shape(model, source)
        recorded = windows if isinstance(windows, RecordedText) else None
        texts = windows if recorded is None else recorded.windows
        self._windows = tuple(Window(tuple(window)) for window in texts)
        self._recent_window = room.recent_window
        self._task = task
        self._base = {
            layer: UNQUANTIZED if layer in room.unquantized_layers else ROOM for layer in self._shape.attention_layers
        }
        if unknown := sorted(set(room.unquantized_layers) - self._base.keys()):
            raise ValueError(
                f"unquantized_layers must be layers of {model} that cache keys and values, but got {unknown}"
            )
        self._profile = self._checked(transforms)
        longest = max(len(window.ids) for window in self._windows)
        longest_request = longest if task is None else max(longest, task.max_model_len)
        options = EngineOptions(
            label="reference",
            model=model,
            dtype=dtype,
            setting=CacheSetting("auto"),
            max_model_len=max_model_len_for(longest_request, max_positions(model, source)),
            chunk=chunk or (min(longest, CHUNK) if recorded is None else recorded.chunk),
            kv_memory_bytes=room.kv_memory_bytes,
            max_num_seqs=1 if task is None else TASK_MAX_NUM_SEQS,
            words=words,
        )
        started = time.monotonic()
        self._folder = Path(tempfile.mkdtemp(prefix="kvtuner-calibration-"))
        self._process: OwnProcess | None = None
        try:
            if recorded is None:
                job = EngineJob(options, self._windows, self._folder / "logits")
                reference = in_own_process(run_engine, job).reference
                assert reference is not None, "a job with windows has a reference"
            else:
                reference = recorded.logits
            setting = CacheSetting(KVTUNER, str(self._write_room()))
            self._process = OwnProcess()
            options = replace(options, label="calibration", setting=setting, switchable=True)
            self._starting: Future[None] | None = self._process.submit(_build, options, reference)
            if recorded is None:
                self.wait()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.monotonic() - started
        logger.info("calibration engine: started in %.1f s, reference included", self.start_seconds)

    def wait(self) -> None:
        """Until the engine has started.

        Raises:
            Exception: what kept it from that.
        """
        if self._starting is not None:
            self._starting.result()
            self._starting = None

    def score(self, pairs: Mapping[int, PrecisionPair]) -> Quality:
        """Quality with these pairs, one for every layer that caches keys and values.

        Raises:
            ValueError: pairs missing or for layers that do not exist, or K16V16 for a layer outside
                ``unquantized_layers``, or another pair for a layer in it.
        """
        return self.score_tokens(pairs)[0]

    def score_tokens(self, pairs: Mapping[int, PrecisionPair]) -> tuple[Quality, np.ndarray]:
        """Quality, and the KL of each predicted position, float32 [num_tokens]. Raises as :meth:`score`."""
        scores = self._trial(pairs, _score, self._windows)
        return Quality(**scores.summary(), num_tokens=len(scores.kl)), scores.kl

    def score_task(self, pairs: Mapping[int, PrecisionPair]) -> TaskScore:
        """Accuracy on ``task`` with these pairs. Raises as :meth:`score`."""
        assert self._task is not None, "score_task needs a task"
        answers = self._trial(pairs, _answer, Asked(self._task.prompts, self._task.max_tokens))
        return self._task.score(answers)

    def set_transforms(self, transforms: ModelTransforms) -> None:
        """Transforms of the scores from now on; the statics file is read at every score.

        Raises:
            ValueError: layers that do not exist, or statics that are missing or do not fit.
        """
        self._profile = self._checked(transforms)

    def close(self) -> None:
        """End the engine's process and delete the reference."""
        if self._process is not None:
            self._process.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "CalibrationEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_room(self) -> Path:
        """The profile that the engine starts with."""
        path = self._folder / "room.yaml"
        layers = {layer: str(pair) for layer, pair in self._base.items()}
        path.write_text(yaml.safe_dump({"version": 1, "layers": layers, **plain_window(self._recent_window)}))
        return path

    def _checked(self, transforms: ModelTransforms) -> Profile:
        """The profile of these transforms, its pairs still to be given.

        Raises:
            ValueError: as :meth:`set_transforms`.
        """
        window = plain_window(self._recent_window)
        profile = Profile(
            name="calibration",
            source=None,
            pairs=self._base,
            transforms=transforms.default,
            transform_overrides=transforms.overrides,
            attend_cached_prefill=True,
            statics=transforms.statics,
            recent_window=window["recent_window"],
            recent_window_bits=window["recent_window_bits"],
            sink_tokens=window["sink_tokens"],
        )
        resolved = profile.resolve(self._shape)
        if transforms.statics is not None:
            load_statics(transforms.statics, resolved)
        elif needing := [layer.index for layer in resolved.layers if layer.transforms.needs_statics]:
            raise ValueError(f"statics must be given for the transforms of layers {needing}, but got none")
        return profile

    def _trial(
        self,
        pairs: Mapping[int, PrecisionPair],
        function: Callable[[ResolvedProfile, Argument], Result],
        argument: Argument,
    ) -> Result:
        assert self._process is not None
        self.wait()
        started = time.monotonic()
        result = self._process.run(function, replace(self._profile, pairs=pairs).resolve(self._shape), argument)
        self.trial_seconds = time.monotonic() - started
        logger.info("trial: %.1f s", self.trial_seconds)
        return result


_engine: MeasuringEngine
"""The engine of this process, where this module serves a CalibrationEngine elsewhere."""


def _build(options: EngineOptions, reference: ReferenceLogits) -> None:
    global _engine
    _engine = MeasuringEngine(options, reference)


def _score(resolved: ResolvedProfile, windows: tuple[Window, ...]) -> TokenScores:
    _engine.switch(resolved)
    return _engine.run_windows(windows, progress=False)[0]


def _answer(resolved: ResolvedProfile, asked: Asked) -> tuple[Completion, ...]:
    _engine.switch(resolved)
    return _engine.answer(asked, progress=False)
