"""The newest tokens of every request are read from a second cache, however requests are scheduled; float32."""

import math
import shutil

import pytest

from tests.helpers import engine
from tests.helpers.compare import max_difference, mean_kl
from tests.helpers.engine import FULL_LOGPROBS, KV_CACHE_BYTES, Call, EngineRun, cpu_only
from tests.helpers.tiny_model import SLIDING_WINDOW
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes, recent_block_size, recent_blocks

pytestmark = cpu_only

TOKENS = 16
SEED = 7
SAMPLES = 3
MANY_TOKENS = 80
EXACT = 1e-4
"""Measured 1.2e-5."""
SCHEDULING_KL = 3e-5
"""Nats per token; measured 1.5e-5, without windows 5e-7: float32's rounding in another batch moves single codes."""
WINDOWS_KL = 1e-4
"""What the windows themselves make, at least."""
GREEDY = {"max_tokens": TOKENS, "logprobs": FULL_LOGPROBS}
SAMPLED = {"max_tokens": TOKENS, "temperature": 1.0, "logprobs": FULL_LOGPROBS}
BLOCK_SIZE, KV_HEADS, HEAD_SIZE, LAYERS = 128, 2, 64, 4
HADAMARD = "transforms: {key_hadamard: true, value_hadamard: true}\nattend_cached_prefill: true\n"
PROFILES = {
    "windows of 16 bits": (
        "layers: {0: K8V8, 1-3: K4V4}\nrecent_window: 24\nrecent_window_overrides: {0: 0, 3: 70}\n",
        "layers: {0: K8V8, 1-3: K4V4}\n",
    ),
    "windows and sink tokens of 8 bits, an unquantized layer": (
        "layers: {0: K8V8, 1: K4V4, 2: K16V16, 3: K8V4}\nrecent_window: 40\nrecent_window_bits: 8\nsink_tokens: 4\n",
        "layers: {0: K8V8, 1: K4V4, 2: K16V16, 3: K8V4}\n",
    ),
    "sink tokens": (
        "layers: {0: K8V8, 1-3: K4V4}\nrecent_window: 24\nsink_tokens: 16\n",
        "layers: {0: K8V8, 1-3: K4V4}\nrecent_window: 24\n",
    ),
}
"""With windows or sink tokens, and the same without."""


def run_engine(model, *calls, **options):
    """An engine whose blocks have vLLM's own size for a CPU unless a test gives one: windows fill them worst."""
    return engine.run_engine(model, *calls, **{"block_size": BLOCK_SIZE, **options})


def write(folder, text):
    path = folder / "profile.yaml"
    path.write_text(f"version: 1\n{text}")
    return path


@pytest.mark.parametrize(("window", "sink_tokens"), [(512, 0), (304, 12)])
@pytest.mark.parametrize("attend", [True, False])
def test_a_window_of_the_whole_context_is_the_unquantized_cache(llama, prompts, tmp_path, attend, window, sink_tokens):
    """Cold, and from the prefix cache. Sink tokens make up for what the longest request is longer than the window."""
    profile = write(tmp_path, f"layers: K2V2\nrecent_window: {window}\nsink_tokens: {sink_tokens}\n")
    assert max(map(len, prompts)) + TOKENS <= window + sink_tokens
    calls = [Call(prompts, GREEDY, together=False), Call(prompts, GREEDY)]
    auto = run_engine(llama, calls, max_model_len=512)
    run = run_engine(llama, calls, profile=profile, attend_cached_prefill=attend, max_model_len=512)
    assert max(answer.cached_tokens for answer in run.answers[1]) == 2 * BLOCK_SIZE
    for mine, expected in zip([a for c in run.answers for a in c], [a for c in auto.answers for a in c], strict=True):
        assert mine.token_ids == expected.token_ids
        assert max_difference(mine.logprobs, expected.logprobs) < EXACT


@pytest.mark.parametrize(("window", "sink_tokens"), [(512, 0), (304, 12)])
def test_short_prefills_read_the_window(llama, prompts, tmp_path, window, sink_tokens):
    """Prompts in chunks of at most 16 tokens, which are decoded once they have a context."""
    profile = write(tmp_path, f"layers: K2V2\nrecent_window: {window}\nsink_tokens: {sink_tokens}\n")
    options = {"max_model_len": 512, "enable_prefix_caching": False}
    auto = run_engine(llama, [Call(prompts, GREEDY)], **options)
    run = run_engine(
        llama,
        [Call(prompts, GREEDY)],
        profile=profile,
        attend_cached_prefill=False,
        max_num_batched_tokens=16,
        **options,
    )
    for mine, expected in zip(run.answers[0], auto.answers[0], strict=True):
        assert mine.token_ids == expected.token_ids
        assert max_difference(mine.logprobs, expected.logprobs) < EXACT


def test_a_window_makes_two_bits_usable(llama, prompts, tmp_path):
    """Nearer to the unquantized cache with every token of the window, in prefill and in decode."""
    calls = [Call(prompts[-2:], {**GREEDY, "prompt_logprobs": FULL_LOGPROBS})]

    def run(window):
        return run_engine(llama, calls, profile=write(tmp_path, f"layers: K2V2\n{HADAMARD}recent_window: {window}\n"))

    def divergence(run: EngineRun):
        forced = [prompt + list(a.token_ids) for prompt, a in zip(prompts[-2:], run.answers[0], strict=True)]
        truth = run_engine(llama, [Call(forced, {"max_tokens": 1, "prompt_logprobs": FULL_LOGPROBS})])
        pairs = zip(truth.answers[0], run.answers[0], strict=True)
        both = [
            (
                mean_kl(expected.prompt_logprobs[:-TOKENS], mine.prompt_logprobs),
                mean_kl(expected.prompt_logprobs[-TOKENS:], mine.logprobs),
            )
            for expected, mine in pairs
        ]
        return [sum(each) / len(both) for each in zip(*both, strict=True)]

    without, short, long = (divergence(run(window)) for window in (0, 32, 128))
    for part in range(2):
        assert long[part] < short[part] < without[part]


def each_alone(prompts):
    """The truth: greedy, the samples of one prompt as requests with a seed each, and many tokens of short prompts."""
    return [
        Call(prompts, GREEDY, together=False),
        *(Call(prompts[-1:], {**SAMPLED, "seed": SEED + sample}) for sample in range(SAMPLES)),
        Call(prompts[:2], {**GREEDY, "max_tokens": MANY_TOKENS}, together=False),
    ]


@pytest.fixture(scope="module", params=PROFILES.values(), ids=PROFILES.keys())
def profiles(request, tmp_path_factory):
    return [write(tmp_path_factory.mktemp("profile"), text + HADAMARD) for text in request.param]


@pytest.fixture(scope="module")
def profile(profiles):
    return profiles[0]


@pytest.fixture(scope="module")
def alone(llama, prompts, profile):
    return run_engine(llama, each_alone(prompts), profile=profile, enable_prefix_caching=False)


def test_windows_are_read(llama, prompts, profiles, alone):
    """So that what follows would see them missed."""
    plain = run_engine(llama, [Call(prompts[-1:], GREEDY)], profile=profiles[1])
    assert mean_kl(alone.answers[0][-1].logprobs[:1], plain.answers[0][0].logprobs[:1]) > WINDOWS_KL


def check(answers, truth):
    for mine, expected in zip(answers, truth, strict=True):
        assert mine.token_ids == expected.token_ids
        assert mean_kl(expected.logprobs, mine.logprobs) < SCHEDULING_KL


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
    # Hits end where whole blocks of all groups do; unequal pages beside an unquantized layer have long blocks here.
    alignment = math.lcm(*(block_size for _, block_size in run.groups))
    assert [answer.cached_tokens for answer in cold] == [0] * len(prompts)
    assert [a.cached_tokens for a in warm] == [(len(prompt) - 1) // alignment * alignment for prompt in prompts]
    for answers in (cold, warm, batch):
        check(answers, alone.answers[0])
    check(samples, [call[0] for call in alone.answers[1 : SAMPLES + 1]])
    assert len({answer.token_ids for answer in samples}) == SAMPLES


@pytest.mark.parametrize("chunk", [16, 100])
def test_chunked_prefill_beside_decodes(llama, prompts, profile, alone, chunk):
    run = run_engine(
        llama, [Call(prompts, GREEDY)], profile=profile, enable_prefix_caching=False, max_num_batched_tokens=chunk
    )
    check(run.answers[0], alone.answers[0])


def test_prefill_is_what_serving_token_by_token_gives(llama, prompts, profile, alone):
    """Every token of the prompts goes the way of decode."""
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "enable_prefix_caching": False}
    run = run_engine(llama, [Call(prompts[1:3], GREEDY)], profile=profile, **options)
    check(run.answers[0], alone.answers[0][1:3])


def test_preemption(llama, prompts, profile, alone):
    """A cache too small for all: requests lose the blocks of both caches, and are computed again."""
    run = run_engine(
        llama,
        [Call(prompts[:2] * 6, {**GREEDY, "max_tokens": MANY_TOKENS})],
        profile=profile,
        block_size=32,
        max_model_len=96,
        max_num_batched_tokens=32,
        num_gpu_blocks_override=60,
        enable_prefix_caching=False,
    )
    assert run.preemptions > 0
    check(run.answers[0], alone.answers[-1] * 6)


@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_sliding_window_layers(gemma3, prompts, tmp_path, sink_tokens):
    """Recent windows within the sliding windows of Gemma's layers, which sink tokens leave; chunks that cross both."""
    profile = write(tmp_path, f"layers: K4V4\nrecent_window: 24\nsink_tokens: {sink_tokens}\n{HADAMARD}")
    calls = [Call(prompts, GREEDY)]
    whole = run_engine(gemma3, calls, profile=profile)
    warm = run_engine(gemma3, [*calls, *calls], profile=profile, block_size=32)
    chunked = run_engine(gemma3, calls, profile=profile, max_num_batched_tokens=48)
    stepped = run_engine(gemma3, calls, profile=profile, max_num_seqs=1, max_num_batched_tokens=1)
    for answers in (chunked.answers[0], stepped.answers[0], *warm.answers):
        check(answers, whole.answers[0])
    assert max(answer.cached_tokens for answer in warm.answers[1]) > SLIDING_WINDOW


@pytest.mark.parametrize(
    ("pair", "window", "bits", "sink_tokens"),
    [("K4V4", 64, 16, 0), ("K4V2", 40, 8, 4), ("K2V2", 200, 16, 4)],
)
def test_capacity_is_what_the_layout_says(llama, tmp_path, pair, window, bits, sink_tokens):
    """The packed pages set the size of a block; a request takes packed blocks and those of its recent windows."""
    settings = f"recent_window: {window}\nrecent_window_bits: {bits}\nsink_tokens: {sink_tokens}\n"
    profile = write(tmp_path, f"layers: {pair}\n{settings}")
    length = 1024
    run = run_engine(llama, profile=profile, dtype="bfloat16", max_model_len=length, max_num_batched_tokens=8192)
    block_bytes = BLOCK_SIZE * LAYERS * KV_HEADS * content_bytes(PrecisionPair.parse(pair), HEAD_SIZE)
    token_bytes = KV_HEADS * content_bytes(PrecisionPair(bits, bits), HEAD_SIZE)
    size = recent_block_size(BLOCK_SIZE, block_bytes, LAYERS * token_bytes)
    layers_per_block = block_bytes // (size * token_bytes)
    groups = math.ceil(LAYERS / layers_per_block)

    assert run.num_gpu_blocks == KV_CACHE_BYTES // block_bytes
    assert run.allocated_bytes == run.num_gpu_blocks * block_bytes
    assert run.groups[0] == (LAYERS, BLOCK_SIZE)
    assert len(run.groups) == 1 + groups
    assert run.managers == ("FullAttentionManager", *["RecentManager"] * groups)
    assert {block_size for _, block_size in run.groups[1:]} == {size}
    held = groups * (recent_blocks(window, size) + (sink_tokens > 0))
    assert run.kv_cache_size_tokens == int(run.num_gpu_blocks / (length // BLOCK_SIZE + held) * length)
    tokens = f"{window} tokens and the first {sink_tokens}" if sink_tokens else f"{window} tokens"
    assert f"up to {held * block_bytes:,} more per request for recent windows of {tokens} in {bits} bits" in run.log


@pytest.mark.parametrize(("sink_tokens", "blocks"), [(0, 100), (4, 118)])
def test_as_many_requests_run_as_the_capacity_says(llama, prompts, tmp_path, sink_tokens, blocks):
    """All prompts arrive at once, in chunks that are much longer than the window, and none is preempted."""
    profile = write(tmp_path, f"layers: K4V4\nrecent_window: 24\nsink_tokens: {sink_tokens}\n")
    length = 384
    run = run_engine(
        llama,
        [Call([[index, *prompts[-1]] for index in range(10, 26)], {"max_tokens": length - len(prompts[-1]) - 1})],
        profile=profile,
        enable_prefix_caching=False,
        max_model_len=length,
        max_num_batched_tokens=8192,
        num_gpu_blocks_override=blocks,
    )
    (_, block_size) = run.groups[1]
    each = length // BLOCK_SIZE + recent_blocks(24, block_size) + (sink_tokens > 0)
    assert run.kv_cache_size_tokens // length == blocks // each == len(run.answers[0])
    assert run.preemptions == 0


def test_refuses_a_cache_that_a_prompt_in_flight_overfills(llama, tmp_path):
    profile = write(tmp_path, "layers: K4V4\nrecent_window: 200\n")
    with pytest.raises(
        ValueError, match=r"must have at least \d+ blocks for a prompt of max_model_len \(1024\) tokens"
    ):
        run_engine(llama, profile=profile, num_gpu_blocks_override=30)


def test_refuses_sink_tokens_beside_a_kv_connector(llama, tmp_path):
    profile = write(tmp_path, "layers: K4V4\nrecent_window: 64\nsink_tokens: 4\n")
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(ValueError, match=r"sink_tokens must be 0 with a KV connector, .*, but got 4"):
        run_engine(llama, profile=profile, kv_transfer_config=connector)


@pytest.fixture(scope="module")
def weightless(gemma3, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weightless") / "gemma3"
    shutil.copytree(gemma3, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_refuses_a_window_that_leaves_nothing_packed(weightless, tmp_path):
    profile = write(tmp_path, f"layers: K4V4\nrecent_window: {SLIDING_WINDOW}\n")
    with pytest.raises(ValueError, match=f"layer 0: recent_window must be less than .* {SLIDING_WINDOW} tokens"):
        run_engine(weightless, profile=profile)


def test_refuses_one_allocator_for_all(weightless, tmp_path):
    profile = write(tmp_path, "layers: K4V4\nrecent_window: 16\n")
    with pytest.raises(ValueError, match="disable_hybrid_kv_cache_manager must be false with a recent_window"):
        run_engine(weightless, profile=profile, disable_hybrid_kv_cache_manager=True)
