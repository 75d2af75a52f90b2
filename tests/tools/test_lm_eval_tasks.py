"""lm-eval: what is taken of its results, and its absence."""

import argparse
from pathlib import Path

import pytest

from kvtuner_tools import evaluate, lm_eval_tasks
from kvtuner_tools.evaluation.tables import table


def test_metrics_are_paired_with_their_standard_errors() -> None:
    values = {
        "alias": "gsm8k",
        "sample_len": 8,
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": 0.1,
        "bleu,none": 3.0,
        "bleu_stderr,none": "N/A",
    }

    assert lm_eval_tasks._metrics(values) == {"exact_match,strict-match": (0.5, 0.1), "bleu,none": (3.0, None)}


def test_without_lm_eval_the_option_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_tasks.importlib.util, "find_spec", lambda _: None)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)

    with pytest.raises(ValueError, match=r"pip install 'vllm-kvtuner\[lm-eval\]'"):
        evaluate.run(parser.parse_args([str(tmp_path), "--data", "text.txt", "--tasks", "gsm8k"]))


def test_table_shows_each_metric() -> None:
    row = {"label": "auto", "kv_tokens": 10, "lm_eval": {"gsm8k": {"exact_match,none": (0.25, 0.125)}}}

    text = table({"reference": row, "settings": [], "task": None})

    heading, _, line = text.splitlines()
    assert "gsm8k exact_match,none | ± gsm8k exact_match,none |" in heading
    assert [cell.strip() for cell in line.split("|")[-3:-1]] == ["0.250", "0.125"]
