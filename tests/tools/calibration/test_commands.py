"""Commands of the calibration: what they refuse, and what they keep for the stages that follow."""

import json
from dataclasses import replace

import pytest

from kvtuner_tools import cli
from kvtuner_tools.calibration.options import STAGES, CalibrationOptions
from kvtuner_tools.calibration.pipeline import Calibration
from kvtuner_tools.calibration.table_stages import TableStages
from tests.helpers.tiny_model import make_tokenizer
from vllm_kvtuner.profile.load import load_profile

pytestmark = pytest.mark.slow

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_size": 256,
}
TOO_MANY_SINKS = "sink-tokens must be an integer of 0-16 tokens"
SINKS_ALONE = "sink-tokens must be 0 without a recent_window, whose cache holds them"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        ([], ["the budget must be given as --max-bits, or as --memory with --context and --concurrency, but got none"]),
        (["--max-bits", "4", "--memory", "1GiB"], ["but got --max-bits, --memory"]),
        (["--memory", "1GiB", "--context", "100"], ["but got --memory, --context"]),
        (["--max-bits", "2"], ["at least 2.500 stored bits (2.000 nominal)", "but got 2.000 stored bits"]),
        (
            ["--memory", "1MB", "--context", "1000", "--concurrency", "4", "--recent-window", "0"],
            ["at least 2.500 stored bits", "got 1.938 stored bits"],
        ),
        (["--max-bits", "3", "--unquantized", "0"], ["at least 5.875 stored bits (5.500 nominal)"]),
        (["--max-bits", "4", "--unquantized", "7"], ["--unquantized must name layers of", "but got 7"]),
        (["--max-bits", "4", "--unquantized", "x"], ["--unquantized must be a layer, a range or a list"]),
        (["--max-bits", "4", "--unquantized", "0-3"], ["--unquantized must leave a layer to choose pairs for"]),
        (
            [
                "--max-bits",
                "17",
                "--sequence-length",
                "3",
                "--trials",
                "0",
                "--cluster-factor",
                "0.5",
                "--data",
                "/none.txt",
            ],
            [
                "--max-bits must be above 0 and at most 16, but got 17",
                "--sequence-length must be at least 32, but got 3",
                "--trials must be at least 1, but got 0",
                "--cluster-factor must be at least 1, but got 0.5",
                "/none.txt: the file must be readable",
            ],
        ),
        (["--max-bits", "4", "--recent-window", "64", "--sink-tokens", "17"], [f"--{TOO_MANY_SINKS}, but got 17"]),
        (["--max-bits", "4", "--recent-window", "64", "--sink-tokens", "-1"], [f"--{TOO_MANY_SINKS}, but got -1"]),
        (["--max-bits", "4", "--recent-window", "0", "--sink-tokens", "4"], [f"--{SINKS_ALONE}, but got 4"]),
        (
            ["--max-bits", "4", "--sequence-length", "272"],
            ["--sequence-length must be more than 272 tokens, 4 times the 68"],
        ),
        (
            ["--max-bits", "4", "--recent-window", "512"],
            ["--sequence-length must be more than 2064 tokens", "but got 2048"],
        ),
        (
            ["--max-bits", "4", "--sequence-length", "2048"],
            ["--sequence-length must be less than the model's 2,048 positions"],
        ),
        (
            ["--max-bits", "4", "--capture-tokens", "9000000", "--kv-cache-memory-bytes", "1MiB"],
            ["bundled: --heldout-tokens + --capture-tokens + --search-tokens must be at most the ", "9,022,528"],
        ),
        (
            ["--max-bits", "4", "--kv-cache-memory-bytes", "1MiB"],
            ["--kv-cache-memory-bytes must hold the longest window, of 2,047 tokens"],
        ),
        (["--max-bits", "4", "--storage", "nonsense"], ["--storage must be a database that can be opened"]),
    ],
)
def test_all_input_errors_at_once_before_a_model_loads(
    model, tmp_path, capsys, monkeypatch, warm_processes, arguments, problems
):
    monkeypatch.setattr(TableStages, "run", lambda *_: pytest.fail("a stage was run"))
    out = tmp_path / "out"
    assert cli.main(["calibrate", model, "--out", str(out), *arguments]) == 1
    errors = capsys.readouterr().err
    assert all(problem in errors for problem in problems), errors
    assert len(errors.splitlines()) == max(1, len(problems) if len(arguments) > 8 else 1)
    assert not out.exists()
    assert warm_processes == ["warm", "close"], "nothing is left of it after a refusal"


@pytest.mark.parametrize(
    ("settings", "rule"), [("recent_window: 64\nsink_tokens: 17", TOO_MANY_SINKS), ("sink_tokens: 4", SINKS_ALONE)]
)
def test_sink_tokens_are_refused_as_a_profile_with_them_is(tmp_path, settings, rule):
    path = tmp_path / "profile.yaml"
    path.write_text(f"version: 1\nlayers: K4V4\n{settings}\n")
    with pytest.raises(ValueError, match=rule.replace("sink-tokens", "sink_tokens")):
        load_profile(str(path))


def test_a_window_cannot_go_where_its_sinks_stay(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TableStages, "run", lambda *_: "done")
    monkeypatch.setattr(Calibration, "summary", lambda _: [])
    out = str(tmp_path / "out")
    window = ["--recent-window", "64", "--sink-tokens", "4"]
    assert cli.main(["calibrate", model, "--out", out, "--max-bits", "4", "--no-save", *window]) == 0
    assert CalibrationOptions.read(tmp_path / "out").sink_tokens == 4
    assert cli.main(["transforms", out, "--recent-window", "0"]) == 1
    assert f"--{SINKS_ALONE}, but got 4" in capsys.readouterr().err
    assert CalibrationOptions.read(tmp_path / "out").recent_window == 64
    assert cli.main(["transforms", out, "--recent-window", "0", "--sink-tokens", "0"]) == 0


def test_saving_to_a_model_needs_its_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TableStages, "run", lambda *_: pytest.fail("a stage was run"))
    arguments = ["--out", str(tmp_path / "out"), "--max-bits", "4", "--save-to-model"]
    assert cli.main(["calibrate", "org/model", *arguments]) == 1
    assert "--save-to-model must be given with a model's folder" in capsys.readouterr().err


def test_the_models_own_folder_is_no_output_folder(model, capsys, monkeypatch):
    monkeypatch.setattr(TableStages, "run", lambda *_: pytest.fail("a stage was run"))
    assert cli.main(["calibrate", model, "--out", model, "--max-bits", "4"]) == 1
    assert "--out must not be in the model's folder" in capsys.readouterr().err


def test_options_are_kept_for_the_stages_that_follow(model, tmp_path, monkeypatch, capsys, warm_processes):
    ran = []
    monkeypatch.setattr(TableStages, "run", lambda self, stage: ran.append((stage, self.options)))
    monkeypatch.setattr(Calibration, "summary", lambda _: [])
    out = tmp_path / "out"
    assert cli.main(["capture", model, "--out", str(out), "--seed", "7"]) == 0
    assert cli.main(["prune", str(out), "--keep-all-pairs"]) == 0
    assert cli.main(["search", str(out), "--memory", "1MiB", "--context", "1000", "--concurrency", "2"]) == 0
    assert cli.main(["search", str(out), "--max-bits", "4.25"]) == 0
    assert [stage for stage, _ in ran] == ["capture", "prune", "search", "search"]
    assert warm_processes == ["warm", "submit", "close", "close"], "of the capture alone"
    assert ran[2][1].memory == 1 << 20
    asked = CalibrationOptions(model=model, seed=7, keep_all_pairs=True, max_bits=4.25)
    assert CalibrationOptions.read(out) == asked
    assert ran[3][1] == replace(asked, window=2047, recent_window=64, sink_tokens=4, generated_tokens=8192)
    assert cli.main(["calibrate", model, "--out", str(out), "--no-keep-all-pairs", "--no-save"]) == 0
    assert [stage for stage, _ in ran[4:]] == list(STAGES)
    assert ran[-1][1] == replace(ran[3][1], keep_all_pairs=False)
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "must be the output folder of kvtuner capture or kvtuner calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "tokens"),
    [([], 8192), (["--quick"], 3072), (["--data", "TEXT"], 0), (["--data", "TEXT", "--generated-tokens", "500"], 500)],
)
def test_the_model_writes_text_of_its_own_beside_the_bundled_set(model, tmp_path, monkeypatch, words, tokens):
    ran = []
    monkeypatch.setattr(TableStages, "run", lambda self, stage: ran.append(self.options.generated_tokens))
    monkeypatch.setattr(Calibration, "summary", lambda _: [])
    text = tmp_path / "text.txt"
    text.write_text("Every word is a word of text. " * 3000)
    given = [str(text) if word == "TEXT" else word for word in words]
    assert cli.main(["calibrate", model, "--out", str(tmp_path / "out"), "--max-bits", "4", "--no-save", *given]) == 0
    assert set(ran) == {tokens}


def test_interrupt_says_how_to_go_on(model, tmp_path, monkeypatch, capsys):
    def interrupted(self, stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(TableStages, "run", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["calibrate", model, "--out", str(tmp_path / "out"), "--max-bits", "4"])
    assert caught.value.code == 130
    assert "run the same command again to go on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["search"], "must be given DIR, or --join"),
        (["search", "DIR", "--study", "x"], "must be given DIR, or --join"),
        (["search", "DIR", "--join", "DIR"], "--join takes the search as it was made"),
        (["search", "--join", "DIR", "--trials", "3"], "--join takes the search as it was made"),
        (["search", "--join", "DIR"], "must be the output folder"),
        (["search", "--join", "sqlite:///DIR/none/x.db"], "--storage must be a database"),
        (["search", "--join", "sqlite:///DIR/x.db"], "--study must name a search in this storage (none)"),
    ],
)
def test_join_errors(tmp_path, capsys, arguments, problem):
    assert cli.main([argument.replace("DIR", str(tmp_path)) for argument in arguments]) == 1
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", *STAGES])
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    assert f"kvtuner {command}" in capsys.readouterr().out
