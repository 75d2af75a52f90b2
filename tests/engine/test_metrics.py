"""The gauges that stand beside vLLM's; tests/e2e/test_http.py reads them from a server."""

import functools
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import CollectorRegistry, Gauge

from vllm_kvtuner.engine import metrics
from vllm_kvtuner.engine.config import AUTO_KEY, DIGEST_KEY, PROFILE_KEY

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 384,
}
PROFILE = "version: 1\nlayers: {0: K16V16, 1: K4V2, 2-3: K4V4}\n"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Publishes for engines 0 and 1: value by name and labels."""
    monkeypatch.delenv("KVTUNER_DECODE_KERNEL", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    path = tmp_path / "mixed.yaml"
    path.write_text(PROFILE)
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="model", hf_config=HF_CONFIG, served_model_name="served"),
        cache_config=SimpleNamespace(kv_cache_size_tokens=1600, cache_dtype="kvtuner"),
        additional_config={
            PROFILE_KEY: str(path),
            AUTO_KEY: ["auto:9", str(path), "the model's folder"],
            DIGEST_KEY: "0123",
        },
    )

    def publish(capability, on_cpu=False, told=None):
        registry = CollectorRegistry()
        for engine, kernels in (told or {}).items():
            metrics.keep_decode_kernels(config, engine, kernels)
        metrics.publish(functools.partial(Gauge, registry=registry), config, [0, 1], capability, on_cpu)
        return lambda name, **labels: registry.get_sample_value(
            f"vllm:kvtuner_{name}", {"model_name": "served", "engine": "1", **labels}
        )

    return publish


def test_bits_bytes_and_tokens(published):
    value = published((9, 0))
    # Two KV heads of 96 numbers: 4 x 96 bytes, then (48 + 24 + 8), then (48 + 48 + 8) in two layers.
    assert value("kv_bytes_per_token") == 2 * (384 + 80 + 2 * 104)
    assert value("stored_bits") == pytest.approx(16 * (384 + 80 + 2 * 104) / (4 * 384))
    assert value("nominal_bits") == (16 + 3 + 4 + 4) / 4
    assert value("kv_cache_tokens") == 1600
    assert value("profile_info", profile="mixed", source="the model's folder", digest="0123") == 1


@pytest.mark.parametrize(
    ("capability", "on_cpu", "asked", "k4v2", "k4v4"),
    [
        pytest.param((9, 0), False, None, "triton", "cuda", id="Hopper, whose kernel has no 2-bit values of 96"),
        pytest.param((9, 0), False, "triton", "triton", "triton", id="asked for"),
        pytest.param((10, 0), False, None, "triton", "cuda", id="Blackwell"),
        pytest.param((7, 5), False, None, "triton", "triton", id="Turing"),
        pytest.param(None, False, None, "triton", "triton", id="no CUDA"),
        pytest.param(None, True, None, "reference", "reference", id="CPU"),
    ],
)
def test_layers_by_decode_kernel(published, monkeypatch, capability, on_cpu, asked, k4v2, k4v4):
    if asked:
        monkeypatch.setenv("KVTUNER_DECODE_KERNEL", asked)
    value = published(capability, on_cpu)
    assert value("layers", pair="K16V16", decode_kernel="vllm") == 1
    assert value("layers", pair="K4V2", decode_kernel=k4v2) == 1
    assert value("layers", pair="K4V4", decode_kernel=k4v4) == 2


def test_what_the_workers_have_told_stands_before_the_rules(published):
    """Of each engine its own: a card that failed its self-test is one engine's."""
    value = published((9, 0), told={1: {1: "triton", 2: "triton", 3: "cuda"}})
    assert value("layers", pair="K16V16", decode_kernel="vllm") == 1
    for kernel in ("triton", "cuda"):
        assert value("layers", pair="K4V4", decode_kernel=kernel) == 1
    assert value("layers", engine="0", pair="K4V4", decode_kernel="cuda") == 2
    assert value("layers", engine="0", pair="K4V4", decode_kernel="triton") is None


def test_a_layer_is_tritons_where_one_of_its_workers_has_that():
    workers = [{0: "cuda", 1: "triton"}, {0: "triton", 1: "cuda"}, {2: "cuda"}]
    assert metrics.merge_decode_kernels(workers) == {0: "triton", 1: "triton", 2: "cuda"}
