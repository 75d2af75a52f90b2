"""Progress in lines, where stderr is no terminal, and the estimate's pace."""

import io

import pytest

from kvtuner_tools import progress
from kvtuner_tools.progress import Progress, track


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(progress, "progress_stream", lambda: stream)
    return stream


def test_lines_come_now_and_then_and_at_the_end(clock: Clock, stream: io.StringIO) -> None:
    for _ in track(range(7), "sensitivity", "layer", total=7):
        clock.now += 20
    assert stream.getvalue().splitlines() == [
        "sensitivity: 2 of 7 layers, about 0:01:40 left",
        "sensitivity: 4 of 7 layers, about 0:01:00 left",
        "sensitivity: 6 of 7 layers, about 0:00:20 left",
        "sensitivity: 7 of 7 layers",
    ]
    assert "\r" not in stream.getvalue()


def test_neither_an_engines_start_nor_earlier_runs_count_for_the_estimate(clock: Clock, stream: io.StringIO) -> None:
    with Progress("search", "setting", 40, done=20) as shown:
        clock.now += 300
        shown.restart()
        clock.now += 30
        shown.show(23, note="best KL 0.01")
    assert stream.getvalue() == "search: 23 of 40 settings, about 0:02:50 left, best KL 0.01\n"


def test_a_terminal_has_a_bar(clock: Clock, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "isatty", lambda: True)
    with Progress("search", "setting", 40, done=20) as shown:
        shown.show(21, note="best KL 0.01")
    assert "21/40" in stream.getvalue() and "best KL 0.01" in stream.getvalue()
