"""Whether the CUDA kernels may serve on a card: they compute small random cases, and any error leaves it to Triton's.

Every card is asked at every start, in this process, by the variants that will serve: that takes less than a second once
they are compiled, which they have to be anyway. They are compiled side by side, before the first of them runs. On a
card of a kind that nobody ran them on, a kernel could also hang, or end the process by a fault; so there a process of
its own goes first, which costs seconds. What has passed there is noted beside the compiled kernels, by card, driver,
compiler and sources, and not asked of a process again.
"""

import functools
import hashlib
import json
import logging
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_kvtuner.kernels import arguments, cache_folder
from vllm_kvtuner.kernels.self_test_cases import Case
from vllm_kvtuner.kernels.self_test_errors import Errors

logger = logging.getLogger(f"vllm.{__name__}")

RUN_CAPABILITIES = ((9, 0),)
"""Compute capabilities of cards that this package's tests ran on: H200."""
PROCESS = "vllm_kvtuner.kernels.trial_process"
START_SECONDS = 120.0
"""For a process to import torch and to find the card."""
CASE_SECONDS = 120.0
"""For a case there, whose variants are compiled in seconds each; after that it is taken to hang."""
WAY_OUT = "KVTUNER_DECODE_KERNEL=triton serves without them"

Measure = Callable[[Case, torch.device], Errors]
Compile = Callable[[Sequence[Case], torch.device], Mapping[Case, Exception]]
"""Compiles what cases run; gives why, of cases of which some does not compile."""


def compile_as_they_run(cases: Sequence[Case], device: torch.device) -> Mapping[Case, Exception]:
    """Nothing beforehand."""
    return {}


@dataclass
class Verdict:
    """What is known of the CUDA kernels on one card.

    Args:
        failure: why they must not serve there, or None; it stands for all layers, whichever showed it.
        passed: kinds of layers that they computed right.
        in_a_process: whether a process of its own went first.
        seconds: that all of it took, compiling included.
    """

    failure: str | None = None
    passed: set[Case] = field(default_factory=set)
    in_a_process: bool = False
    seconds: float = 0.0

    def __str__(self) -> str:
        where = " (first in a process of its own, since no card of this kind was run)" if self.in_a_process else ""
        what = "passed" if self.failure is None else f"failed: {self.failure};"
        return f"{what} after {self.seconds:.2f} s{where}"


def prove(
    cases: Iterable[Case], device: torch.device, measure: Measure, compile_cases: Compile = compile_as_they_run
) -> Verdict:
    """Test the CUDA kernels on a card, as far as no case of that kind has been tested there.

    Args:
        cases: what layers are like.
        device: a GPU.
        measure: runs the CUDA kernels on a case.
        compile_cases: compiles them for all cases before.

    Raises:
        ValueError: the kernels cannot be kept, as :func:`vllm_kvtuner.kernels.cache_folder.make`.
        RuntimeError: they have broken this process's CUDA context, which serves nothing any more.
    """
    verdict = _verdict(device)
    kinds: dict[Case, Case] = {}
    for case in cases:
        if case.kind not in verdict.passed:
            kinds.setdefault(case.kind, case)
    new = list(kinds.values())
    if not new or verdict.failure is not None:
        return verdict
    begin = time.monotonic()
    if torch.cuda.get_device_capability(device) not in RUN_CAPABILITIES:
        notes = {case: _note(case, device) for case in new}
        if unknown := [case for case, note in notes.items() if not note.exists()]:
            verdict.in_a_process = True
            verdict.failure = _in_a_process(unknown, device)
            if verdict.failure is None:
                for case in unknown:
                    notes[case].write_text(f"{_card(device)}: {case!r}\n")
    if verdict.failure is None:
        passed, verdict.failure = try_cases(new, device, measure, compile_cases)
        verdict.passed.update(case.kind for case in passed)
    seconds = time.monotonic() - begin
    verdict.seconds += seconds
    if verdict.failure is None:
        logger.info("CUDA kernels: %d self-tests passed on %s in %.2f s", len(new), _card(device), seconds)
    else:
        text = "CUDA kernels: the self-test failed on %s: %s. Triton's serve instead; please report it."
        logger.warning(text, _card(device), verdict.failure)
    return verdict


def try_cases(
    cases: Sequence[Case], device: torch.device, measure: Measure, compile_cases: Compile
) -> tuple[list[Case], str | None]:
    """Run the CUDA kernels on cases in this process, one after the other, until one fails.

    Args:
        cases, device, measure, compile_cases: as :func:`prove`.

    Returns:
        The cases that passed, and how the next one failed, or None.

    Raises:
        ValueError, RuntimeError: as :func:`prove`.
    """
    broken = compile_cases(cases, device)
    passed: list[Case] = []
    for case in cases:
        failure = _failure_of(case, device, measure, broken.get(case))
        if failure is not None:
            return passed, failure
        passed.append(case)
    return passed, None


def _failure_of(case: Case, device: torch.device, measure: Measure, broken: Exception | None) -> str | None:
    """How the CUDA kernels fail on a case in this process, or None; ``broken`` is why they did not compile."""
    try:
        if broken is not None:
            raise broken
        problem = measure(case, device).problem
    except ValueError:  # the user's, such as a folder that cannot be written
        raise
    except Exception as error:  # compilers, drivers and launches fail in their own ways, each of them an answer
        try:
            torch.cuda.synchronize(device)
        except Exception:
            raise RuntimeError(
                f"the self-test of the CUDA kernels ended this process's use of {_card(device)} ({case}: "
                f"{_line(error)}); {WAY_OUT}"
            ) from error
        problem = _line(error)
    return None if problem is None else f"{case}: {problem}"


@functools.cache
def _verdict(device: torch.device) -> Verdict:
    return Verdict()


def _in_a_process(cases: Sequence[Case], device: torch.device) -> str | None:
    """How the kernels fail on cases in a process of its own, or None.

    Raises:
        ValueError: the user's, raised there.
    """
    # Where this process finds its modules, that one does; its answer is the last line that it prints.
    program = f"import sys; sys.path[:] = {sys.path!r}; from {PROCESS} import main; main()"
    limit = START_SECONDS + CASE_SECONDS * len(cases)
    question = pickle.dumps((list(cases), device))
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], input=question, capture_output=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return f"its process was ended after {limit:.0f} s"
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return f"its process ended with status {done.returncode}: {last[0]}"
    answer = json.loads(done.stdout.decode().strip().splitlines()[-1])
    if answer["refused"] is not None:
        raise ValueError(answer["refused"])
    return answer["failure"]


def _note(case: Case, device: torch.device) -> Path:
    """Where it is noted that a process has survived a case."""
    known = "\n".join((_card(device), *_versions(), _sources(), repr(case)))
    folder = cache_folder.make() / "survived"
    try:
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise cache_folder.unusable(error) from error
    return folder / hashlib.sha256(known.encode()).hexdigest()


def _card(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


@functools.cache
def _versions() -> tuple[str, str]:
    """Of the driver and of NVRTC."""
    from cuda.bindings import driver, nvrtc

    return f"driver {driver.cuDriverGetVersion()[1]}", f"NVRTC {nvrtc.nvrtcVersion()[1:]}"


@functools.cache
def _sources() -> str:
    """Digest of all that a compiled kernel and its launch are made of."""
    folder = Path(__file__).parent
    sources = [each for each in (folder / "cuda").rglob("*") if each.suffix in (".py", ".cu", ".cuh")]
    digest = hashlib.sha256()
    for path in sorted([*sources, Path(arguments.__file__)]):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    """An error in one line, not endless: compilers write pages."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]}..."
