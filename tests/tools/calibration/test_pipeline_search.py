"""What of the budget and the recent window reaches the stage search."""

import pytest

from kvtuner_tools.calibration import pipeline
from kvtuner_tools.calibration.outcome import SearchResult
from kvtuner_tools.calibration.study import EvaluatorSpec
from tests.helpers.calibration import sensitivity_table
from tests.helpers.calibration_run import AFTER_SENSITIVITY, calibration
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.profile import RecentWindow

pytestmark = pytest.mark.slow  # whole calibrations, though on a stand-in for engines


@pytest.mark.slow
def test_memory_budget_reaches_the_search(tmp_path, monkeypatch):
    table = sensitivity_table(4)
    shapes = 4 * 2 * 2 * 64  # numbers per token
    memory = int(4.25 * shapes / 8) * 1008 * 3
    made = calibration(
        tmp_path, table, [], monkeypatch, max_bits=None, memory=memory, context=1000, concurrency=3, trials=8
    )
    for stage in ("prune", "cluster", "search"):
        made.run(stage)
    result = SearchResult.read(tmp_path)
    assert result.max_bits == pytest.approx(4.25)
    assert result.chosen.stored_bits <= 4.25
    where = f"3 requests of 1,000 tokens in {memory:,} bytes"
    assert result.budget == f"at most 4.250 stored bits (3.750 nominal): {where}"


@pytest.mark.quick(1)
@pytest.mark.parametrize(("sink_tokens", "blocks"), [(0, 3), (4, 4), (16, 4)])
def test_a_recent_window_reaches_the_engine_and_the_profile(tmp_path, monkeypatch, sink_tokens, blocks):
    """And takes its share of a budget given as memory: three blocks of 16 tokens hold 20 wherever they lie, and one its
    sink tokens."""
    table = sensitivity_table(6)
    numbers = sum(2 * layer.num_kv_heads * layer.head_size for layer in table.layers)
    recent = sum(
        blocks * 16 * layer.num_kv_heads * content_bytes(PrecisionPair(8, 8), layer.head_size) for layer in table.layers
    )
    memory = (int(4.25 * numbers / 8) * 1008 + recent) * 3
    options = {"max_bits": None, "memory": memory, "context": 1000, "concurrency": 3, "trials": 8}
    settings = []
    window = {"recent_window": 20, "recent_window_bits": 8, "sink_tokens": sink_tokens}
    made = calibration(tmp_path, table, [], monkeypatch, **window, **options)
    start = pipeline.start_engine
    monkeypatch.setattr(pipeline, "start_engine", lambda engine: settings.append(engine) or start(engine))
    for stage in AFTER_SENSITIVITY:
        made.run(stage)
    assert len(settings) == 2, "the search's engine and that of the held-out scores"
    for each in settings:
        assert each.recent_window == RecentWindow(20, 8, sink_tokens)
    assert all(EvaluatorSpec.from_plain(each.to_plain()) == each for each in settings)
    result = SearchResult.read(tmp_path)
    assert result.max_bits == pytest.approx(4.25)
    beside = f"beside a recent window of 20 tokens{f' and the first {sink_tokens}' if sink_tokens else ''} in 8 bits"
    assert beside in result.budget and beside in (tmp_path / "report.html").read_text()
    profile = load_profile(str(tmp_path / "profile.yaml"))
    assert (profile.recent_window, profile.recent_window_bits, profile.sink_tokens) == (20, 8, sink_tokens)
    assert ("sink_tokens" in (tmp_path / "profile.yaml").read_text()) == (sink_tokens > 0)


@pytest.mark.slow
def test_another_number_of_sink_tokens_is_another_search(tmp_path, monkeypatch):
    """What was scored with other sink tokens is scored again, and kept for the next run with these."""
    table, evaluators = sensitivity_table(4), []
    studies, started = [], []
    for sink_tokens in (0, 4, 4):
        window = {"recent_window": 20, "sink_tokens": sink_tokens, "trials": 8}
        made = calibration(tmp_path, table, evaluators, monkeypatch, **window)
        for stage in ("prune", "cluster", "search", "export"):
            made.run(stage)
        studies.append(SearchResult.read(tmp_path).study)
        started.append(len(evaluators))
    assert started == [2, 4, 4]
    assert studies[0] != studies[1] == studies[2]
