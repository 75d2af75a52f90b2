"""How far a real model in bf16 moves from vLLM's own cache: K8V8 a little, K16V16 not at all."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.evaluate import EvaluationRequest, evaluate
from tests.helpers.engine import Call, run_engine

TEXT = Path(__file__).with_name("text.txt")
K8V8_KL = 1.6e-3
"""Nats per token; measured 1.08e-3 (standard error 0.06e-3)."""
TOKENS = 600
PROMPTS = ("The capital of France is", "Once upon a time, in a small village,", "def fibonacci(n):")


@pytest.fixture(scope="module")
def evaluation(smollm2):
    """Teacher-forced with ``attend_cached_prefill``, in two chunks, so that the cache is read by both."""
    settings = (CacheSetting("kvtuner", "K8V8:plain"), CacheSetting("kvtuner", "K16V16:plain"))
    request = EvaluationRequest(
        model=str(smollm2),
        settings=settings,
        data=TEXT,
        tokens=TOKENS,
        context=300,
        chunk=200,
        kv_memory_bytes=64 << 20,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # kernels' tests set it for their own process
        return evaluate(request)


def test_k8v8_is_close_to_bf16(evaluation):
    k8v8 = evaluation["settings"][0]
    assert evaluation["predicted_tokens"] >= 500
    assert k8v8["kl_mean"] < K8V8_KL


def test_k16v16_is_bf16(evaluation):
    assert evaluation["settings"][1]["kl_mean"] == 0


def test_k16v16_generates_the_tokens_of_bf16(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    call = Call([tokenizer(prompt)["input_ids"] for prompt in PROMPTS], {"max_tokens": 40})
    options = {"dtype": "bfloat16", "kv_cache_memory_bytes": 64 << 20}
    auto = run_engine(smollm2, [call], **options)
    assert run_engine(smollm2, [call], profile="K16V16:plain", **options).tokens == auto.tokens
    assert "Paris" in tokenizer.decode(auto.tokens[0][0])
