"""Text and log-probabilities against vLLM's unquantized cache, in float32 on a random model."""

import numpy as np
import pytest

from tests.helpers.compare import max_difference, mean_kl
from tests.helpers.engine import FULL_LOGPROBS, Call, cpu_only, run_engine

pytestmark = cpu_only

TOKENS = 24
K8V8_PROMPT_KL = 5.5e-4
"""Nats per token; measured 1.3e-4 to 3.6e-4."""
K8V8_DECODE_KL = 6e-4
"""Nats per token; measured 2.3e-4 to 4.0e-4."""
COMPILED_LOGPROB = 0.02
"""Measured 0.005: compiled code rounds otherwise, which moves single codes by one; K8V8 itself is 0.2 off."""


def calls(prompts):
    everything = {"max_tokens": TOKENS, "logprobs": FULL_LOGPROBS}
    # A prompt whose log-probabilities are wanted does not read the prefix cache; the second call reads it.
    return [Call(prompts, {**everything, "prompt_logprobs": FULL_LOGPROBS}), Call(prompts, everything)]


def same(first, second):
    pairs = [pair for calls in zip(first.answers, second.answers, strict=True) for pair in zip(*calls, strict=True)]
    return all(
        one.token_ids == other.token_ids
        and np.array_equal(one.logprobs, other.logprobs)
        and np.array_equal(one.prompt_logprobs, other.prompt_logprobs)
        and one.cached_tokens == other.cached_tokens
        for one, other in pairs
    )


@pytest.fixture(scope="module")
def auto(llama, prompts):
    return run_engine(llama, calls(prompts))


@pytest.fixture(scope="module")
def k8v8(llama, prompts):
    return run_engine(llama, calls(prompts), profile="K8V8:plain", attend_cached_prefill=True)


def test_the_plugin_unused_changes_nothing(llama, prompts, auto):
    without = run_engine(llama, calls(prompts), environment={"VLLM_PLUGINS": ""})
    assert auto.plugin_loaded
    assert not without.plugin_loaded
    assert same(auto, without)


def test_k16v16_everywhere_is_auto(llama, prompts, auto):
    assert same(run_engine(llama, calls(prompts), profile="K16V16:plain"), auto)


def test_k8v8_prefill_is_close_to_auto(k8v8, auto):
    for mine, truth in zip(k8v8.answers[0][1:], auto.answers[0][1:], strict=True):
        assert mean_kl(truth.prompt_logprobs, mine.prompt_logprobs) < K8V8_PROMPT_KL


def test_k8v8_decode_is_close_to_auto(llama, prompts, k8v8):
    """Auto scores the very tokens that were decoded from the packed cache."""
    answers = k8v8.answers[1]
    forced = [prompt + list(answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    truth = run_engine(llama, [Call(forced, {"max_tokens": 1, "prompt_logprobs": FULL_LOGPROBS})])
    for mine, scored in zip(answers, truth.answers[0], strict=True):
        expected = scored.prompt_logprobs[-TOKENS:]
        assert mean_kl(expected, mine.logprobs) < K8V8_DECODE_KL
    assert any(answer.cached_tokens for answer in answers)


def test_profile_of_the_environment(llama, prompts, k8v8):
    run = run_engine(
        llama,
        calls(prompts),
        kv_cache_dtype="kvtuner",
        attend_cached_prefill=True,
        environment={"KVTUNER_PROFILE": "K8V8:plain"},
    )
    assert same(run, k8v8)


def test_compiled_like_eager(llama, prompts, k8v8):
    run = run_engine(
        llama,
        calls(prompts),
        profile="K8V8:plain",
        attend_cached_prefill=True,
        enforce_eager=False,
        environment={"VLLM_DISABLE_COMPILE_CACHE": "1"},
    )
    assert run.compiled_graphs > k8v8.compiled_graphs
    for mine, eager in zip(run.answers[0], k8v8.answers[0], strict=True):
        assert mine.token_ids == eager.token_ids
        assert max_difference(mine.logprobs, eager.logprobs) < COMPILED_LOGPROB


def test_start_up_line(k8v8):
    lines = [line for line in k8v8.log.splitlines() if "kvtuner profile" in line]
    assert len(lines) == 1
    assert "kvtuner profile K8V8:plain: 8.000 nominal bits, 8.500 stored bits, 1,088 bytes per token; " in lines[0]
    assert f"{k8v8.kv_cache_size_tokens:,} KV tokens fit, 1.88 times as many as bf16" in lines[0]
    assert f"KV cache size: {k8v8.kv_cache_size_tokens:,} tokens" in k8v8.log
