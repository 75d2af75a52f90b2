"""Calibrate a model before its engine starts, once: ``auto:BITS,calibrate``.

A process of its own does it, whose memory is the engine's again when it has ended. It keeps the outcome in the user's
folder, where the next start finds it. What was interrupted goes on where it was.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvtuner import envs
from vllm_kvtuner.profile.problems import ProfileError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.auto_request import Budget
    from vllm_kvtuner.profile.places import Candidate

WORK_FOLDER = "unfinished"
"""Where, in the user's folder, calibrations are that have not ended."""
PROGRAM = ("-m", "kvtuner_tools.cli", "calibrate")
"""What Python runs: the command, which this package must not import."""
SHOWN_LINES = 12
"""Last lines of a calibration's output that its refusal has."""
STOP_SECONDS = 30.0

logger = logging.getLogger("vllm.kvtuner")


def calibrate_once(config: VllmConfig, spec: str, budget: Budget, known: Callable[[], Candidate | None]) -> Candidate:
    """Calibrate the model quickly, unless another process does; its outcome is then taken.

    Args:
        config: of the engine that is to start.
        spec: what was asked for.
        budget: what the profile must be within.
        known: the best profile that is there, or None.

    Returns:
        The profile.

    Raises:
        ProfileError: calibration failed, with the reason that it gave.
    """
    arguments = calibration_arguments(config, budget)
    work = envs.profile_folder() / WORK_FOLDER / hashlib.sha256(repr(arguments).encode()).hexdigest()[:16]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = "the user's folder of profiles (KVTUNER_PROFILE_FOLDER) must be one that can be written to"
        raise ProfileError([f"{spec}: {rule}, but got {work}: {error.strerror}"]) from None
    with _locked(work.with_suffix(".lock")):
        if (found := known()) is not None:  # another process has made it meanwhile
            return found
        logger.info("kvtuner: %s finds no profile of this model yet; calibrating in %s", spec, work)
        _run(spec, [*arguments, "--out", str(work)])
        if (found := known()) is None:
            rule = "calibration must end in a profile within the budget"
            raise ProfileError([f"{spec}: {rule}, but got none of {budget} in {work}"])
        shutil.rmtree(work, ignore_errors=True)
        return found


def calibration_arguments(config: VllmConfig, budget: Budget) -> list[str]:
    """Arguments of ``kvtuner calibrate`` for a model on the devices of an engine, without an output folder.

    What calibration does not take, it refuses itself.
    """
    model, parallel, load = config.model_config, config.parallel_config, config.load_config
    given = {
        "--tensor-parallel-size": (parallel.tensor_parallel_size, 1),
        "--pipeline-parallel-size": (parallel.pipeline_parallel_size, 1),
        "--revision": (model.revision, None),
        "--tokenizer": (model.tokenizer, model.model),
        "--download-dir": (load.download_dir, None),
        "--load-format": (load.load_format, "auto"),
    }
    words = [model.model, "--quick", *budget.arguments.split(), "--dtype", str(model.dtype).removeprefix("torch.")]
    for flag, (value, default) in given.items():
        if value != default:
            words += [flag, str(value)]
    return [*words, "--trust-remote-code"] if model.trust_remote_code else words


def _run(spec: str, arguments: list[str]) -> None:
    """Run it, each line of its output into the log.

    Raises:
        ProfileError: it ended with another status than 0.
    """
    process = subprocess.Popen(
        [sys.executable, *PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=envs.without_profile(),
        text=True,
        errors="replace",
    )
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line := line.rstrip():
                last.append(line)
                logger.info("calibration: %s", line)
        status = process.wait()
    finally:
        if process.poll() is None:  # this process is being ended, as by Ctrl-C, which reaches the other one too
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
    if status:
        reason = "; ".join(last) or "nothing on its output"
        rule = "calibration before the engine's start must succeed"
        raise ProfileError([f"{spec}: {rule}, but got status {status}: {reason}"])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the system gives back however the process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("kvtuner: another process calibrates this model; waiting for it (%s)", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
