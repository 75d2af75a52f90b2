"""The demo's parts that need no server, and the repair of GGUF files with two copies of one embedding."""

import argparse
import socket
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtuner_tools import demo
from kvtuner_tools.gguf import _tie_copies, convert_gguf
from vllm_kvtuner.profile.load import load_profile, shipped_profiles
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(arguments)


def test_port_in_use_is_an_error_before_anything_is_built(tmp_path, capsys):
    folder = tmp_path / "model"
    with socket.socket() as taken:
        taken.bind((demo.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert demo.run(parse("--port", str(port), str(folder))) == 1
    assert f"port {port} cannot be used" in capsys.readouterr().err
    assert not folder.exists()


def test_wrong_profile_is_an_error_before_anything_is_built(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ProfileError, match="no_such_profile"):
        demo.run(parse("--profile", "no_such_profile", str(folder)))
    assert not folder.exists()


def test_auto_has_measured_profiles_of_the_demo_model():
    """The digest is of the folder that build_smollm2 makes, which tests/e2e/test_demo.py serves."""
    shipped = [load_profile(name) for name in shipped_profiles()]
    of_demo = [each for each in shipped if each.model.name.endswith(demo.MODEL_NAME)]
    assert of_demo and {each.weights for each in of_demo} == {"81cc51f7fc31be38"}
    assert parse().profile == "auto"


def test_server_that_ends_shows_the_end_of_its_log(tmp_path):
    log = tmp_path / "server.log"
    script = "print('first'); print('the reason'); raise SystemExit(3)"
    with (
        demo._running([sys.executable, "-c", script], log) as server,
        pytest.raises(demo.DemoError, match=r"(?s)status 3.*the reason"),
    ):
        demo._wait_until_healthy(server, f"http://{demo.HOST}:1", log)


def test_server_is_stopped_when_the_demo_ends(tmp_path):
    script = "import time; time.sleep(600)"
    with demo._running([sys.executable, "-c", script], tmp_path / "server.log") as server:
        assert server.poll() is None
    assert server.poll() is not None


def test_memory_report_counts_stored_bytes():
    shape = ModelShape("model", "LlamaForCausalLM", (LayerShape(num_kv_heads=2, head_size=64),) * 4, (), None)
    report = demo._memory_report(load_profile("K4V4:plain").resolve(shape), prompt=1000, completion=24, capacity=1234)
    # 4 layers x 2 KV heads x (64 x (4 + 4) / 8 + 8) = 576 bytes per token; bf16: 4 x 2 x 64 x 2 x 2 = 2048.
    assert "576 bytes per token" in report
    assert "0.56 MiB instead of 2.00 MiB" in report
    assert "3.56 times less" in report
    assert "4.00 nominal bits, 4.50 stored bits" in report
    assert "1,234 tokens" in report
    assert f"{2**30 // 2048:,}" in report


@pytest.mark.parametrize(
    ("on_cpu", "times", "dtype"), [(True, 3.0, "float32"), (True, 0.5, None), (True, 1.1, None), (False, 3.0, None)]
)
def test_a_cpu_that_is_slow_in_bfloat16_serves_float32(monkeypatch, capsys, on_cpu, times, dtype):
    monkeypatch.setattr(demo, "_on_cpu", lambda: on_cpu)
    monkeypatch.setattr(demo, "bfloat16_times_float32", lambda: times)
    assert demo._dtype() == dtype
    line = "This processor takes 3.0 times as long in bfloat16 as in float32, so float32 is served\n"
    assert capsys.readouterr().out == (line if dtype else "")
    command = demo.server_command(Path("model"), "K4V4", 8000, dtype)
    assert ("--dtype float32" in " ".join(command)) == (dtype is not None)


def test_products_are_compared():
    assert 0 < demo.bfloat16_times_float32() < 1000


def untied_model(embedding: torch.Tensor, head: torch.Tensor) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding)
        model.get_output_embeddings().weight.copy_(head)
    return model


def write_gguf(path, embedding_dtype, output_dtype) -> None:
    """A file with the two embedding tensors alone, at the widths of the dtypes."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((48, 32), embedding_dtype))
    writer.add_tensor("output.weight", np.zeros((48, 32), output_dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("embedding_dtype", "output_dtype"), [(np.float16, np.float32), (np.float32, np.float16)])
def test_copies_are_tied_to_the_wider_one(tmp_path, embedding_dtype, output_dtype):
    head = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    embedding = head + 0.02 * torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    write_gguf(tmp_path / "model.gguf", embedding_dtype, output_dtype)
    model = untied_model(embedding, head)
    _tie_copies(model, tmp_path / "model.gguf")
    wider = head if output_dtype is np.float32 else embedding
    assert model.config.tie_word_embeddings
    assert torch.equal(model.get_input_embeddings().weight, wider)
    assert torch.equal(model.get_output_embeddings().weight, wider)


def test_embeddings_that_differ_stay_apart(tmp_path):
    head = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    embedding = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    write_gguf(tmp_path / "model.gguf", np.float16, np.float32)
    model = untied_model(embedding, head)
    _tie_copies(model, tmp_path / "model.gguf")
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_conversion_never_overwrites(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="delete it"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_setup_script_parses():
    subprocess.run(["bash", "-n", str(Path(__file__).parents[2] / "tools" / "setup_env.sh")], check=True)
