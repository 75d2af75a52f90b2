"""Running one engine at a time, each in a process of its own."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from typing import Any, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class OwnProcess:
    """A fresh process that runs functions one after the other and keeps what they leave in their modules.

    It ends with the process that made it, however that ends, and leaves Ctrl-C to it.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_follow_owner)
        self._pid = self._pool.submit(os.getpid).result()

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """``function(*arguments)`` there; interrupted while it runs, the process is ended.

        Raises:
            BrokenProcessPool: the process was killed.
            Exception: whatever ``function`` raised, with its traceback.
        """
        future = self._pool.submit(function, *arguments)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGTERM)
            raise

    def close(self) -> None:
        """End the process and wait until its memory and device context are gone."""
        self._pool.shutdown()


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


def _follow_owner() -> None:
    """Leave Ctrl-C to the owner, and end when it is gone: an orphan would hold its engine's memory for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    owner = multiprocessing.parent_process()
    assert owner is not None

    def watch() -> None:
        connection.wait([owner.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
