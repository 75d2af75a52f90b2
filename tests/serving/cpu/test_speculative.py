"""Speculative decoding changes no text, whatever is drafted; float32, so that batches of other shapes round alike."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.engine import Call, cpu_only, run_engine
from tests.helpers.tiny_model import make_eagle_head

pytestmark = cpu_only

GREEDY = {"max_tokens": 48}
N_GRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
PROFILES = {
    "8 bits": "layers: K8V8\n",
    "unequal layers": "layers: {0: K8V8, 1: K4V4, 2: K16V16, 3: K8V4}\ntransforms: {key_hadamard: true}\n",
}
WINDOWS = "layers: {0: K8V8, 1-3: K4V4}\nrecent_window: 24\n"
NOISE = 0.002
"""Standard deviation of what makes a draft model of the target, whose weights have 0.08."""
ACCEPTANCE = 0.08
"""By how much the share of accepted tokens may differ from the unquantized cache's, whose text is another."""


def write(folder, text):
    path = folder / "profile.yaml"
    path.write_text(f"version: 1\n{text}attend_cached_prefill: true\n")
    return path


@pytest.fixture(scope="module", params=PROFILES.values(), ids=PROFILES.keys())
def profile(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("profile"), request.param)


@pytest.fixture(scope="module")
def similar(llama, tmp_path_factory):
    """The target with a little noise in its weights: a draft that is often right, and often not."""
    folder = tmp_path_factory.mktemp("models") / "similar"
    shutil.copytree(llama, folder)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: (weight + NOISE * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def eagle(llama, tmp_path_factory):
    return make_eagle_head(llama, tmp_path_factory.mktemp("models") / "eagle")


@pytest.fixture(scope="module")
def calls(prompts):
    """Twice, so that the second reads the prefix cache; prompts that repeat themselves have tokens to look up."""
    numbers = random.Random(1)
    phrases = [[numbers.randrange(10, 250) for _ in range(length)] for length in (3, 20)]
    return [Call([*prompts, *((phrase * 100)[:200] for phrase in phrases)], GREEDY)] * 2


@pytest.fixture(scope="module")
def without(llama, calls, profile):
    return run_engine(llama, calls, profile=profile)


def drafted_by(model, **settings):
    return {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3, **settings}


def headed_by(model):
    return {"method": "eagle", "model": str(model), "num_speculative_tokens": 2}


def check_text(run, without):
    """Drafted tokens were accepted, others rejected and their bytes written over, and nothing else has changed."""
    assert run.tokens == without.tokens
    assert 0 < run.accepted < run.drafted
    assert max(answer.cached_tokens for answer in run.answers[1]) >= run.block_size


def share(run):
    return run.accepted / run.drafted


def test_tokens_looked_up(llama, calls, profile, without):
    check_text(run_engine(llama, calls, profile=profile, speculative_config=N_GRAM), without)


def test_tokens_of_a_draft_model(llama, similar, calls, profile, without):
    """They are accepted as often as with the unquantized cache, and the draft model's own layers are unquantized."""
    run = run_engine(llama, calls, profile=profile, speculative_config=drafted_by(similar))
    check_text(run, without)
    auto = run_engine(llama, calls, speculative_config=drafted_by(similar))
    assert share(run) == pytest.approx(share(auto), abs=ACCEPTANCE)
    assert run.page_bytes[:4] == without.page_bytes
    assert run.page_bytes[4:] == auto.page_bytes[4:]


def test_tokens_of_an_eagle_head(llama, eagle, calls, profile, without):
    run = run_engine(llama, calls, profile=profile, speculative_config=headed_by(eagle))
    check_text(run, without)
    assert len(run.page_bytes) == 5
    assert run.page_bytes[4] == 128 * 2 * 2 * 64 * 4


def test_a_draft_model_from_the_targets_folder_is_not_quantized(llama, calls):
    """Its layers have the target's numbers. What it drafts is right as far as the target's cache is exact."""
    run = run_engine(llama, calls, profile="K4V4:plain", speculative_config=drafted_by(llama))
    auto = run_engine(llama, calls, speculative_config=drafted_by(llama))
    assert run.page_bytes[4:] == auto.page_bytes[4:]
    assert share(auto) > 0.95 > share(run)
    line = next(line for line in run.log.splitlines() if "kvtuner profile" in line)
    assert "padding" not in line


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    return write(tmp_path_factory.mktemp("profile"), WINDOWS)


@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_recent_windows(llama, eagle, calls, tmp_path, sink_tokens):
    windows = write(tmp_path, f"{WINDOWS}sink_tokens: {sink_tokens}\n")
    plain, looked_up, headed = (
        run_engine(llama, calls, profile=windows, speculative_config=each) for each in (None, N_GRAM, headed_by(eagle))
    )
    check_text(looked_up, plain)
    assert headed.tokens == plain.tokens
    assert 0 < headed.accepted < headed.drafted


def test_sliding_window_layers_beside_full_ones(gemma3, calls):
    options = {"profile": "K8V8:plain", "attend_cached_prefill": True}
    check_text(*(run_engine(gemma3, calls, **options, speculative_config=each) for each in (N_GRAM, None)))


@pytest.mark.parametrize("groups", ["sliding-window layers", "recent windows"])
def test_a_draft_model_beside_several_groups_is_refused(llama, gemma3, windows, groups):
    """vLLM 0.32.0 would write what it drafts into other requests' blocks: its own caches give wrong text there."""
    model, profile = (gemma3, "K8V8:plain") if groups == "sliding-window layers" else (llama, windows)
    with pytest.raises(ValueError, match="speculative decoding must do without a draft model"):
        run_engine(model, profile=profile, speculative_config=drafted_by(llama))


def test_more_tokens_than_the_decode_kernel_takes_are_refused(llama):
    with pytest.raises(ValueError, match=r"num_speculative_tokens must be at most 15 .*, but got 16"):
        run_engine(llama, profile="K8V8:plain", speculative_config=N_GRAM | {"num_speculative_tokens": 16})
