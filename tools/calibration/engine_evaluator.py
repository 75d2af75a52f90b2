"""Settings scored by vLLM: an engine made of a plan's description, started when it is needed or ahead of that."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from kvtuner_tools.calibration.artifacts import STATICS_FILE, Evaluator, Quality
from kvtuner_tools.calibration.study import EvaluatorSpec
from kvtuner_tools.engines.calibration import CacheRoom, CalibrationEngine, ModelTransforms
from kvtuner_tools.engines.unquantized import RecordedText
from vllm_kvtuner.pages.layout import PrecisionPair


class EngineEvaluator:
    """A calibration engine with the file that its statics are read from.

    Args:
        spec: what it is built from.
        recorded: the logits of its windows, where they are known; the engine starts while its owner goes on then.
    """

    def __init__(self, spec: EvaluatorSpec, recorded: RecordedText | None = None) -> None:
        self._spec = spec
        self._folder = TemporaryDirectory(prefix="kvtuner-statics-")
        self._engine = CalibrationEngine(
            spec.model,
            spec.windows if recorded is None else recorded,
            transforms=self._transforms(spec),
            room=CacheRoom(spec.unquantized, spec.recent_window, spec.kv_memory_bytes),
            dtype=spec.dtype,
            words=spec.words,
        )

    def score(self, pairs: Mapping[int, PrecisionPair]) -> Quality:
        return self._engine.score(pairs)

    def score_tokens(self, pairs: Mapping[int, PrecisionPair]) -> tuple[Quality, np.ndarray]:
        return self._engine.score_tokens(pairs)

    def serves(self, spec: EvaluatorSpec) -> bool:
        """Whether this is the engine of ``spec``, but for transforms and statics, which can change."""
        return room_of(spec) == room_of(self._spec)

    def become(self, spec: EvaluatorSpec) -> None:
        """Score with the transforms and statics of ``spec``, which it serves, from now on; wait until it can.

        Raises:
            Exception: what kept the engine from starting.
        """
        self._spec = spec
        self._engine.wait()
        self._engine.set_transforms(self._transforms(spec))

    def close(self) -> None:
        self._engine.close()
        self._folder.cleanup()

    def _transforms(self, spec: EvaluatorSpec) -> ModelTransforms:
        statics = None
        if spec.statics is not None:
            statics = Path(self._folder.name) / STATICS_FILE
            statics.write_bytes(spec.statics)
        return ModelTransforms(overrides=spec.transforms, statics=statics)


def room_of(spec: EvaluatorSpec) -> EvaluatorSpec:
    """What an engine is started with: all but transforms and statics."""
    return replace(spec, transforms={}, statics=None)


def start_engine(spec: EvaluatorSpec) -> Evaluator:
    """vLLM as the measuring instrument."""
    return EngineEvaluator(spec)
