"""What vLLM logs while a command asks it about a model, without an engine."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"

NAMES = ("vllm", "transformers")


@contextlib.contextmanager
def importing_vllm() -> Iterator[None]:
    """vLLM reads its log's level and stream when it is imported: warnings, to stderr, unless the user asks for more.

    The variable is put back, since an engine that is started later logs by it.
    """
    given = os.environ.get(LEVEL_VARIABLE)
    os.environ.setdefault(LEVEL_VARIABLE, "WARNING")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if given is None:
            os.environ.pop(LEVEL_VARIABLE, None)


def import_vllm() -> None:
    """What a process can do before anyone knows which engine it will run."""
    with importing_vllm():
        import vllm.v1.engine.core  # noqa: F401
        from vllm import LLM  # noqa: F401


@contextlib.contextmanager
def results_alone_on_stdout() -> Iterator[None]:
    """An engine that is not started has nothing to warn of: errors alone are logged, to stderr, of what `NAMES` log."""
    loggers = [logging.getLogger(name) for name in NAMES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
