"""Functions in processes that are forked from one that has imported vLLM, each with a limit of time and of memory."""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, TypeVar

import psutil

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # One thread, not bound to a core: for models this small, threads that wait for each other cost more than they do.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
POLL_SECONDS = 0.2

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class LimitedProcesses:
    """Runs functions, each in a process of its own.

    Args:
        seconds: that a function may take.
        memory: bytes of it that may be resident.
        preload: module that the server imports.
        log: file to which processes write what they print.
    """

    def __init__(self, seconds: float, memory: int, preload: str, log: Path) -> None:
        self._seconds, self._memory, self._log = seconds, memory, log
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([preload])
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT)
        try:
            forkserver.ensure_running()  # which hands its environment on
        finally:
            os.environ.clear()
            os.environ.update(before)

    def call(self, function: Callable[[Argument], Result], argument: Argument) -> Result:
        """``function(argument)`` there.

        Raises:
            TimeoutError: it took too long.
            MemoryError: it took too much memory.
            ChildProcessError: the process ended without an answer.
            RuntimeError: the function raised, with the kind and the message.
        """
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(theirs, function, argument, self._log))
        process.start()
        theirs.close()
        try:
            return self._wait(process, ours)
        finally:
            process.kill()
            process.join()
            ours.close()

    def _wait(self, process: Any, answer: "connection.Connection[Any, Any]") -> Any:
        started = time.monotonic()
        while not answer.poll(POLL_SECONDS):
            if time.monotonic() - started > self._seconds:
                raise TimeoutError(f"no answer within {self._seconds:g} s")
            with contextlib.suppress(psutil.NoSuchProcess):
                if psutil.Process(process.pid).memory_info().rss > self._memory:
                    raise MemoryError(f"more than {self._memory:,} bytes of memory")
        try:
            raised, result = answer.recv()
        except EOFError:
            process.join()
            raise ChildProcessError(f"the process ended with status {process.exitcode}") from None
        if raised:
            raise RuntimeError(result)
        return result


def _work(answer: Any, function: Callable[[Any], Any], argument: Any, log: Path) -> None:
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        found = False, function(argument)
    except Exception as error:
        found = True, f"{type(error).__name__}: {error}"
    sys.stdout.flush()
    answer.send(found)
    answer.close()
    os._exit(0)  # engines need no orderly end
