"""Running one engine at a time, each in a process of its own."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def in_own_process(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """``function(argument)`` in a fresh process, whose memory and device context are gone when this returns.

    Raises:
        BrokenProcessPool: the process was killed.
        Exception: whatever ``function`` raised, with its traceback.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, argument).result()
