"""LoRA adapters change keys and values before they are stored; the prefix cache keeps their requests apart; float32."""

import pytest

from tests.helpers.compare import max_difference, mean_kl
from tests.helpers.engine import FULL_LOGPROBS, Call, cpu_only, run_engine
from tests.helpers.tiny_model import make_lora_adapter

pytestmark = cpu_only

GREEDY = {"max_tokens": 16, "logprobs": FULL_LOGPROBS}
K8V8_KL = 6e-4
"""Nats per token, as without an adapter."""
ADAPTER_KL = 0.05
"""What the adapter changes, at least."""
SAME = 2e-3
"""Float32's rounding in another batch moves single codes."""
ENABLED = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    return str(make_lora_adapter(llama, tmp_path_factory.mktemp("adapters") / "adapter"))


def test_adapters_and_the_prefix_cache(llama, adapter, prompts):
    """The base model's request and the adapter's of one prompt, in turns: each gets its own blocks and answers."""
    calls = [Call(prompts[-1:], GREEDY), Call(prompts[-1:], GREEDY, adapter=adapter)]
    run = run_engine(llama, calls * 2, profile="K8V8:plain", attend_cached_prefill=True, **ENABLED)
    base, adapted, base_again, adapted_again = (call[0] for call in run.answers)
    assert [answer.cached_tokens for answer in (base, adapted, base_again, adapted_again)] == [0, 0, 256, 256]
    assert mean_kl(base.logprobs[:1], adapted.logprobs[:1]) > ADAPTER_KL
    for first, second in ((base, base_again), (adapted, adapted_again)):
        assert first.token_ids == second.token_ids
        assert max_difference(first.logprobs, second.logprobs) < SAME


def test_adapters_are_as_close_to_the_unquantized_cache_as_the_base_model(llama, adapter, prompts):
    everything = {"max_tokens": 1, "prompt_logprobs": FULL_LOGPROBS}
    runs = [
        run_engine(llama, [Call(prompts[-1:], everything, adapter=adapter)], profile=profile, **keywords, **ENABLED)
        for profile, keywords in ((None, {}), ("K8V8:plain", {"attend_cached_prefill": True}))
    ]
    auto, mine = (run.answers[0][0].prompt_logprobs for run in runs)
    assert mean_kl(auto, mine) < K8V8_KL
