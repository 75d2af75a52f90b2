"""One engine with the unquantized cache for all that a calibration takes from it: text, what layers see, and logits.

An engine's start takes as long as thousands of tokens. So whoever needs it again asks the one that runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvtuner_tools.engines.evaluate import EngineOptions, MeasuringEngine, ReferenceLogits, Window
from kvtuner_tools.processes import OwnProcess

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RecordedText:
    """Windows whose logits with the unquantized cache are known.

    Args:
        windows: token ids of each.
        logits: of all predicted positions, one window after the other.
        chunk: tokens of a step, which rounding depends on.
    """

    windows: tuple[tuple[int, ...], ...]
    logits: ReferenceLogits
    chunk: int


class UnquantizedEngine:
    """An engine in a process of its own, which starts when it is first asked for something.

    Args:
        options: how to build it, with the setting ``auto``.
        logits: file that :meth:`record` writes to; it is the caller's to remove.
        process: where to; one that has nothing else to do, and has vLLM imported at best.

    Attributes:
        is_running: whether it was asked for anything.
    """

    def __init__(self, options: EngineOptions, logits: Path, process: OwnProcess) -> None:
        self.is_running = False
        self._options, self._logits, self._process = options, logits, process

    def run(self, function: Callable[[MeasuringEngine, Argument], Result], argument: Argument) -> Result:
        """``function(engine, argument)`` in the engine's process."""
        if not self.is_running:
            self._process.run(_build, self._options, self._logits)
            self.is_running = True
        return self._process.run(_run, function, argument)

    def record(self, windows: Sequence[tuple[int, ...]]) -> RecordedText:
        """Keep the logits of these windows, once in an engine's life."""
        logits = self.run(_record, tuple(map(Window, windows)))
        return RecordedText(tuple(windows), logits, self._options.chunk)

    def end(self) -> None:
        """End the engine and, where it has ranks, their processes; its own remains."""
        if self.is_running:
            self._process.run(_end)
            self.is_running = False


_engine: MeasuringEngine
"""The engine of this process, where this module serves an UnquantizedEngine elsewhere."""


def _build(options: EngineOptions, logits: Path) -> None:
    global _engine
    _engine = MeasuringEngine(options, logits)


def _end() -> None:
    _engine.close()


def _run(function: Callable[[MeasuringEngine, Argument], Result], argument: Argument) -> Result:
    return function(_engine, argument)


def _record(engine: MeasuringEngine, windows: tuple[Window, ...]) -> ReferenceLogits:
    return engine.run_windows(windows, progress=True)[1]
