"""A server with an engine on each of two GPUs: each answers as the other does, from a cache of its own."""

import openai
import pytest
import torch

from tests.helpers.server import serving
from tests.helpers.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

ENGINES = ("0", "1")


def test_each_engine_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
    model = make_tiny_model(tmp_path / "model", "llama", head_size=128)
    arguments = ["--kv-cache-dtype", "kvtuner", "--kvtuner-profile", "K8V8:plain", "--data-parallel-size", "2"]
    arguments += ["--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "4"]
    arguments += ["--api-server-count", "1", "--enforce-eager"]
    arguments += ["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(64 << 20)]
    with serving(model, tmp_path / "log", arguments) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        answers = [
            client.completions.create(
                model="m",
                prompt=list(range(20, 120)),
                temperature=0,
                max_tokens=16,
                extra_headers={"X-data-parallel-rank": engine},
                extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
                logprobs=1,
            )
            .choices[0]
            .logprobs.tokens
            for engine in ENGINES
        ]
        metrics = server.metrics()
    assert answers[0] == answers[1]
    for engine in ENGINES:
        label = f'engine="{engine}"'
        of_engine = {line.partition("{")[0]: line for line in metrics if label in line}
        assert float(of_engine["vllm:generation_tokens_total"].rpartition(" ")[2]) == 16
        assert float(of_engine["vllm:kvtuner_stored_bits"].rpartition(" ")[2]) == 8.25
