"""A real model served on the GPU gives the text that the CPU's reference implementation gives."""

import json
from pathlib import Path

import openai
import pytest

from tests.helpers.server import serving

pytestmark = pytest.mark.gpu

EXPECTED = Path(__file__).with_name("cpu_greedy_k8v8.json")
"""Greedy tokens on a CPU, and by how much each one's log-probability led the second best."""
NEAR_TIE = 0.5
"""Nats. Two bf16 implementations of one model may choose differently where the best two are this close."""


def test_greedy_tokens_are_the_cpus_up_to_a_near_tie(smollm2, tmp_path):
    expected = json.loads(EXPECTED.read_text())
    arguments = ["--kv-cache-dtype", "kvtuner", "--kvtuner-profile", expected["profile"], "--served-model-name", "m"]
    arguments += ["--dtype", expected["dtype"], "--max-model-len", "2048", "--gpu-memory-utilization", "0.1"]
    # Given, since vLLM refuses to count free memory on a card that others use too.
    arguments += ["--kv-cache-memory-bytes", str(256 << 20)]
    with serving(smollm2, tmp_path / "log", arguments) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=240)
        for answer in expected["answers"]:
            choice = client.completions.create(
                model="m",
                prompt=answer["prompt"],
                temperature=0,
                max_tokens=32,
                logprobs=1,
                extra_body={"return_tokens_as_token_ids": True},
            ).choices[0]
            got = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
            pairs = zip(got, answer["tokens"], strict=False)
            parting = next((step for step, (one, other) in enumerate(pairs) if one != other), None)
            if parting is not None:
                assert answer["gaps"][parting] < NEAR_TIE, (answer["prompt"], parting, got)
