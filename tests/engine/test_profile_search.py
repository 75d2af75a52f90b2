"""What an engine's start puts in the place of ``auto``; nothing is calibrated, and no engine starts."""

import textwrap
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from vllm import platforms

from vllm_kvtuner.engine import calibrate_once, profile_search
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError

SHAPE = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 128),) * 4)
GIB = 1 << 30
MODEL = "model: {name: toy, architecture: ToyForCausalLM, num_layers: 4, num_kv_heads: 2, head_size: 128, weights: %s}"


@pytest.fixture
def make_config(tmp_path, monkeypatch):
    """Makes an engine's configuration of a model's folder."""
    monkeypatch.setenv("KVTUNER_PROFILE_FOLDER", str(tmp_path / "mine"))
    (tmp_path / "model").mkdir()
    save_file({"k_proj": np.arange(12.0)}, tmp_path / "model" / "model.safetensors")

    def make(profile, *, memory=None, max_model_len=65536, load_format="auto", **parallel):
        ranks = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, **parallel}
        return SimpleNamespace(
            additional_config={"kvtuner_profile": profile},
            model_config=SimpleNamespace(
                model=str(tmp_path / "model"),
                tokenizer=str(tmp_path / "model"),
                revision=None,
                hf_token=None,
                dtype=torch.bfloat16,
                max_model_len=max_model_len,
                trust_remote_code=False,
            ),
            load_config=SimpleNamespace(download_dir=None, load_format=load_format),
            parallel_config=SimpleNamespace(**ranks),
            cache_config=SimpleNamespace(kv_cache_memory_bytes=memory, gpu_memory_utilization=0.9),
        )

    return make


def look(config):
    profile_search.look_for(config, SHAPE)
    return config.additional_config["kvtuner_profile"]


def problem_of(config, shape=SHAPE):
    with pytest.raises(ProfileError) as caught:
        profile_search.look_for(config, shape)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("memory", "ranks", "chosen"),
    [
        (5 * GIB, {}, "K8V8"),
        (4 * GIB, {}, "K8V4"),
        (2 * GIB, {"tensor_parallel_size": 2}, "K8V4"),
        (2 * GIB, {"tensor_parallel_size": 8}, "K8V4"),  # each of two KV heads is on four of the ranks
        (2 * GIB, {"pipeline_parallel_size": 2}, "K8V4"),
    ],
)
def test_a_need_takes_the_bits_that_fit_in_the_memory_of_all_ranks(memory, ranks, chosen, make_config):
    config = make_config("auto:fit=32768x64", memory=memory, **ranks)
    assert look(config) == chosen
    assert config.additional_config["kvtuner_auto"] == ["auto:fit=32768x64", chosen, "built from weights"]
    assert config.additional_config["kvtuner_request_tokens"] == 32768
    assert profile_search.asked_need(config).requests == 64
    assert look(config) == chosen  # an engine's arguments may be checked again


@pytest.mark.slow
def test_memory_is_estimated_where_it_is_not_given(make_config, monkeypatch, caplog, tmp_path):
    caplog.set_level("INFO", logger="vllm.kvtuner")
    device = SimpleNamespace(get_device_total_memory=lambda: 9 * GIB)
    monkeypatch.setattr(platforms, "current_platform", device)
    assert look(make_config("auto:fit=32768x64")) == "K8V8"  # 0.9 x 9 - 3 = 5.1 GiB
    left = int(0.9 * 9 * GIB) - 3 * GIB - (tmp_path / "model" / "model.safetensors").stat().st_size
    assert f"auto:fit=32768x64: {left:,} bytes for keys and values over all ranks, estimated" in caplog.text
    device.get_device_total_memory = lambda: 7 * GIB
    assert look(make_config("auto:fit=32768x64")) == "K8V4"  # 3.3 GiB
    device.get_device_total_memory = lambda: 3 * GIB
    assert "weights must leave memory for keys and values" in problem_of(make_config("auto:fit=32768x64"))
    device.get_device_total_memory = lambda: 4 * GIB
    assert "64 requests of 32,768 tokens must fit in 644,2" in problem_of(make_config("auto:fit=32768x64"))


def test_memory_must_be_given_where_weights_are_elsewhere(make_config, tmp_path):
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "the memory must be given (--kv-cache-memory-bytes)" in problem_of(make_config("auto:fit=32768x64"))


def test_a_need_of_longer_requests_than_are_served(make_config):
    problem = problem_of(make_config("auto:fit=32768x64", max_model_len=8192))
    assert problem.endswith("requests must be of at most max_model_len (8,192) tokens, but got 32,768")


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("spec", "better"), [("auto", "auto:calibrate"), ("auto:3.5", "auto:3.5,calibrate"), ("auto:8.5", None)]
)
def test_a_pair_comes_with_the_advice_to_calibrate(spec, better, make_config, caplog):
    caplog.set_level("INFO", logger="vllm.kvtuner")
    look(make_config(spec))
    lines = [record.getMessage().rpartition(" ")[2] for record in caplog.records]
    assert lines == ([] if better is None else [better])


def test_a_profile_of_other_weights_is_refused(make_config, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(f"version: 1\nlayers: K4V4\n{MODEL % repr('0' * 16)}\n")
    profile = load_profile(str(path))
    (problem,) = profile_search.other_weights(make_config(str(path)), profile)
    assert problem.startswith(f"{path}: model.weights must be those of the model, ")
    assert profile_search.other_weights(make_config(str(path), load_format="dummy"), profile) == ()
    weights = ModelFiles(str(tmp_path / "model")).weights
    for same in (weights, "any"):
        path.write_text(f"version: 1\nlayers: K4V4\n{MODEL % repr(same)}\n")
        assert profile_search.other_weights(make_config(str(path)), load_profile(str(path))) == ()


def test_a_shipped_profile_chosen_by_name_is_served_with_other_weights(make_config, caplog):
    profile = load_profile("smollm2_135m_window_4.50bit")
    assert profile_search.other_weights(make_config("smollm2_135m_window_4.50bit"), profile) == ()
    assert "quality with these weights was not measured" in caplog.text


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Stands in for ``kvtuner calibrate``: runs some code with its arguments, and notes them."""

    def make(code):
        path = tmp_path / "calibrate.py"
        head = f"""
            import os, pathlib, sys, time
            assert "KVTUNER_PROFILE" not in os.environ
            with open({str(tmp_path / "runs")!r}, "a") as runs:
                print(*sys.argv[1:], file=runs)
            """
        path.write_text(textwrap.dedent(head) + textwrap.dedent(code))
        monkeypatch.setattr(calibrate_once, "PROGRAM", (str(path),))
        monkeypatch.setenv("KVTUNER_PROFILE", "auto:3.5,calibrate")

    return make


def keeping(tmp_path):
    """Code that keeps a profile as the command does."""
    folder = tmp_path / "mine" / ModelFiles(str(tmp_path / "model")).weights
    return f"""
        print("1/2 capture: as it was", flush=True)
        time.sleep(0.5)
        folder = pathlib.Path({str(folder)!r})
        folder.mkdir(parents=True)
        (folder / "3.25bit.yaml").write_text("version: 1\\nlayers: K4V2\\n")
        """


@pytest.mark.slow
def test_a_model_is_calibrated_once(make_config, program, tmp_path, caplog):
    program(keeping(tmp_path))
    with caplog.at_level("INFO", logger="vllm.kvtuner"), ThreadPoolExecutor(2) as pool:
        configs = [make_config("auto:3.5,calibrate") for _ in range(2)]
        found = list(pool.map(look, configs))
    assert found[0] == found[1]
    assert found[0].startswith(str(tmp_path / "mine")) and found[0].endswith("3.25bit.yaml")
    assert configs[0].additional_config["kvtuner_auto"][2] == "the user's folder"
    (run,) = (tmp_path / "runs").read_text().splitlines()
    assert run.startswith(f"{tmp_path / 'model'} --quick --max-bits 3.5 --dtype bfloat16 --out {tmp_path / 'mine'}/")
    lines = [record.getMessage() for record in caplog.records]
    assert "calibration: 1/2 capture: as it was" in lines
    assert any("another process calibrates this model; waiting for it" in line for line in lines)
    assert [path.name for path in (tmp_path / "mine" / calibrate_once.WORK_FOLDER).iterdir() if path.is_dir()] == []
    assert look(make_config("auto:3.5")) == found[0]  # and later starts need not ask for it


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on_in_its_folder(make_config, program, tmp_path):
    program("print('Traceback: no CUDA device', file=sys.stderr); sys.exit(3)")
    problem = problem_of(make_config("auto:fit=32768x64,calibrate", memory=GIB))
    rule = "calibration before the engine's start must succeed, but got status 3: Traceback: no CUDA device"
    assert problem == f"auto:fit=32768x64,calibrate: {rule}"
    program("sys.exit(4)")
    assert "status 4: nothing on its output" in problem_of(make_config("auto:fit=32768x64,calibrate", memory=GIB))
    first, second = (tmp_path / "runs").read_text().splitlines()
    assert first == second
    assert "--memory 1GiB --context 32768 --concurrency 64" in first


@pytest.mark.slow
def test_a_calibration_without_outcome_is_no_success(make_config, program):
    program("")
    assert "must end in a profile within the budget, but got none of at most 3.5 stored bits" in problem_of(
        make_config("auto:3.5,calibrate")
    )


@pytest.mark.slow
def test_calibration_loads_the_model_as_the_engine_does(make_config, program, tmp_path):
    program("sys.exit(1)")
    config = make_config("auto:3.5,calibrate", tensor_parallel_size=2)
    config.model_config.revision, config.model_config.trust_remote_code = "abc", True
    config.load_config.download_dir = "/models"
    problem_of(config)
    (run,) = (tmp_path / "runs").read_text().splitlines()
    words = "--tensor-parallel-size 2 --revision abc --download-dir /models --trust-remote-code"
    assert f"--max-bits 3.5 --dtype bfloat16 {words} --out" in run
