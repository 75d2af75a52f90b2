"""Captures and profiles of an engine of several ranks are those of one rank, to rounding."""

from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from kvtuner_tools import cli, processes
from kvtuner_tools.calibration import capture as capture_module
from kvtuner_tools.calibration.calibration_text import load_text
from kvtuner_tools.calibration.capture import CaptureRequest, run_capture
from kvtuner_tools.calibration.outcome import Heldout
from tests.helpers import ranks
from tests.helpers.engine import KV_CACHE_BYTES, cpu_only, fork_server
from tests.helpers.tiny_model import make_tiny_model, make_tokenizer

pytestmark = cpu_only

TEXT = "".join(f"Line {number} of the text says what line {number * 7 % 100} does not. " for number in range(60))
TENSOR = {"tensor_parallel_size": ["-tp", "2"]}
BOTH = {**TENSOR, "pipeline_parallel_size": ["--pipeline-parallel-size=2"]}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


def close(got, expected):
    """fp32 sums in another order, through a few layers; measured 1e-5."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "num_kv_heads", "words"),
    [("qwen2", 1, TENSOR), ("gemma3", 2, BOTH), ("gpt_oss", 2, TENSOR)],
    ids=["KV head on both ranks", "two stages of two ranks", "attention sinks"],
)
def test_a_capture_of_all_ranks_is_that_of_one(tmp_path, data, monkeypatch, kind, num_kv_heads, words):
    def in_own_process(_, job):
        with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
            return pool.submit(ranks.capture, job).result()

    monkeypatch.setattr(capture_module, "in_own_process", in_own_process)
    model = make_tiny_model(tmp_path / "model", kind, num_layers=2, num_kv_heads=num_kv_heads, dtype=torch.float32)
    text = load_text(data, make_tokenizer(), tokens=160, context=160, seed=0)
    one, all_ranks = (
        run_capture(CaptureRequest(str(model), text, queries=20, dtype="float32", words=given), tmp_path / str(number))
        for number, given in enumerate(({}, words))
    )
    assert all_ranks.layers == one.layers and all_ranks.inputs == one.inputs
    assert one.gram_unsupported == all_ranks.gram_unsupported
    assert [layer.num_kv_heads for layer in one.layers] == [num_kv_heads] * 2
    for layer in one.layers:
        for got, expected in zip(all_ranks.load_layer(layer), one.load_layer(layer), strict=True):
            for name in ("key", "value", "query"):
                close(getattr(got, name), getattr(expected, name))
            assert torch.equal(got.query_position, expected.query_position)
        if one.gram_unsupported is None:
            close(all_ranks.load_output_gram(layer), one.load_output_gram(layer))
        assert torch.equal(all_ranks.load_rotary(layer).far.cos_sin, one.load_rotary(layer).far.cos_sin)


def test_the_profile_of_two_stages_of_two_ranks_is_that_of_one_rank(tmp_path, data, qwen2, monkeypatch):
    context = fork_server()
    monkeypatch.setattr(processes, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
    monkeypatch.setattr(processes, "_begin", ranks.begin)
    sizes = {"sequence-length": 96, "capture-tokens": 192, "search-tokens": 96, "heldout-tokens": 96, "trials": 1}
    options = {"data": data, "dtype": "float32", "kv-cache-memory-bytes": KV_CACHE_BYTES, "max-bits": 4.5, **sizes}
    options |= {"recent-window": 16, "round-feedback": "none"}
    arguments = ["--quick", *(f"--{name}={value}" for name, value in options.items())]
    outs = tmp_path / "one", tmp_path / "four"
    for out, parallel in zip(outs, ([], ["-tp", "2", "--pipeline-parallel-size=2"]), strict=True):
        assert cli.main(["calibrate", *parallel, str(qwen2), "--out", str(out), *arguments]) == 0

    profiles = [yaml.safe_load((out / "profile.yaml").read_text()) for out in outs]
    for name in ("layers", "transforms", "recent_window"):
        assert profiles[0][name] == profiles[1][name]
    statics = [load_file(next(out.glob("*.statics.safetensors"))) for out in outs]
    assert statics[0].keys() == statics[1].keys() and statics[0]
    for name, expected in statics[0].items():
        close(statics[1][name], expected)
    kl = [Heldout.read(out).chosen.quality.kl_mean for out in outs]
    assert kl[0] == pytest.approx(kl[1], rel=0.05) and kl[0] > 1e-3
