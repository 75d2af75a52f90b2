"""Models that mix linear-attention with attention layers, against vLLM's unquantized cache."""

import re

import pytest

from tests.helpers.compare import mean_kl
from tests.helpers.engine import FULL_LOGPROBS, KV_CACHE_BYTES, Call, cpu_only, run_engine
from tests.helpers.tiny_model import HYBRIDS, make_tiny_model

pytestmark = cpu_only

OPTIONS = {
    # vLLM's own CPU kernels: those of mamba2 leave no states for the prefix cache, those of delta nets take bf16 alone.
    "granite_hybrid": {"enable_prefix_caching": False},
    "falcon_h1": {"enable_prefix_caching": False},
    "qwen3_next": {"dtype": "bfloat16"},
    "lfm2": {},
}
K8V8_KL = {
    "granite_hybrid": 3e-5,  # measured 1.9e-5
    "falcon_h1": 4.5e-4,  # measured 2.8e-4
    "qwen3_next": 1.2e-4,  # measured 7.6e-5
    "lfm2": 2.5e-5,  # measured 1.5e-5
}
"""Bound of the mean KL from auto, in nats per token."""
PROFILES = {
    "unlike pairs": ("layers: {0-1: K8V8, 2-3: K4V2}\n", 0.03, 0.02),
    "island": ("layers: {0-1: K16V16, 2-3: K8V8}\n", 5e-6, 2e-5),
    "window": ("layers: K4V4\nrecent_window: 40\n", 2e-3, 4e-4),
    "windows": (
        "layers: {0-1: K2V2, 2-3: K8V4}\nrecent_window: 40\nrecent_window_bits: 8\nsink_tokens: 4\n",
        0.04,
        6e-3,
    ),
}
"""Profile, and bounds of the mean KL from auto for Granite and for Qwen3-Next, 1.5 times what was measured."""
STATES = re.compile(r"([\d,]+) more per request for states of linear-attention layers, ([\d.]+)% of them padding")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrids")
    return {name: make_tiny_model(folder / name, name) for name in HYBRIDS}


def live(models, architecture, prompts, profile=None):
    """Twice the same prompts, the second time from the prefix cache, if there is one."""
    calls = [Call(prompts, {"logprobs": FULL_LOGPROBS})] * 2
    return run_engine(models[architecture], calls, profile=profile, **OPTIONS[architecture])


@pytest.fixture(scope="module")
def auto(models, prompts):
    """What vLLM's own cache answers, by architecture."""
    return {name: live(models, name, prompts) for name in HYBRIDS}


def divergence(truth, run):
    """Largest mean KL of a prompt's answers from auto's, as far as both have the same tokens."""
    found = []
    for expected, answers in zip(truth.answers, run.answers, strict=True):
        for one, other in zip(expected, answers, strict=True):
            pairs = enumerate(zip(one.token_ids, other.token_ids, strict=True), start=1)
            same = next((count for count, (mine, theirs) in pairs if mine != theirs), len(one.token_ids))
            found.append(mean_kl(one.logprobs[:same], other.logprobs[:same]))
    return max(found)


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_k8v8_answers_like_the_unquantized_cache(models, auto, prompts, architecture):
    run = live(models, architecture, prompts, "K8V8:plain")
    assert divergence(auto[architecture], run) < K8V8_KL[architecture]
    if OPTIONS[architecture].get("enable_prefix_caching", True):
        assert run.answers[1][-1].cached_tokens >= 256


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles(models, auto, prompts, tmp_path, profile):
    text, *bounds = PROFILES[profile]
    (tmp_path / "profile.yaml").write_text(f"version: 1\n{text}")
    for architecture, bound in zip(("granite_hybrid", "qwen3_next"), bounds, strict=True):
        run = live(models, architecture, prompts, tmp_path / "profile.yaml")
        assert divergence(auto[architecture], run) < bound


@pytest.mark.parametrize("pairs", [("K8V8", "K4V2"), ("K4V2", "K8V8")])
@pytest.mark.parametrize("architecture", ["granite_hybrid", "falcon_h1"])
def test_blocks_are_full_whatever_the_pairs(models, tmp_path, architecture, pairs):
    """A block holds one page of each attention layer, or one state of each linear-attention layer."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 1\nlayers: {{0-1: {}, 2-3: {}}}\n".format(*pairs))
    run = run_engine(models[architecture], profile=profile, **OPTIONS[architecture])
    layers = 4 if architecture == "falcon_h1" else 2
    assert sorted(run.groups) == [(layers, 384), (layers, 1024)]
    token_bytes = layers // 2 * 2 * ((64 * 16 // 8 + 8) + (64 * 6 // 8 + 8))
    assert run.num_gpu_blocks == KV_CACHE_BYTES // (384 * token_bytes)
    (found,) = STATES.findall(run.log)
    assert int(found[0].replace(",", "")) == 384 * token_bytes
    assert float(found[1]) < 2


def test_mamba2_with_a_prefix_cache_is_refused_on_cpu(models):
    with pytest.raises(ValueError, match=r"enable_prefix_caching must be false on a CPU .* but got true"):
        run_engine(models["granite_hybrid"], profile="K8V8:plain")
