"""A process of its own: state, errors, interruption, and its end with its owner's."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import pytest

from kvtuner_tools.processes import STDERR, OwnProcess, in_own_process, output_to, progress_stream, redirect

TIMEOUT_S = 30
OWNER = """
import os, time
from kvtuner_tools.processes import OwnProcess

if __name__ == "__main__":
    process = OwnProcess()
    print(process.run(os.getpid), flush=True)
    process.run(time.sleep, 600)
"""


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return
    os.kill(pid, signal.SIGKILL)
    pytest.fail(f"process {pid} outlived its owner")


def test_runs_elsewhere_and_keeps_state() -> None:
    process = OwnProcess()
    try:
        pid = process.run(os.getpid)
        assert pid != os.getpid()
        process.run(os.umask, 0o123)
        assert process.run(os.umask, 0) == 0o123
        with pytest.raises(ValueError, match="invalid literal"):
            process.run(int, "x")
        assert process.run(os.getpid) == pid
    finally:
        process.close()
    wait_until_gone(pid)


def test_in_own_process() -> None:
    assert in_own_process(len, "abc") == 3
    with pytest.raises(BrokenProcessPool):
        in_own_process(os._exit, 1)


def test_an_interrupted_call_ends_the_process() -> None:
    process = OwnProcess()
    pid = process.run(os.getpid)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            process.run(time.sleep, 600)
    finally:
        signal.signal(signal.SIGALRM, previous)
    process.close()
    wait_until_gone(pid)


def test_work_that_nobody_waits_for_runs_in_turn_and_ends_with_the_process() -> None:
    process = OwnProcess()
    pid = process.run(os.getpid)
    process.submit(os.umask, 0o123)
    assert process.run(os.umask, 0) == 0o123
    endless = process.submit(time.sleep, 600)
    process.close()
    process.close()
    assert isinstance(endless.exception(), BrokenProcessPool)
    wait_until_gone(pid)


def test_ctrl_c_is_left_to_the_owner() -> None:
    process = OwnProcess()
    try:
        os.kill(process.run(os.getpid), signal.SIGINT)
        assert process.run(len, "abc") == 3
    finally:
        process.close()


def test_it_ends_with_an_owner_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    owner = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    wait_until_gone(pid)


def write_everywhere(_: None) -> None:
    print("printed")
    os.write(1, b"by a library\n")
    print("a warning", file=sys.stderr)
    print("half way", file=progress_stream())


@pytest.mark.slow
def test_output_goes_to_a_file_and_progress_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "engine.log"
    log.write_text("before\n")
    with output_to(log):
        in_own_process(write_everywhere, None)
    assert sorted(log.read_text().split("\n")) == ["", "a warning", "before", "by a library", "printed"]
    assert capfd.readouterr() == ("", "half way\n")
    with output_to(STDERR):
        in_own_process(write_everywhere, None)
    out, err = capfd.readouterr()
    assert out == "" and sorted(err.split("\n")) == ["", "a warning", "by a library", "half way", "printed"]
    in_own_process(write_everywhere, None)
    out, err = capfd.readouterr()
    assert sorted(out.split("\n")) == ["", "by a library", "printed"]
    assert sorted(err.split("\n")) == ["", "a warning", "half way"]


@pytest.mark.slow
def test_output_can_go_elsewhere_once_it_is_known_where_to(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "engine.log"
    with output_to(Path(os.devnull)):
        process = OwnProcess()
    try:
        process.run(write_everywhere, None)
        process.run(redirect, log)
        process.run(write_everywhere, None)
        assert sorted(log.read_text().split("\n")) == ["", "a warning", "by a library", "printed"]
        assert capfd.readouterr() == ("", 2 * "half way\n")
        process.run(redirect, STDERR)
        process.run(write_everywhere, None)
    finally:
        process.close()
    out, err = capfd.readouterr()
    assert out == "" and sorted(err.split("\n")) == ["", "a warning", "by a library", "half way", "printed"]
