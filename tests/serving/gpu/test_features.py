"""Speculative decoding, sleep and wake, KV connectors and LoRA on a GPU: text is what it is without them."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.gpu_engine import LOGPROB_TOLERANCE, Engine, assert_alike
from tests.helpers.tiny_model import make_eagle_head, make_lora_adapter, make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("in_process")]

LORA = {"enable_lora": True, "max_lora_rank": 8}
TRANSFORMS = "transforms: {key_hadamard: true, value_hadamard: true}\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", head_size=128)


@pytest.fixture(scope="module")
def prompts():
    numbers = random.Random(0)
    phrase = [numbers.randrange(10, 250) for _ in range(20)]
    return [[numbers.randrange(10, 250) for _ in range(length)] for length in (17, 130, 300, 511)] + [phrase * 10]


@pytest.fixture(scope="module")
def plain(llama, prompts, in_process):
    """Answers without any feature."""
    with Engine(llama) as engine:
        return engine.ask(prompts)[0]


@pytest.mark.parametrize("method", ["n-gram", "the model itself", "an EAGLE head"])
def test_speculative_decoding(llama, prompts, plain, method, tmp_path):
    """In full CUDA graphs of verifications. The model drafts for itself with an unquantized cache: most is accepted."""
    speculative = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 4}
    if method == "n-gram":
        speculative = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    elif method == "an EAGLE head":
        head = make_eagle_head(llama, tmp_path / "eagle")
        speculative = {"method": "eagle", "model": str(head), "num_speculative_tokens": 2}
    with Engine(llama, speculative_config=speculative, disable_log_stats=False) as engine:
        for _ in range(2):
            answers, _ = engine.ask(prompts)
            assert_alike(answers, plain)
        drafted = engine.counter("vllm:spec_decode_num_draft_tokens")
        accepted = engine.counter("vllm:spec_decode_num_accepted_tokens")
    assert accepted > 0
    if method == "the model itself":
        assert accepted / drafted > 0.5
    else:
        assert accepted < drafted


def test_sleep_and_wake(llama, prompts):
    """Level 2 forgets what was allocated while the model loaded, the decode kernel's scratch too.

    One engine for both, since a process can hold one engine that sleeps.
    """
    with Engine(llama, enable_sleep_mode=True) as engine:
        truth, _ = engine.ask(prompts)
        for level in (1, 1, 2, 2):
            engine.llm.sleep(level)
            engine.llm.wake_up()
            if level == 2:
                engine.llm.collective_rpc("reload_weights")
            answers, cached = engine.ask(prompts)
            assert cached == [0] * len(prompts)
            assert_alike(answers, truth)


def test_cpu_offload_brings_pages_back(llama, prompts):
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    connector["kv_connector_extra_config"] = {"cpu_bytes_to_use": 256 << 20}
    with Engine(llama, kv_transfer_config=connector) as engine:
        truth, cold = engine.ask(prompts)
        engine.ask([[1, 2, 3]])  # stores are submitted one step later
        engine.llm.reset_prefix_cache()
        answers, cached = engine.ask(prompts)
        assert cold == [0] * len(prompts)
        assert max(cached) >= 256
        assert_alike(answers, truth)


def test_disk_brings_recent_windows_back(llama, prompts, tmp_path):
    """And their sink tokens, in an engine that has not seen the prompts."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"version: 1\nlayers: K4V4\nrecent_window: 64\nsink_tokens: 4\n{TRANSFORMS}")
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    connector["kv_connector_extra_config"] = {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": 256 << 20,
        "secondary_tiers": [{"type": "fs", "root_dir": str(tmp_path / "files")}],
    }
    prompt = prompts[3:4]
    with Engine(llama, profile, kv_transfer_config=connector) as engine:
        engine.ask(prompt)
        again, held = engine.ask(prompt)
        engine.ask([[1, 2, 3]])  # stores are submitted one step later
    assert list((tmp_path / "files").rglob("*.bin"))
    with Engine(llama, profile, kv_transfer_config=connector) as engine:
        answers, cached = engine.ask(prompt)
    assert cached[0] >= 256
    assert held[0] >= cached[0]
    assert_alike(answers, again)


@pytest.mark.parametrize("graphs", ["PIECEWISE", "FULL_DECODE_ONLY"])
def test_key_offsets_follow_swapped_weights(tmp_path, prompts, graphs):
    """Full graphs hold the offsets of before, so that such weights are refused there."""
    after = make_tiny_model(tmp_path / "after", "qwen2")
    before = shutil.copytree(after, tmp_path / "before")
    weights = load_file(before / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            tensor.zero_()
    save_file(weights, before / "model.safetensors", {"format": "pt"})
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 1\nlayers: K4V4\ntransforms: {key_offset: from_weights, key_hadamard: true}\n")
    mode = {"cudagraph_mode": graphs} if graphs == "PIECEWISE" else {"mode": 0, "cudagraph_mode": graphs}
    with Engine(after, profile, compilation_config=mode) as engine:
        truth, _ = engine.ask(prompts)
    with Engine(before, profile, compilation_config=mode) as engine:
        engine.ask(prompts)
        if graphs != "PIECEWISE":
            with pytest.raises(Exception, match="key_offset from_weights of layers 0-3 must change"):
                engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(after)})
            return
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(after)})
        answers, cached = engine.ask(prompts)
    assert cached == [0] * len(prompts)
    assert_alike(answers, truth)


def test_an_external_connector_brings_pages_back(llama, prompts, tmp_path):
    """Bit for bit, of layers whose pages are of unequal size, in an engine that has not seen the prompt."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"version: 1\nlayers: {{0: K8V8, 1: K4V2, 2: K16V16, 3: K2V2}}\n{TRANSFORMS}")
    storage = {"shared_storage_path": str(tmp_path / "storage")}
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": storage}
    prompt = prompts[2:3]
    with Engine(llama, profile, kv_transfer_config=connector) as engine:
        engine.ask(prompt)
        again, held = engine.ask(prompt)
        stored = engine.first_pages(held[0])
    with Engine(llama, profile, kv_transfer_config=connector) as engine:
        answers, cached = engine.ask(prompt)
        loaded = engine.first_pages(cached[0])
    assert cached == held
    assert cached[0] >= 256
    assert len(stored) == 4
    for name, pages in stored.items():
        assert pages.any()
        assert torch.equal(loaded[name], pages), name
    assert_alike(answers, again)


def test_lora_requests(llama, prompts, tmp_path):
    """The base model's requests and an adapter's in turns: each has its own blocks, and the adapter's own answers."""
    adapter = str(make_lora_adapter(llama, tmp_path / "adapter"))
    with Engine(llama, None, **LORA) as engine:
        truth, _ = engine.ask(prompts, adapter=adapter)
    with Engine(llama, **LORA) as engine:
        (base, _), (adapted, cold) = (engine.ask(prompts, adapter=each) for each in (None, adapter))
        (base_again, _), (adapted_again, cached) = (engine.ask(prompts, adapter=each) for each in (None, adapter))
    assert cold == [0] * len(prompts)
    assert max(cached) >= 256
    assert_alike(adapted, truth)
    assert_alike(adapted_again, adapted)
    assert_alike(base_again, base)
    parted = [
        abs(mine[0][1] - other[0][1]) > LOGPROB_TOLERANCE or mine[0][0] != other[0][0]
        for mine, other in zip(adapted, base, strict=True)
    ]
    assert sum(parted) > len(prompts) / 2
