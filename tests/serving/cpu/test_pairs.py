"""A pair alone, in engines: what it takes from the model's own weights, and the window at a small share of memory."""

import shutil

import pytest
import torch

from kvtuner_tools.bias_offset import key_offsets
from kvtuner_tools.calibration.key_statics import PairLayout
from tests.helpers.compare import mean_kl
from tests.helpers.engine import FULL_LOGPROBS, Call, cpu_only, run_engine
from tests.helpers.tiny_model import make_tiny_model
from vllm_kvtuner.engine.key_bias import PAIRS_STEP
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes
from vllm_kvtuner.profile.statics import LayerStatics, save_statics

pytestmark = cpu_only

KV_HEADS, HEAD_SIZE = 2, 64
MEMORY = 256 << 20
GAIN = 4
"""How many times smaller the treatment makes K4V4's KL on Qwen2 at least; measured KLs are in the test's failure."""


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", max_model_len=8192)


def calls(prompts):
    return [Call(prompts, {"max_tokens": 8, "logprobs": FULL_LOGPROBS, "prompt_logprobs": FULL_LOGPROBS})]


def test_an_offset_of_the_weights_is_that_of_the_checkpoint(qwen2, prompts, tmp_path):
    def largest(offset):
        return PairLayout(offset.shape[1], is_neox=True).largest_pairs(torch.from_numpy(offset), PAIRS_STEP).numpy()

    offsets = key_offsets(str(qwen2))
    statics = {layer: LayerStatics(key_offset=largest(each.key_offset)) for layer, each in offsets.items()}
    save_statics(tmp_path / "statics.safetensors", statics, {})
    runs = {}
    for source, files in (("true", "statics: statics.safetensors\n"), ("from_weights", "")):
        profile = tmp_path / f"{source}.yaml"
        profile.write_text(
            f"version: 1\nlayers: K4V2\n{files}transforms: {{key_offset: {source}, key_hadamard: true}}\n"
        )
        runs[source] = run_engine(qwen2, calls(prompts[-2:]), profile=profile, attend_cached_prefill=True)
    assert "kvtuner key offset from weights, layers 0-3: in 8 RoPE pairs" in runs["from_weights"].log
    for one, other in zip(runs["true"].answers[0], runs["from_weights"].answers[0], strict=True):
        assert one.token_ids == other.token_ids
        assert (one.prompt_logprobs == other.prompt_logprobs).all()


def test_a_pair_is_far_better_than_its_bare_format(qwen2, prompts):
    prompts = prompts[-2:]
    auto, *runs = (
        run_engine(qwen2, calls(prompts), profile=spec, attend_cached_prefill=None if spec is None else True)
        for spec in (None, "K4V4", "K4V4:plain")
    )
    pair, plain = (
        sum(
            mean_kl(expected.prompt_logprobs, got.prompt_logprobs)
            for expected, got in zip(auto.answers[0], run.answers[0], strict=True)
        )
        for run in runs
    )
    assert "round feedback of keys from weights, layers 0-3: of the q projection and its input's norm" in runs[0].log
    print("KL", pair, plain)
    assert pair < plain / GAIN, (pair, plain)


@pytest.mark.parametrize(("max_model_len", "share"), [(1024, 0.10), (8192, 0.03)])
def test_the_window_takes_a_small_share_and_is_counted(long_llama, max_model_len, share):
    options = {"dtype": "bfloat16", "kv_cache_memory_bytes": MEMORY, "max_model_len": max_model_len}
    run = run_engine(long_llama, profile="K4V4", **options)
    assert "RecentManager" in run.managers
    packed = MEMORY // (4 * KV_HEADS * content_bytes(PrecisionPair(4, 4), HEAD_SIZE))
    assert 0 < packed / run.kv_cache_size_tokens - 1 < share
    assert f" {run.kv_cache_size_tokens:,} KV tokens fit, " in run.log
    assert "; without a recent window of 64 tokens and the first 4 in 16 bits, since it would take" in run.log


def test_auto_takes_the_models_own_profile(llama, tmp_path):
    """Which is what a run without a profile asks for."""
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "kvtuner").mkdir()
    (model / "kvtuner" / "mine.yaml").write_text("version: 1\nlayers: K2V4\n")
    run = run_engine(model, kv_cache_dtype="kvtuner")
    mine = model / "kvtuner" / "mine.yaml"
    assert f"kvtuner profile auto -> {mine} (the model's folder): 3.000 nominal bits, 3.500 stored bits" in run.log


def test_sliding_window_layers_have_a_shorter_window(gemma3):
    log = run_engine(gemma3, profile="K4V4", max_model_len=4096).log
    assert "recent windows of 16 tokens in 8 bits" in log
    assert "since layers have a sliding window of 64 tokens" in log
