"""Prompts with pictures, against the unquantized cache, in float32."""

import pytest

from tests.helpers.compare import mean_kl
from tests.helpers.engine import FULL_LOGPROBS, Call, cpu_only, run_engine
from tests.helpers.pictures import PICTURE, make_qwen2_5_vl, picture

pytestmark = cpu_only

TOKENS = 8
OFFSET = "version: 1\nlayers: K8V8\nattend_cached_prefill: true\ntransforms: {key_offset: from_weights}\n"
"""Prefill reads the cache too, so that an answer's first token tells."""
OFFSET_KL = 2e-3
"""Measured 6e-4; with an offset that turns by tokens' places, as in text alone, 1.1e-2, and without one 1.9e-2."""


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
    options = {"limit_mm_per_prompt": {"image": 2, "video": 0}, "block_size": 32, "max_num_batched_tokens": 80}
    expected = run_engine(qwen2_5_vl, asked, **options)
    run = run_engine(qwen2_5_vl, asked, profile=tmp_path / "offset.yaml", **options)
    assert all(answer.cached_tokens >= 64 for answer in run.answers[1])
    assert max(divergences(run, expected)) < OFFSET_KL
