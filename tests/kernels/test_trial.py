"""Whether the CUDA kernels may serve on a card: what passes, what fails and how it is told."""

import json
import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vllm_kvtuner.kernels import trial, trial_process
from vllm_kvtuner.kernels.contract import AttentionShape, BatchLimits
from vllm_kvtuner.kernels.self_test_cases import Case
from vllm_kvtuner.kernels.self_test_errors import Errors
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair

DEVICE = torch.device("cuda", 0)
RIGHT = Errors(store=0.5, gather=1e-3, decode=1e-4, lse=0.0, stray=0, seconds=0.01)
WRONG = Errors(store=0.5, gather=1e-3, decode=0.25, lse=0.0, stray=0, seconds=0.01)


def case(pair="K4V4", block_size=16):
    layout = PageLayout(PrecisionPair.parse(pair), 64, block_size)
    return Case(layout, AttentionShape(8, 2, 64, 0.125), BatchLimits(8, 1))


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Sets the card's compute capability; processes are refused until a test gives their answer."""
    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(trial, "_versions", lambda: ("driver 13000", "NVRTC (13, 0)"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    trial._verdict.cache_clear()
    yield lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    trial._verdict.cache_clear()


@pytest.fixture
def processes(monkeypatch):
    """Answers for processes, and what each was asked."""
    asked = []

    def answer(status=0, stdout="", stderr="", error=None):
        def run(command, input, capture_output, timeout, check):
            asked.append(SimpleNamespace(command=command, cases=pickle.loads(input)[0], timeout=timeout))
            if error is not None:
                raise error
            return subprocess.CompletedProcess(command, status, stdout.encode(), stderr.encode())

        monkeypatch.setattr(subprocess, "run", run)
        return asked

    return answer


@pytest.fixture
def log(caplog, monkeypatch):
    logger = logging.getLogger("vllm.vllm_kvtuner.kernels.trial")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # vLLM's loggers do not propagate
    monkeypatch.setattr(logger, "propagate", False)
    caplog.set_level(logging.INFO, logger=logger.name)
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def measured(errors=RIGHT):
    """A measure that gives these errors, or raises them, and the cases that it was asked."""
    seen = []

    def measure(tested, device):
        seen.append(tested)
        if isinstance(errors, Exception):
            raise errors
        return errors

    return measure, seen


PASSED = json.dumps({"failure": None, "refused": None})


def test_a_card_that_was_run_is_tested_in_the_process(card, log):
    card(9, 0)
    measure, seen = measured()
    verdict = trial.prove([case(), case("K2V2"), case(block_size=64)], DEVICE, measure)
    assert verdict.failure is None and not verdict.in_a_process
    assert seen == [case(), case("K2V2")], "each kind once"
    ((level, text),) = log()
    assert level == "INFO"
    assert text.startswith("CUDA kernels: 2 self-tests passed on a card (compute capability 9.0) in 0.")
    assert str(verdict).startswith("passed after 0.")


def test_what_has_passed_is_not_asked_again(card):
    card(9, 0)
    measure, seen = measured()
    for _ in range(2):
        assert trial.prove([case()], DEVICE, measure).failure is None
    assert trial.prove([case(block_size=128)], DEVICE, measure).failure is None
    assert len(seen) == 1
    trial.prove([case("K8V8")], DEVICE, measure)
    assert len(seen) == 2


def test_wrong_numbers_fail_the_card_for_all_layers(card, log):
    card(9, 0)
    measure, seen = measured(WRONG)
    verdict = trial.prove([case(), case("K2V2")], DEVICE, measure)
    assert verdict.failure == "K4V4 of head size 64: decode error 0.25 above 0.005"
    assert trial.prove([case("K8V8")], DEVICE, measure).failure == verdict.failure
    assert len(seen) == 1, "the rest is not asked"
    ((level, text),) = log()
    assert level == "WARNING"
    assert text.startswith("CUDA kernels: the self-test failed on a card (compute capability 9.0): K4V4 of head size")
    assert "Triton's serve instead" in text
    assert str(verdict).startswith("failed: K4V4 of head size 64: decode error 0.25 above 0.005; after")


def test_nan_is_wrong(card):
    card(9, 0)
    measure, _ = measured(Errors(0.5, float("nan"), 1e-4, 0.0, 0, 0.01))
    assert "gather error nan" in trial.prove([case()], DEVICE, measure).failure


def test_an_error_of_compiler_or_launch_fails_the_card(card, monkeypatch):
    card(9, 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    measure, _ = measured(RuntimeError("no image\nfor this card" + " x" * 500))
    failure = trial.prove([case()], DEVICE, measure).failure
    assert failure.startswith("K4V4 of head size 64: RuntimeError: no image for this card x x")
    assert failure.endswith("...") and len(failure) < 400


def test_a_broken_context_is_an_error_that_names_the_way_out(card, monkeypatch):
    card(9, 0)

    def broken(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    measure, _ = measured(RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match=r"a card .*K4V4.*CUDA error\); KVTUNER_DECODE_KERNEL=triton serves"):
        trial.prove([case()], DEVICE, measure)


def test_the_users_errors_stay_the_users(card):
    card(9, 0)
    measure, _ = measured(ValueError("KVTUNER_KERNEL_CACHE: must be a writable folder"))
    with pytest.raises(ValueError, match=r"^KVTUNER_KERNEL_CACHE"):
        trial.prove([case()], DEVICE, measure)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_a_card_that_nobody_ran_is_tried_in_a_process_first(card, processes, capability):
    card(*capability)
    asked = processes(stdout=f"a line of another library\n{PASSED}\n")
    measure, seen = measured()
    verdict = trial.prove([case(), case("K2V2")], DEVICE, measure)
    assert verdict.failure is None and verdict.in_a_process
    (process,) = asked
    assert process.cases == seen == [case(), case("K2V2")], "all in one, then here"
    assert process.command[0] == sys.executable
    assert process.timeout > 2 * trial.CASE_SECONDS
    assert "first in a process of its own" in str(verdict)


def test_what_a_process_has_survived_is_noted(card, processes, monkeypatch):
    """By case, card, driver and sources; the numbers are looked at in every engine."""
    card(8, 9)
    asked = processes(stdout=PASSED)
    measure, seen = measured()

    def start(*cases):
        trial._verdict.cache_clear()
        assert trial.prove(cases, DEVICE, measure).failure is None

    start(case())
    start(case())
    assert len(asked) == 1 and seen == [case(), case()]
    start(case(), case("K2V2"))
    assert [process.cases for process in asked] == [[case()], [case("K2V2")]]
    for name, other in (
        ("_versions", ("driver 13010", "NVRTC (13, 0)")),
        ("_sources", "another digest"),
        ("_card", "another card"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trial, name, lambda *_, other=other: other)
            start(case())
        assert len(asked) == 3, name
        del asked[-1]
    # The last of them has noted what holds for the card alone.
    start(case())
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ({"stdout": json.dumps({"failure": "K4V4: wrong", "refused": None})}, "K4V4: wrong"),
        ({"status": -11, "stderr": ""}, "its process ended with status -11: no message"),
        ({"status": 1, "stderr": "Traceback\nRuntimeError: illegal\n"}, "status 1: RuntimeError: illegal"),
        ({"error": subprocess.TimeoutExpired("python", 1)}, "its process was ended after 240 s"),
    ],
    ids=["wrong", "a fault", "an error", "a hang"],
)
def test_a_process_that_fails_spares_this_one(card, processes, answer, failure):
    card(12, 0)
    asked = processes(**answer)
    measure, seen = measured()
    assert failure in trial.prove([case()], DEVICE, measure).failure
    assert not seen
    trial._verdict.cache_clear()
    assert failure in trial.prove([case()], DEVICE, measure).failure
    assert len(asked) == 2, "a failure is not noted: the next engine asks again"


def test_the_users_error_comes_from_the_process_too(card, processes):
    card(8, 0)
    processes(stdout=json.dumps({"failure": None, "refused": "KVTUNER_KERNEL_CACHE: no room"}))
    with pytest.raises(ValueError, match=r"^KVTUNER_KERNEL_CACHE: no room"):
        trial.prove([case()], DEVICE, measured()[0])


def test_nothing_is_asked_of_a_card_without_cases(card):
    assert trial.prove([], DEVICE, measured()[0]) == trial.Verdict()


def ask_the_process(monkeypatch, capsys, outcomes):
    """What the process would print, measured there being these outcomes in turn."""
    question = pickle.dumps(([case()] * len(outcomes), DEVICE))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(read=None)))
    monkeypatch.setattr(trial_process.pickle, "load", lambda stream: pickle.loads(question))
    turn = iter(outcomes)

    def measure(tested, device):
        outcome = next(turn)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(trial_process.gpu, "measure_cuda", measure)
    monkeypatch.setattr(trial_process.gpu, "compile_cuda", trial.compile_as_they_run)
    trial_process.main()
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("outcomes", "failure", "refused"),
    [
        ([RIGHT, RIGHT], None, None),
        ([RIGHT, WRONG], "K4V4 of head size 64: decode error 0.25 above 0.005", None),
        ([ValueError("KVTUNER_KERNEL_CACHE: no")], None, "KVTUNER_KERNEL_CACHE: no"),
    ],
    ids=["right", "wrong", "the user's"],
)
def test_what_the_process_answers(monkeypatch, capsys, outcomes, failure, refused):
    assert ask_the_process(monkeypatch, capsys, outcomes) == {"failure": failure, "refused": refused}


@pytest.mark.slow
def test_a_real_process_without_a_gpu_fails(card, monkeypatch):
    """It is started as from an engine, imports what it needs, and its end is told."""
    card(8, 0)
    monkeypatch.undo()
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert trial._in_a_process([case()], DEVICE).startswith("its process ended with status 1: ")


@pytest.mark.gpu
def test_a_real_process_passes(device):
    """What a card takes that nobody ran, on one that was."""
    assert trial._in_a_process([case(), case("K2V2")], device) is None
