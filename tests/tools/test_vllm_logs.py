"""Logs of vLLM while a command reads a model: quiet, and as before afterwards."""

import logging
import os

import pytest

from kvtuner_tools.engine_arguments import _parser
from kvtuner_tools.model_files import load_model_shape
from kvtuner_tools.vllm_logs import LEVEL_VARIABLE, NAMES, importing_vllm, results_alone_on_stdout
from tests.helpers.tiny_model import make_tiny_model


def test_reading_a_model_leaves_the_logs_of_later_engines(tmp_path, monkeypatch):
    monkeypatch.delenv(LEVEL_VARIABLE, raising=False)
    levels = [logging.getLogger(name).level for name in NAMES]
    disabled = logging.root.manager.disable
    load_model_shape(str(make_tiny_model(tmp_path / "model")))
    _parser.cache_clear()
    _parser()
    assert LEVEL_VARIABLE not in os.environ
    assert [logging.getLogger(name).level for name in NAMES] == levels
    assert logging.root.manager.disable == disabled


def test_the_users_level_stays(monkeypatch):
    monkeypatch.setenv(LEVEL_VARIABLE, "DEBUG")
    with importing_vllm():
        assert os.environ[LEVEL_VARIABLE] == "DEBUG"
    assert os.environ[LEVEL_VARIABLE] == "DEBUG"


@pytest.mark.parametrize("name", ["vllm.config", "transformers.models", "kvtuner"])
def test_only_others_warnings_are_kept_back(name):
    before = logging.getLogger(name).isEnabledFor(logging.WARNING)
    with results_alone_on_stdout():
        assert logging.getLogger(name).isEnabledFor(logging.WARNING) == (name == "kvtuner")
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
    assert logging.getLogger(name).isEnabledFor(logging.WARNING) == before
