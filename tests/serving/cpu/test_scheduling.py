"""However requests are scheduled, they give what each gives alone: float32, packed layers beside an unquantized one."""

import pytest

from tests.helpers.compare import max_difference
from tests.helpers.engine import FULL_LOGPROBS, Call, cpu_only, run_engine
from vllm_kvtuner.blocks import allocation

pytestmark = cpu_only

PROFILE = """\
version: 1
layers: {0: K8V8, 1: K4V4, 2: K16V16, 3: K8V4}
transforms: {key_hadamard: true, value_hadamard: true, range_search: true}
attend_cached_prefill: true
"""
TOKENS = 16
SEED = 7
SAMPLES = 3
LOGPROB_TOLERANCE = 2e-3
"""Measured 3.4e-4, where float32's rounding in another batch moves a single code; without it 6e-5."""
EXACT = 1e-4
"""Measured 8e-6."""
FIRST_CHUNK = 0.03
"""What a first chunk of 16 tokens moves log-probabilities by where it does not read back 8 bits; measured 0.0084."""
QUANTIZATION = 0.05
"""What the layers' bits move some log-probability by, at least; measured 0.18 with some of 4 and 0.09 with 8 alone."""

GREEDY = {"max_tokens": TOKENS, "logprobs": FULL_LOGPROBS}
SAMPLED = {"max_tokens": TOKENS, "temperature": 1.0, "logprobs": FULL_LOGPROBS}


def each_alone(prompts):
    """The truth: greedy, and the samples of one prompt as requests with a seed each."""
    return [
        Call(prompts, GREEDY, together=False),
        *(Call(prompts[-1:], {**SAMPLED, "seed": SEED + sample}) for sample in range(SAMPLES)),
    ]


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.yaml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(scope="module")
def alone(llama, prompts, profile):
    return run_engine(llama, each_alone(prompts), profile=profile, enable_prefix_caching=False)


def check(answers, truth):
    for mine, expected in zip(answers, truth, strict=True):
        assert mine.token_ids == expected.token_ids
        assert max_difference(mine.logprobs, expected.logprobs) < LOGPROB_TOLERANCE


def test_prefix_cache(llama, prompts, profile, alone):
    """Cold, warm, and all at once; the samples of one prompt share its blocks."""
    run = run_engine(
        llama,
        [
            Call(prompts, GREEDY, together=False),
            Call(prompts, GREEDY, together=False),
            Call(prompts, GREEDY),
            Call(prompts[-1:], {**SAMPLED, "n": SAMPLES, "seed": SEED}),
        ],
        profile=profile,
    )
    cold, warm, batch, samples = run.answers
    assert all(answer.cached_tokens == 0 for answer in cold)
    # The newest token is always computed, so a prompt of one block hits nothing.
    hits = [(len(prompt) - 1) // run.block_size * run.block_size for prompt in prompts]
    assert [answer.cached_tokens for answer in warm] == hits
    assert max(hits) == 2 * run.block_size
    for answers in (cold, warm, batch):
        check(answers, alone.answers[0])
    check(samples, [call[0] for call in alone.answers[1:]])
    assert len({answer.token_ids for answer in samples}) == SAMPLES


@pytest.mark.parametrize("chunk", [16, 100])
def test_chunked_prefill_beside_decodes(llama, prompts, profile, alone, chunk):
    """Prefills in chunks, of which some end within a block, in batches with the decodes of shorter prompts."""
    run = run_engine(
        llama, [Call(prompts, GREEDY)], profile=profile, enable_prefix_caching=False, max_num_batched_tokens=chunk
    )
    check(run.answers[0], alone.answers[0])


def test_preemption(llama, prompts, profile, alone):
    """A cache too small for all: requests lose their blocks, and are computed again."""
    run = run_engine(
        llama,
        [Call(prompts[:-1] * 4, GREEDY)],
        profile=profile,
        block_size=32,
        max_model_len=160,
        # 20 blocks of two heads with 64 numbers; the unquantized layer's are float32.
        kv_cache_memory_bytes=20 * 32 * 2 * (136 + 72 + 512 + 104),
        enable_prefix_caching=False,
    )
    assert run.num_gpu_blocks == 20
    assert run.preemptions > 0
    check(run.answers[0], alone.answers[0][:-1] * 4)


def test_steps_that_need_no_blocks_are_not_asked(llama, prompts, alone):
    """And an engine with vLLM's own cache allocates as it would without this project."""
    auto = run_engine(llama, [Call(prompts[:1], {"max_tokens": 2})])
    assert auto.plugin_loaded
    assert (alone.allocator, auto.allocator) == (allocation.__name__, "vllm.v1.core.kv_cache_manager")


def test_without_reading_back_prefill_is_exact(llama, prompts, profile, alone):
    """A prompt of more than one token then attends to its own keys and values, not to their packed copies."""
    run = run_engine(llama, [Call(prompts[1:], GREEDY)], profile=profile, attend_cached_prefill=False)
    auto = run_engine(llama, [Call(prompts[1:], GREEDY)])
    for mine, exact, read_back in zip(run.answers[0], auto.answers[0], alone.answers[0][1:], strict=True):
        assert max_difference(mine.logprobs[0], exact.logprobs[0]) < EXACT
        assert max_difference(mine.logprobs[0], read_back.logprobs[0]) > QUANTIZATION
        assert max_difference(mine.logprobs[1], exact.logprobs[1]) > QUANTIZATION


def test_short_prefills_read_what_is_stored(llama, prompts, tmp_path):
    """Prompts in chunks of at most 16 tokens: once they have a context, those are decoded and read their own tokens
    from the pages too. So only the first chunk tells them from a prefill that reads back what it stored."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 1\nlayers: K8V8\n")

    def first_token(attend_cached_prefill, **options):
        calls = [Call(prompts[-1:], {**GREEDY, "max_tokens": 1})]
        options |= {"enable_prefix_caching": False, "attend_cached_prefill": attend_cached_prefill}
        return run_engine(llama, calls, profile=profile, **options).answers[0][0].logprobs

    short = first_token(False, max_num_batched_tokens=16)
    assert max_difference(short, first_token(True)) < FIRST_CHUNK
    assert max_difference(short, first_token(False)) > QUANTIZATION
