"""Progress of work that takes minutes: a bar on a terminal, and a line now and then anywhere else."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

from kvtuner_tools.processes import progress_stream

LINE_SECONDS = 30.0
"""Time between two lines where there is no terminal."""

Item = TypeVar("Item")


class Progress:
    """How far some work is, on stderr. A context manager.

    Estimates take the work's own pace: :meth:`restart` leaves out what came before, such as an engine's start.

    Args:
        name: of the work.
        unit: of its parts, in the singular.
        total: parts; may change by :meth:`show`.
        done: parts that an earlier run has done.
    """

    def __init__(self, name: str, unit: str, total: int | None = None, done: int = 0) -> None:
        stream = progress_stream()
        self._name, self._unit, self._total, self._done = name, unit, total, done
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        if stream.isatty():
            self._bar = tqdm(desc=name, unit=unit, total=total, initial=done, file=stream, dynamic_ncols=True)
        self._note = ""
        self.restart()

    def restart(self) -> None:
        """Take the pace from now on."""
        self._before, self._started = self._done, time.monotonic()
        self._said = self._started
        if self._bar is not None:
            self._bar.initial = self._bar.n
            self._bar.start_t = self._bar.last_print_t = time.time()

    def show(self, done: int, total: int | None = None, note: str | None = None) -> None:
        """So many parts are done; what is None stays as it was."""
        self._total = self._total if total is None else total
        self._note = self._note if note is None else note
        is_last = self._total is not None and done >= self._total and done > self._done
        self._done = done
        if self._bar is not None:
            self._bar.total, self._bar.n = self._total, done
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.refresh()
        elif is_last or time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            print(self._line(), file=self._stream, flush=True)

    def advance(self) -> None:
        """One part more is done."""
        self.show(self._done + 1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _line(self) -> str:
        of = "" if self._total is None else f" of {self._total}"
        line = f"{self._name}: {self._done}{of} {self._unit}s"
        made = self._done - self._before
        if self._total is not None and made > 0 and self._total > self._done:
            seconds = (time.monotonic() - self._started) / made * (self._total - self._done)
            line += f", about {timedelta(seconds=round(seconds))} left"
        return f"{line}, {self._note}" if self._note else line

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def track(items: Iterable[Item], name: str, unit: str, *, total: int, done: int = 0) -> Iterator[Item]:
    """The items, with progress shown as each is done.

    Args:
        items: to go through.
        name: of the work.
        unit: of its parts, in the singular.
        total: parts, those that an earlier run has done included.
        done: those.
    """
    with Progress(name, unit, total, done) as progress:
        for item in items:
            yield item
            progress.advance()
