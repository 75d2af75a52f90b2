"""vLLM's engine arguments on the command line: what is taken for one, what is refused, and what engines get."""

import argparse
import json
from dataclasses import replace

import pytest

from kvtuner_tools import cli, engine_arguments
from kvtuner_tools.calibration.options import CalibrationOptions, given_options, merge
from kvtuner_tools.engine_arguments import (
    GROUP,
    REFUSED,
    add_engine_arguments,
    check_engine_words,
    check_max_model_len,
    computed_by,
    engine_keywords,
    model_source,
    parse_engine_words,
    placed_by,
    split_engine_words,
    takes_engine_arguments,
)
from kvtuner_tools.model_files import MODEL_AS_IT_IS, ModelSource
from tests.helpers.tiny_model import make_tokenizer
from vllm_kvtuner.profile.problems import ProfileError


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="kvtuner test")
    made.add_argument("model")
    made.add_argument("out", nargs="?")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--data")
    add_engine_arguments(made)
    return made


@pytest.mark.parametrize(
    ("line", "mine", "values"),
    [
        ("MODEL --data d", "MODEL --data d", {}),
        ("--tensor-parallel-size 2 MODEL", "MODEL", {"tensor_parallel_size": 2}),
        ("-tp 2 MODEL -pp=2", "MODEL", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("--tensor_parallel_size=2 MODEL OUT", "MODEL OUT", {"tensor_parallel_size": 2}),
        ("--trust-remote-code MODEL --data d", "MODEL --data d", {"trust_remote_code": True}),
        ("MODEL --no-enforce-eager", "MODEL", {"enforce_eager": False}),
        ("MODEL --ignore-patterns a b --data d", "MODEL --data d", {"ignore_patterns": ["a", "b"]}),
        ("MODEL --dtype float16 --max-model-len 8k", "MODEL --dtype float16", {"max_model_len": 8000}),
        ("MODEL --hf-overrides.a.b 1 --hf-overrides.c x", "MODEL", {"hf_overrides": {"a": {"b": 1}, "c": "x"}}),
        ("MODEL --distributed-executor-backend ray", "MODEL", {"distributed_executor_backend": "ray"}),
        ("MODEL --data-parallel-size 2", "MODEL", {"data_parallel_size": 2}),  # and no abbreviation of --data
        ("MODEL --tensor-parallel 2 --other", "MODEL --tensor-parallel 2 --other", {}),
    ],
)
def test_words_are_the_commands_or_vllms(line: str, mine: str, values: dict) -> None:
    words, theirs = split_engine_words(line.split(), parser())
    assert words == mine.split()
    assert parse_engine_words(theirs) == values
    assert json.loads(json.dumps(theirs)) == theirs


def test_vllm_is_not_asked_where_all_options_are_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_arguments, "_parser", lambda: pytest.fail("vLLM was imported"))
    assert split_engine_words(["MODEL", "--data=d", "-h"], parser()) == (["MODEL", "--data=d", "-h"], {})
    check_engine_words({})
    assert model_source({"tensor_parallel_size": ["-tp", "2"]}) is MODEL_AS_IT_IS


def test_each_engine_argument_that_is_refused_is_one_of_vllms() -> None:
    known = {action.dest for action in engine_arguments._parser()._actions}
    # Of later versions than the CPU build's, and of this plugin.
    newer = {"kvtuner_profile", "calculate_kv_scales", "max_num_scheduled_tokens", "spec_method", "spec_model"}
    newer |= {"spec_tokens", "diffusion_config", "dtype", "data_parallel_external_lb"}
    assert REFUSED.keys() - known <= newer
    assert engine_arguments.PLACEMENT - known <= {"device_ids"}


def test_contradictions_are_refused_all_at_once_with_the_reason() -> None:
    line = (
        "M --max-num-seqs 4 --no-enforce-eager --hf-overrides.head_dtype float16 --hf-token secret "
        "--additional-config.kvtuner_profile K8V4 --distributed-executor-backend external_launcher"
    )
    _, words = split_engine_words(line.split(), parser())
    with pytest.raises(ProfileError) as refused:
        check_engine_words(words)
    options = [problem.partition(" must be left out, since ")[0] for problem in refused.value.problems]
    assert options == [
        "--max-num-seqs",
        "--no-enforce-eager",
        "--hf-overrides.head_dtype",
        "--hf-token",
        "--additional-config.kvtuner_profile",
        "--distributed-executor-backend",
    ]
    assert "since windows of text run one at a time" in refused.value.problems[0]
    allowed = "M --enforce-eager --gpu-memory-utilization 0.5 --hf-overrides.rope_theta 1 --additional-config.a 1"
    check_engine_words(split_engine_words(allowed.split(), parser())[1])


def test_max_model_len_holds_what_is_run() -> None:
    words = {"max_model_len": ["--max-model-len", "1000"]}
    check_max_model_len(words, 1000)
    check_max_model_len({}, 10**9)
    with pytest.raises(ProfileError, match=r"--max-model-len must hold .* a token more, 1,001, but got 1,000"):
        check_max_model_len(words, 1001)


def test_keywords_of_an_engine_are_the_commands_over_what_is_given() -> None:
    line = (
        "M -tp 2 --gpu-memory-utilization 0.5 --max-model-len 8192 --enforce-eager "
        "--hf-overrides.rope_theta 7 --additional-config.a 1 --quantization fp8"
    )
    _, words = split_engine_words(line.split(), parser())
    own = {
        "model": "M",
        "gpu_memory_utilization": 0.01,
        "max_model_len": 1024,
        "enforce_eager": True,
        "hf_overrides": {"head_dtype": "float32"},
        "additional_config": {"kvtuner_profile": "K8V4"},
    }
    assert engine_keywords({}, own) == own
    assert engine_keywords(words, own) == {
        **own,
        "tensor_parallel_size": 2,
        "quantization": "fp8",
        "gpu_memory_utilization": 0.5,
        "max_model_len": 8192,
        "hf_overrides": {"rope_theta": 7, "head_dtype": "float32"},
        "additional_config": {"a": 1, "kvtuner_profile": "K8V4"},
    }
    assert engine_keywords({"max_model_len": ["--max-model-len", "512"]}, own)["max_model_len"] == 1024


def test_a_models_source_is_as_vllm_is_told() -> None:
    line = "M --revision main --trust-remote-code --tokenizer T --tensor-parallel-size 2"
    _, words = split_engine_words(line.split(), parser())
    assert model_source(words) == ModelSource(revision="main", trust_remote_code=True, tokenizer="T")
    more = {**words, "quantization": ["-q", "fp8"], "download_dir": ["--download-dir", "D"], "model": ["--model", "X"]}
    assert model_source(more) == replace(model_source(words), download_dir="D", arguments={"quantization": "fp8"})
    assert computed_by(words).keys() == {"revision", "trust_remote_code", "tokenizer"}
    assert placed_by(words) == {"tensor_parallel_size": ["--tensor-parallel-size", "2"]}


def test_commands_that_start_engines_take_them() -> None:
    taking = []
    for entry in cli.COMMANDS:
        made = argparse.ArgumentParser(prog=entry.name)
        cli.configure(made, entry)
        if takes_engine_arguments(made):
            taking.append(entry.name)
            assert GROUP in made.format_help() and "--kv-cache-memory-bytes" in made.format_help()
    assert taking == ["evaluate", "calibrate", "capture", "search", "export"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["calibrate MODEL --out OUT --max-bits 4", "capture MODEL --out OUT"])
def test_a_calibration_refuses_them_before_an_engine_starts(tmp_path, capsys, command: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "head_dim": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    (folder / "config.json").write_text(json.dumps(config))
    make_tokenizer().save_pretrained(folder)
    line = command.replace("MODEL", str(folder)).replace("OUT", str(tmp_path / "out"))
    assert cli.main([*line.split(), "--max-model-len", "64", "--data-parallel-size", "2", "-tp", "2"]) == 1
    problems = capsys.readouterr().err.strip().split("\n")
    for problem in (
        "--data-parallel-size must be left out, since one replica measures",
        "--max-model-len must hold the longest window",
    ):
        assert any(line.startswith(problem) for line in problems), problem
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_them_before_it_reads_anything(capsys) -> None:
    line = "evaluate /no/such/model --data d --profile K8V4 --speculative-config {} --max-num-seqs=3"
    assert cli.main(line.split()) == 1
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        "--speculative-config",
        "--max-num-seqs",
    ]


def test_a_worker_may_only_say_where_its_engine_runs(tmp_path, capsys) -> None:
    assert cli.main(["search", "--join", str(tmp_path), "--quantization", "fp8", "-tp", "2"]) == 1
    assert "wherever its engines run, but got --quantization" in capsys.readouterr().err


def test_options_keep_the_words(tmp_path) -> None:
    first = merge(
        CalibrationOptions(model="M"),
        {"engine": {"tensor_parallel_size": ["-tp", "2"], "revision": ["--revision", "R"]}},
    )
    args = argparse.Namespace(engine={"tensor_parallel_size": ["-tp=4"]}, trials=3)
    options = merge(first, given_options(args))
    assert options.engine == {"tensor_parallel_size": ["-tp=4"], "revision": ["--revision", "R"]}
    options.write(tmp_path)
    assert CalibrationOptions.read(tmp_path) == options == replace(first, trials=3, engine=options.engine)
    assert options.command(tmp_path).endswith("-tp=4 --revision R --trials 3")
