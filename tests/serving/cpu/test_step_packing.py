"""Tokens that are packed at the end of a step leave what tokens that are packed at once leave, bit by bit; float32."""

import os
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest

from tests.helpers.engine import KV_CACHE_BYTES, Call, cpu_only, fork_server
from vllm_kvtuner.profile.statics import FeedbackStatics, LayerStatics, save_statics

pytestmark = cpu_only

N_GRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
GREEDY = {"max_tokens": 24}
LATE_LAYERS = 2
"""Of the profile below: of the others one has no window, and the other no codes that are rounded with feedback."""
PROFILE = """\
version: 1
layers: {0: K8V8, 1: K4V2, 2: K2V2, 3: K4V4}
transforms:
  key_offset: true
  key_hadamard: true
  value_hadamard: true
  key_round_feedback: true
  value_round_feedback: true
statics: statics.safetensors
recent_window: 24
recent_window_overrides: {3: 0}
attend_cached_prefill: true
"""


class Life(NamedTuple):
    """What an engine has done.

    Args:
        tokens: generated, per call and prompt.
        cached: prompt tokens that the prefix cache held, likewise.
        caches: bytes of all layers' caches when it ended, windows included.
        packed: how often so many layers were packed at the end of a step.
        counts: vLLM's counters.
    """

    tokens: list[list[tuple[int, ...]]]
    cached: list[list[int]]
    caches: dict[str, bytes]
    packed: Counter
    counts: Counter


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    numbers = np.random.default_rng(0)

    def feedback(transform):
        upper = np.triu(0.2 * numbers.normal(size=(2, 64, 64)), 1)
        return FeedbackStatics(upper + np.eye(64), {2: (0.8, 1.1), 4: (1.0,)}, (transform,))

    statics = {
        index: LayerStatics(
            key_offset=numbers.normal(size=(2, 64)).astype(np.float32),
            key_round_feedback=feedback("key_hadamard"),
            value_round_feedback=feedback("value_hadamard"),
        )
        for index in range(4)
    }
    save_statics(folder / "statics.safetensors", statics, {})
    (folder / "profile.yaml").write_text(PROFILE)
    return folder / "profile.yaml"


def live(model, profile, calls, options, at_once):
    """An engine's life, in a process of its own."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    # The compiled kernels always pack at once.
    os.environ["KVTUNER_CPU_KERNELS"] = "reference"
    import torch
    from vllm import LLM, SamplingParams

    from vllm_kvtuner.attention import impl
    from vllm_kvtuner.kernels.reference import kernels

    packed = Counter()

    def pack(layers):
        packed[len(layers)] += 1
        pack_rows_ref(layers)

    pack_rows_ref, kernels.pack_rows_ref = kernels.pack_rows_ref, pack
    if at_once:
        impl.step_packing = lambda config: None
    llm = LLM(
        str(model),
        kv_cache_dtype="kvtuner",
        additional_config={"kvtuner_profile": str(profile)},
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        disable_log_stats=False,
        **{"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True, **options},
    )
    answers = []
    for call in calls:
        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **call.sampling)
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in call.prompts]
        answers.append(llm.generate(prompts, sampling, use_tqdm=False))
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    counts = Counter()
    for metric in llm.get_metrics():
        counts[metric.name] += getattr(metric, "value", 0)
    return Life(
        [[tuple(answer.outputs[0].token_ids) for answer in call] for call in answers],
        [[answer.num_cached_tokens for answer in call] for call in answers],
        {name: layer.kv_cache.contiguous().view(torch.uint8).numpy().tobytes() for name, layer in layers.items()},
        packed,
        counts,
    )


def lives(model, profile, calls, **options):
    """Of an engine that packs tokens at the end of a step where it can, and of one that packs all at once."""
    both = []
    for at_once in (False, True):
        with ProcessPoolExecutor(1, fork_server()) as pool:
            both.append(pool.submit(live, model, profile, calls, options, at_once).result())
    late, once = both
    assert not once.packed
    assert late.tokens == once.tokens
    assert late.cached == once.cached
    assert late.caches.keys() == once.caches.keys()
    assert [name for name, cache in late.caches.items() if cache != once.caches[name]] == []
    return late


@pytest.fixture(scope="module")
def repetitive():
    """Prompts in which an n-gram is found again, so that tokens are drafted, and many rejected."""
    numbers = random.Random(1)
    phrases = [[numbers.randrange(10, 250) for _ in range(length)] for length in (3, 20)]
    return [(phrase * 100)[:200] for phrase in phrases]


def test_prefixes_that_are_found_and_requests_that_end(llama, prompts, profile):
    """Answers longer than the window, which read what earlier steps packed; then prompts that the cache holds."""
    late = lives(llama, profile, [Call(prompts, {"max_tokens": 150}), Call(prompts, GREEDY)], block_size=32)
    assert set(late.packed) == {LATE_LAYERS} and late.packed[LATE_LAYERS] >= 150 + 24 - 2
    assert max(late.cached[1]) > 0


@pytest.mark.parametrize("chunk", [1, 16, 100])
def test_chunked_prefill(llama, prompts, profile, chunk):
    """Steps with a chunk pack at once, beside decodes too; a chunk of one token is a decode's step."""
    options = {"max_num_seqs": 1} if chunk == 1 else {}
    late = lives(llama, profile, [Call(prompts[:5], GREEDY)], max_num_batched_tokens=chunk, **options)
    if chunk == 1:
        assert late.packed[LATE_LAYERS] == sum(map(len, prompts[:5])) + 5 * (GREEDY["max_tokens"] - 1)
    else:
        assert late.packed[LATE_LAYERS] >= GREEDY["max_tokens"] - 5


def test_preemption(llama, prompts, profile):
    late = lives(
        llama, profile, [Call(prompts[:2] * 6, {"max_tokens": 80})],
        block_size=32, max_model_len=96, max_num_batched_tokens=32, num_gpu_blocks_override=60,
        enable_prefix_caching=False,
    )  # fmt: skip
    assert late.counts["vllm:num_preemptions"] > 0
    assert late.packed[LATE_LAYERS] > 0


def test_drafts_that_are_rejected(llama, repetitive, profile):
    """A step packs all drafts, and the next ones write over what was rejected."""
    late = lives(llama, profile, [Call(repetitive, {"max_tokens": 60})] * 2, speculative_config=N_GRAM)
    drafted, accepted = (late.counts[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert 0 < accepted < drafted
    assert late.packed[LATE_LAYERS] > 0


def test_layers_in_several_cache_groups(gemma3, prompts, profile):
    """Sliding-window and full layers, and their windows, have slots of their own."""
    late = lives(gemma3, profile, [Call(prompts, {"max_tokens": 80})], block_size=32)
    assert late.packed[LATE_LAYERS] >= 80 - 1
