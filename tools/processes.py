"""Running one engine at a time, each in a process of its own."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import Any, TextIO, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

STDERR = 2
"""File descriptor: where the output of processes goes that are told to be heard."""
_output: Path | int | None = None
"""Where processes that are made write; None for where their owner does."""
_progress: TextIO | None = None
"""This process's way to the owner's stderr, where its own stderr goes elsewhere."""


@contextlib.contextmanager
def output_to(where: Path | int | None) -> Iterator[None]:
    """Processes that are made meanwhile write stdout and stderr to the end of a file, or to a file descriptor.

    Progress (:func:`progress_stream`) goes to the owner's stderr all the same.
    """
    global _output
    before, _output = _output, where
    try:
        yield
    finally:
        _output = before


def progress_stream() -> TextIO:
    """Where progress is shown: stderr, of the owner in a process whose output goes elsewhere."""
    return sys.stderr if _progress is None else _progress


class OwnProcess:
    """A fresh process that runs functions one after the other and keeps what they leave in their modules.

    It ends with the process that made it, however that ends, and leaves Ctrl-C to it.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_begin, initargs=(_output,))
        self._pid = self._pool.submit(os.getpid).result()
        self._last: Future[Any] | None = None

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(*arguments)`` there; interrupted while it runs, the process is ended.

        Raises:
            BrokenProcessPool: the process was killed.
            Exception: whatever ``function`` raised, with its traceback.
        """
        future = self.submit(function, *arguments)
        try:
            return future.result()
        except BaseException:
            self._stop()
            raise

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """``function(*arguments)`` there, behind what was submitted before, without waiting for it."""
        self._last = self._pool.submit(function, *arguments)
        return self._last

    def close(self) -> None:
        """End the process, amid whatever it does, and wait until its memory and device context are gone."""
        self._stop()
        self._pool.shutdown()

    def _stop(self) -> None:
        """Kill a process that is at work."""
        if self._last is not None and not self._last.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)


def in_own_process(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """``function(argument)`` in a fresh process, whose memory and device context are gone when this returns.

    Raises:
        BrokenProcessPool: the process was killed.
        Exception: whatever ``function`` raised, with its traceback.
    """
    process = OwnProcess()
    try:
        return process.run(function, argument)
    finally:
        process.close()


def _begin(output: Path | int | None) -> None:
    _follow_owner()
    if output is not None:
        redirect(output)


def redirect(output: Path | int) -> None:
    """Send what this process and its libraries write to another place: to the end of a file, or to the owner's stderr.

    Args:
        output: the file, or ``STDERR``.
    """
    global _progress
    if _progress is None:
        _progress = os.fdopen(os.dup(STDERR), "w", buffering=1)
    if isinstance(output, int):
        target = _progress.fileno()
    else:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, STDERR):
        os.dup2(target, descriptor)
    if target != _progress.fileno():
        os.close(target)


def _follow_owner() -> None:
    """Leave Ctrl-C to the owner, and end when it is gone: an orphan would hold its engine's memory for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner = multiprocessing.parent_process()
    assert owner is not None

    def watch() -> None:
        connection.wait([owner.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
