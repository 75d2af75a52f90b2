"""Which engines of a quick calibration start, when, and what becomes of one that started ahead."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvtuner_tools.cache_setting import AUTO
from kvtuner_tools.calibration import run_engines
from kvtuner_tools.calibration.run_engines import RunEngines
from kvtuner_tools.calibration.study import EvaluatorSpec
from kvtuner_tools.engines.calibration import CHUNK
from kvtuner_tools.engines.evaluate import EngineOptions, ReferenceLogits, Window
from kvtuner_tools.engines.unquantized import RecordedText
from vllm_kvtuner.profile.profile import RecentWindow, TransformSettings

WINDOWS = ((1, 2, 3), (4, 5))
ROTATED = {0: TransformSettings(key_hadamard=True)}
SPEC = EvaluatorSpec("model", "bfloat16", WINDOWS, {}, None, (), 1 << 30)


class Process:
    """In place of an OwnProcess: notes what it is asked for."""

    def __init__(self):
        self.asked, self.is_closed = [], False

    def run(self, function, *arguments):
        self.asked.append((function.__name__, arguments))
        return ReferenceLogits(Path("logits"), "float32", 7, 3)

    def close(self):
        self.is_closed = True


class Evaluator:
    """In place of an EngineEvaluator."""

    problem: Exception | None = None

    def __init__(self, spec, recorded):
        self.spec, self.recorded, self.is_closed = spec, recorded, False

    def serves(self, spec):
        return run_engines.room_of(spec) == self.spec

    def become(self, spec):
        if self.problem is not None:
            raise self.problem
        self.spec = spec

    def close(self):
        self.is_closed = True


@pytest.fixture
def made(monkeypatch):
    """Evaluators that were started."""
    found = []
    monkeypatch.setattr(run_engines, "EngineEvaluator", lambda *given: found.append(Evaluator(*given)) or found[-1])
    return found


def options(chunk=64):
    return EngineOptions("test", "model", "bfloat16", AUTO, max_model_len=256, chunk=chunk, kv_memory_bytes=99)


def captured(process, chunk=64):
    """Engines whose first one has run."""
    engines = RunEngines(process)
    engines.unquantized(options(chunk)).run(len, ())
    return engines


def test_one_engine_gives_all_that_is_unquantized_and_the_next_starts_after_it(made):
    process = Process()
    engines = captured(process)
    engines.record(WINDOWS)
    assert [name for name, _ in process.asked] == ["_build", "_run", "_run"]
    assert process.asked[-1][1][1] == tuple(map(Window, WINDOWS))
    assert not made
    engines.end_unquantized()
    assert process.asked[-1][0] == "_end" and process.is_closed
    engines.start_ahead(SPEC)
    (ahead,) = made
    assert ahead.recorded == RecordedText(WINDOWS, ReferenceLogits(Path("logits"), "float32", 7, 3), 64)
    assert engines.evaluator(replace(SPEC, transforms=ROTATED, statics=b"")) is ahead
    assert ahead.spec.transforms == ROTATED and not ahead.is_closed
    assert engines.evaluator(SPEC) is None, "it is whoever's it was given to"
    engines.close()
    assert not ahead.is_closed


def test_nothing_starts_ahead_where_no_logits_are_known(made):
    fresh = RunEngines(Process())
    fresh.unquantized(options())
    fresh.record(WINDOWS)
    long_steps = captured(Process(), chunk=CHUNK + 1)
    long_steps.record(WINDOWS)
    other_text = captured(Process())
    other_text.record(WINDOWS[:1])
    for engines in (fresh, long_steps, other_text):
        engines.start_ahead(SPEC)
        assert engines.evaluator(SPEC) is None
        engines.close()
    assert not made


@pytest.mark.parametrize("kind", ["another", "broken"])
def test_an_engine_that_cannot_be_used_is_closed_and_said(made, monkeypatch, caplog, kind):
    engines = captured(Process())
    engines.record(WINDOWS)
    engines.start_ahead(SPEC)
    monkeypatch.setattr(Evaluator, "problem", MemoryError("too little") if kind == "broken" else None)
    wanted = replace(SPEC, recent_window=RecentWindow(64)) if kind == "another" else SPEC
    assert engines.evaluator(wanted) is None
    assert made[0].is_closed
    assert ("too little" in caplog.text) == (kind == "broken")
    engines.close()


def test_the_end_leaves_nothing(made, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engines = captured(Process())
    engines.record(WINDOWS)
    engines.end_unquantized()
    engines.start_ahead(SPEC)
    assert list(tmp_path.iterdir())
    engines.close()
    assert made[0].is_closed and not list(tmp_path.iterdir())
