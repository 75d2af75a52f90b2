"""Prompts with pictures, against the unquantized cache, in float32."""

import pytest
import torch

from tests.helpers.compare import mean_kl
from tests.helpers.engine import FULL_LOGPROBS, Call, cpu_only, run_engine
from tests.helpers.pictures import (
    GEMMA_EXPANDED,
    GEMMA_PICTURE,
    PICTURE,
    gemma3_logprobs,
    make_gemma3_vision,
    make_qwen2_5_vl,
    picture,
)

pytestmark = cpu_only

TOKENS = 8
OFFSET = "version: 1\nlayers: K8V8\nattend_cached_prefill: true\ntransforms: {key_offset: from_weights}\n"
"""Prefill reads the cache too, so that an answer's first token tells."""
OFFSET_KL = 2e-3
"""Measured 6e-4; with an offset that turns by tokens' places, as in text alone, 1.1e-2, and without one 1.9e-2."""

BOTH_WAYS_KL = 4e-5
"""Measured 1.3e-5. With causal pictures, as vLLM's own cache on CPUs has them, 6e-4."""


@pytest.fixture(scope="module")
def qwen2_5_vl(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("models") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def asked(prompts):
    """Text before and after pictures, two pictures in a row, and text alone, twice: the prefix cache has them then."""
    tall, wide = picture(224, 84, 0), picture(56, 168, 1)
    text = prompts[2]
    mixed = [[*text[:40], *PICTURE, *text[40:70]], [*PICTURE, *text[:20], *PICTURE, *text[20:60]], text[:90]]
    call = Call(mixed, {"max_tokens": TOKENS, "logprobs": FULL_LOGPROBS}, pictures=[[tall], [tall, wide], []])
    return [call, call]


def divergences(run, expected):
    """KL of each answer from the expected one, as far as both have seen the same tokens."""
    for answers, wanted in zip(run.answers, expected.answers, strict=True):
        for answer, other in zip(answers, wanted, strict=True):
            pairs = zip(answer.token_ids, other.token_ids, strict=True)
            same = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), TOKENS - 1)
            yield mean_kl(other.logprobs[: same + 1], answer.logprobs[: same + 1])


def test_a_key_offset_under_m_rope(qwen2_5_vl, asked, tmp_path):
    """Chunked prompts, hits of the prefix cache and decoding all give back each token's own rotation."""
    (tmp_path / "offset.yaml").write_text(OFFSET)
    options = {"block_size": 32, "max_num_batched_tokens": 80, "skip_mm_profiling": True}
    options["limit_mm_per_prompt"] = {"image": 2, "video": 0}
    expected = run_engine(qwen2_5_vl, asked, **options)
    run = run_engine(qwen2_5_vl, asked, profile=tmp_path / "offset.yaml", **options)
    assert all(answer.cached_tokens >= 64 for answer in run.answers[1])
    assert max(divergences(run, expected)) < OFFSET_KL


def test_pictures_that_attend_in_both_directions(prompts, tmp_path):
    """Gemma 3 against transformers, since vLLM's own cache on CPUs is causal; then a hit that ends in a picture."""
    model = make_gemma3_vision(tmp_path / "gemma3", torch.float32)
    pictures, text = [picture(60, 80, 0), picture(90, 40, 1)], prompts[5]
    parts = [[256, *text[:50]], text[50:68], text[68:78]]
    (asked, expanded) = ([*parts[0], *each, *parts[1], *each, *parts[2]] for each in (GEMMA_PICTURE, GEMMA_EXPANDED))
    call = Call([asked], {"max_tokens": TOKENS, "logprobs": FULL_LOGPROBS}, pictures=[pictures])
    options = {
        "limit_mm_per_prompt": {"image": 2},
        "skip_mm_profiling": True,
        "block_size": 32,
        "max_num_batched_tokens": 64,
    }
    run = run_engine(model, [call, call], profile="K8V8:plain", **options)
    (first,), (again,) = run.answers
    expected = gemma3_logprobs(model, [*expanded, *first.token_ids[:-1]], pictures)[len(expanded) - 1 :]
    assert again.cached_tokens == 96 and again.token_ids == first.token_ids
    assert max(mean_kl(expected, answer.logprobs) for answer in (first, again)) < BOTH_WAYS_KL
