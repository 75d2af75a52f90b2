"""The engines of one command: how few start, and when.

Two things take most of the time of a quick calibration, imports and engine starts. So the process of the first engine
imports vLLM while options are checked. That engine gives everything unquantized: generated text, the capture, and the
held-out text's logits. The engine that scores settings starts when the first one has ended, while layers are measured.
"""

import logging
import shutil
import tempfile
from pathlib import Path

from kvtuner_tools.calibration.artifacts import Evaluator
from kvtuner_tools.calibration.engine_evaluator import EngineEvaluator, room_of
from kvtuner_tools.calibration.study import EvaluatorSpec
from kvtuner_tools.engines.calibration import CHUNK
from kvtuner_tools.engines.evaluate import EngineOptions
from kvtuner_tools.engines.unquantized import RecordedText, UnquantizedEngine
from kvtuner_tools.processes import OwnProcess

logger = logging.getLogger("kvtuner")


class RunEngines:
    """Engines that stages of one command share. ``close`` ends them all.

    Args:
        process: of the first engine; None makes one when it is needed.
    """

    def __init__(self, process: OwnProcess | None = None) -> None:
        self._process = process
        self._unquantized: UnquantizedEngine | None = None
        self._chunk = 0
        self._folder: Path | None = None
        self._recorded: RecordedText | None = None
        self._ahead: EngineEvaluator | None = None

    def unquantized(self, options: EngineOptions) -> UnquantizedEngine:
        """The engine for what is unquantized, until :meth:`end_unquantized`."""
        self._process = self._process or OwnProcess()
        self._folder = Path(tempfile.mkdtemp(prefix="kvtuner-calibration-"))
        self._unquantized = UnquantizedEngine(options, self._folder / "logits", self._process)
        self._chunk = options.chunk
        return self._unquantized

    def record(self, windows: tuple[tuple[int, ...], ...]) -> None:
        """Keep the logits of windows that settings will be scored on, if the engine runs and is made for it.

        Steps of more than ``CHUNK`` tokens have logits of more memory than a model; :class:`CalibrationEngine` has an
        engine of smaller ones then.
        """
        assert self._unquantized is not None, "what is recorded comes from the engine of the capture"
        if self._unquantized.is_running and self._chunk <= CHUNK:
            self._recorded = self._unquantized.record(windows)

    def end_unquantized(self) -> None:
        """End the first engine: its memory is the next one's."""
        if self._unquantized is not None:
            self._unquantized.end()
        self._end_process()

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = self._unquantized = None

    def start_ahead(self, spec: EvaluatorSpec) -> None:
        """Start the engine of ``spec``, whose transforms do not matter yet, if its text is recorded."""
        if self._recorded is not None and self._recorded.windows == spec.windows:
            self._ahead = EngineEvaluator(room_of(spec), self._recorded)

    def evaluator(self, spec: EvaluatorSpec) -> Evaluator | None:
        """The engine that was started ahead, if it is that of ``spec``; whoever gets it closes it."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        try:
            if ahead.serves(spec):
                ahead.become(spec)
                return ahead
            ahead.close()
        except Exception as error:
            # Beside what measured the layers it may have had too little memory, which is free now.
            logger.warning("the engine that started while layers were measured ended (%s); it starts again", error)
            ahead.close()
        return None

    def close(self) -> None:
        self._end_process()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
