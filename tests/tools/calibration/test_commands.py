"""What ``kvtuner calibrate`` prints, where engines write, and what --quick stands for."""

import json
from types import SimpleNamespace

import pytest

from kvtuner_tools import cli
from kvtuner_tools.calibration import option_checks
from kvtuner_tools.calibration.options import STAGES, CalibrationOptions, load_texts
from kvtuner_tools.calibration.pipeline import Calibration
from kvtuner_tools.processes import in_own_process
from tests.helpers.tiny_model import make_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_size": 256,
    "max_position_embeddings": 4096,
    "vocab_size": 512,
}


@pytest.fixture
def calibrate(tmp_path):
    """Runs the command on a model of which only the shape and the tokenizer are there."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_tokenizer().save_pretrained(folder)

    def run(*arguments):
        return cli.main(["calibrate", str(folder), "--out", str(tmp_path / "out"), "--max-bits", "4", *arguments])

    return run


def test_a_line_a_stage_and_the_command_to_serve_last(calibrate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Calibration, "run", lambda _, stage: f"{stage}: done (0.0 s)")
    monkeypatch.setattr(Calibration, "summary", lambda _: [("verdict", "Serve it."), ("serve", "vllm serve MODEL")])
    assert calibrate() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(STAGES)] == [f"{number}/9 {stage}: done (0.0 s)" for number, stage in enumerate(STAGES, 1)]
    assert lines[-2:] == ["verdict:    Serve it.", "serve:      vllm serve MODEL"]


def test_a_disk_that_cannot_hold_the_references_logits_is_known_before(calibrate, monkeypatch, capsys):
    monkeypatch.setattr(option_checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert calibrate() == 1
    error = capsys.readouterr().err
    assert error.startswith("--heldout-tokens must be few enough for their logits, 33,554,432 bytes, to fit in ")
    assert error.endswith("which has 1,000,000, but got 16,384\n")


def fail(_: None) -> None:
    print("line of the engine's")
    raise ValueError("broken")


@pytest.mark.parametrize("arguments", [[], ["-v"]])
def test_a_stage_that_fails_shows_what_its_engine_wrote(calibrate, tmp_path, monkeypatch, capfd, arguments):
    monkeypatch.setattr(Calibration, "run", lambda *_: in_own_process(fail, None))
    assert calibrate(*arguments) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("line of the engine's") == 1 and err.endswith("broken\n")
    log = tmp_path / "out" / "engine.log"
    assert log.exists() == (arguments == [])
    assert (f"{log}, its last 1 lines:" in err) == log.exists()


def test_quick_sets_what_is_not_given_and_can_be_taken_back(calibrate, tmp_path, monkeypatch):
    monkeypatch.setattr(Calibration, "run", lambda *_: "done")
    monkeypatch.setattr(Calibration, "summary", lambda _: [])

    def kept():
        options = CalibrationOptions.read(tmp_path / "out")
        return options.quick, options.window, options.capture_tokens, options.heldout_tokens, options.cluster_factor

    assert calibrate("--quick", "--heldout-tokens", "2048") == 0
    assert kept() == (True, 1024, 4096, 2048, 1.0)
    command = CalibrationOptions.read(tmp_path / "out").command(tmp_path / "out")
    assert command.split()[5:] == ["--heldout-tokens", "2048", "--max-bits", "4.0", "--quick"]
    assert calibrate("--no-quick") == 0
    assert kept() == (False, None, 8192, 16384, 1.5)


@pytest.mark.parametrize(
    ("positions", "long_window", "expected"), [(8192, 8192, 6144), (16384, 8192, 8192), (4096, 8192, 2048)]
)
def test_long_windows_are_multiples_of_the_others_so_that_all_is_as_asked(tmp_path, positions, long_window, expected):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": positions}))
    options = CalibrationOptions(model=str(tmp_path), window=2048, long_window=long_window)
    texts = load_texts(options, make_tokenizer())
    assert texts.heldout.tokens == 16384 and texts.heldout.identity["longest"] == expected
    assert (texts.capture.tokens, texts.search.tokens) == (8192, 4096)
