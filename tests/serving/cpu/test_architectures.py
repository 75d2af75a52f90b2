"""Gemma 3 (sliding-window beside full layers), Qwen2 (biased keys, key offset), and models with attention sinks, in
float32."""

import subprocess
import sys

import pytest

from tests.helpers.compare import max_difference, mean_kl
from tests.helpers.engine import FULL_LOGPROBS, KV_CACHE_BYTES, Call, cpu_only, run_engine
from tests.helpers.tiny_model import SLIDING_WINDOW, make_tiny_model

pytestmark = cpu_only

TOKENS = 16
GEMMA_PROFILES = {
    "uniform": ("version: 1\nlayers: K8V8\n", 7.5e-5),  # measured 5.0e-5
    "a pair per kind": ("version: 1\nlayers: {0: K8V8, 1: K8V4, 2: K4V4, 3: K8V8}\n", 7e-3),  # measured 4.7e-3
}
"""Profile and bound of the mean KL from auto, in nats per token."""
UNEQUAL_KL = 7e-3
"""Measured 4.8e-3, where the other profile of unlike pairs has 4.7e-3."""
CHUNKED_LOGPROB = 0.02
"""Measured 0.006: another batch rounds otherwise, which moves single codes by one."""
GEMMA_KINDS = ((0, 2), (1, 3))
"""Sliding-window and full layers."""
SINK_PROFILES = {
    "no window": ("layers: K8V8\n", 7e-4),  # measured 4.8e-4
    "16 bits": ("layers: K8V8\nrecent_window: 24\nsink_tokens: 4\n", 4e-4),  # measured 2.7e-4
    "8 bits": ("layers: K8V8\nrecent_window: 24\nrecent_window_bits: 8\n", 7e-4),
}
"""By recent window, profile and bound of the mean KL from auto of Granite SWA, in nats per token."""
GPT_OSS_KL = 2e-3
"""Measured 1.4e-3, in layers with experts."""
ALL_WITHOUT_DATA = ("key_offset", "key_hadamard", "value_hadamard", "range_search")
QWEN_KL = {
    "K8V8": 7e-4,  # measured 4.5e-4, without transforms 3.7e-3
    "K4V4": 0.15,  # measured 0.10, without transforms 0.63
}
QWEN_GAIN = 3
"""How many times smaller the transforms make the KL, at least; measured 4.7 to 8.8."""


def decode_and_prefill(prompts):
    return [Call(prompts, {"max_tokens": TOKENS, "logprobs": FULL_LOGPROBS, "prompt_logprobs": FULL_LOGPROBS})]


def score(model, prompts, answers):
    """Auto's log-probabilities of prompts and given answers, [tokens - 1, vocabulary] each."""
    forced = [prompt + list(answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    run = run_engine(model, [Call(forced, {"max_tokens": 1, "prompt_logprobs": FULL_LOGPROBS})])
    return [answer.prompt_logprobs for answer in run.answers[0]]


def divergences(model, prompts, run):
    """Mean KL from auto of prefill and of decode, each of the prompt with the largest."""
    prefill, decode = [], []
    for prompt, answer, expected in zip(prompts, run.answers[0], score(model, prompts, run.answers[0]), strict=True):
        prefill.append(mean_kl(expected[: len(prompt) - 1], answer.prompt_logprobs))
        decode.append(mean_kl(expected[len(prompt) - 1 :], answer.logprobs))
    return max(prefill), max(decode)


@pytest.fixture(scope="module")
def long_prompts(prompts):
    """One prompt within Gemma's window, the others well beyond."""
    assert [len(prompt) > 1.5 * SLIDING_WINDOW for prompt in prompts[1:]] == [False, True, True, True, True]
    return prompts[1:]


@pytest.mark.parametrize(("text", "bound"), GEMMA_PROFILES.values(), ids=GEMMA_PROFILES.keys())
def test_gemma3(gemma3, long_prompts, tmp_path, text, bound):
    profile = tmp_path / "profile.yaml"
    profile.write_text(text)
    options = {"profile": profile, "attend_cached_prefill": True}
    run = run_engine(gemma3, decode_and_prefill(long_prompts), **options)
    assert max(divergences(gemma3, long_prompts, run)) < bound

    chunked = run_engine(gemma3, decode_and_prefill(long_prompts), max_num_batched_tokens=48, **options)
    for whole, parts in zip(run.answers[0], chunked.answers[0], strict=True):
        assert whole.token_ids == parts.token_ids
        assert max_difference(whole.logprobs, parts.logprobs) < CHUNKED_LOGPROB
        assert max_difference(whole.prompt_logprobs, parts.prompt_logprobs) < CHUNKED_LOGPROB

    # A block of the pool serves either kind, so it is as large as the larger group's pages and no larger.
    block_bytes = max(sum(run.page_bytes[layer] for layer in kind) for kind in GEMMA_KINDS)
    assert run.num_gpu_blocks == KV_CACHE_BYTES // block_bytes


def test_gemma3_with_unlike_pairs_in_unequal_numbers_of_sliding_layers(long_prompts, tmp_path):
    model = make_tiny_model(tmp_path / "model", "gemma3", num_layers=6)
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 1\nlayers: {0: K8V8, 1: K8V4, 2: K4V4, 3: K8V8, 4: K8V8, 5: K8V4}\n")
    run = run_engine(model, decode_and_prefill(long_prompts), profile=profile, attend_cached_prefill=True)
    assert max(divergences(model, long_prompts, run)) < UNEQUAL_KL
    assert run.num_gpu_blocks == KV_CACHE_BYTES // sum(run.page_bytes[layer] for layer in (1, 3, 5))


@pytest.mark.parametrize("attend_cached", [False, True])
@pytest.mark.parametrize(("text", "bound"), SINK_PROFILES.values(), ids=SINK_PROFILES.keys())
def test_attention_sinks(granite_swa, long_prompts, tmp_path, text, bound, attend_cached):
    """In prefills of several chunks, and in decodes, beside sliding windows and recent ones."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"version: 1\n{text}")
    options = {"profile": profile, "attend_cached_prefill": attend_cached, "max_num_batched_tokens": 144}
    run = run_engine(granite_swa, decode_and_prefill(long_prompts), **options)
    assert max(divergences(granite_swa, long_prompts, run)) < bound


def test_gpt_oss(gpt_oss, long_prompts):
    run = run_engine(gpt_oss, decode_and_prefill(long_prompts), profile="K8V8", attend_cached_prefill=True)
    assert max(divergences(gpt_oss, long_prompts, run)) < GPT_OSS_KL


@pytest.fixture(scope="module")
def statics(qwen2, tmp_path_factory):
    path = tmp_path_factory.mktemp("statics") / "qwen2.safetensors"
    command = [sys.executable, "-m", "kvtuner_tools.cli", "statics", str(qwen2), "--out", str(path)]
    subprocess.run(command, check=True)
    return path


def qwen_run(qwen2, prompts, statics, pair, transforms):
    profile = statics.parent / "profile.yaml"
    switches = ", ".join(f"{name}: true" for name in transforms)
    profile.write_text(
        f"version: 1\nlayers: {pair}\nattend_cached_prefill: true\n"
        f"statics: {statics.name}\ntransforms: {{{switches}}}\n"
    )
    return run_engine(qwen2, decode_and_prefill(prompts), profile=profile)


@pytest.mark.parametrize("pair", QWEN_KL)
def test_qwen2_with_key_offset(qwen2, prompts, statics, pair):
    plain, transformed = (
        divergences(qwen2, prompts[-2:], qwen_run(qwen2, prompts[-2:], statics, pair, transforms))
        for transforms in ((), ALL_WITHOUT_DATA)
    )
    assert max(transformed) < QWEN_KL[pair]
    for without, having in zip(plain, transformed, strict=True):
        assert having < without / QWEN_GAIN
