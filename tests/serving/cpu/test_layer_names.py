"""Models whose layers' names do not hold the decoder layer's number, against vLLM's own cache."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Zamba2Config, Zamba2ForCausalLM

from tests.helpers.compare import mean_kl
from tests.helpers.engine import FULL_LOGPROBS, Call, cpu_only, run_engine
from tests.helpers.tiny_model import WEIGHT_STD, make_tiny_model

pytestmark = cpu_only

LOOPED_KL = 1e-3
"""Of a looped model at K8V8; a pass that read another one's cache would give more than 1."""


@pytest.fixture(scope="module")
def zamba2(tmp_path_factory):
    """Three layers of attention, two of which share a block."""
    folder = tmp_path_factory.mktemp("zamba2")
    torch.manual_seed(0)
    kinds = ["mamba", "hybrid"] * 3
    config = Zamba2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=len(kinds), num_attention_heads=4,
        num_key_value_heads=4, layers_block_type=kinds, num_mem_blocks=2, mamba_d_state=32, mamba_expand=2,
        n_mamba_heads=4, mamba_ngroups=1, mamba_headdim=64, use_mem_rope=True, max_position_embeddings=1024,
        adapter_rank=8, tie_word_embeddings=True, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    Zamba2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_shared_blocks_store_what_the_profile_says_of_each_use(zamba2, tmp_path):
    profile = tmp_path / "profile.yaml"
    profile.write_text("version: 1\nlayers: {0-1: K8V8, 2-3: K8V4, 4-5: K4V4}\n")
    run = run_engine(zamba2, profile=profile, enable_prefix_caching=False, skip_tokenizer_init=True)
    assert "3 of 3 attention layers packed" in run.log
    # Pages by the numbers in vLLM's names: the uses of the first block (layers 1 and 5), then the second's.
    content = {pair: 64 * bits // 8 + 8 for pair, bits in (("K8V8", 16), ("K8V4", 12), ("K4V4", 8))}
    by_use = [content["K8V8"], content["K4V4"], content["K8V4"]]
    assert [page * by_use[0] for page in run.page_bytes[:3]] == [size * run.page_bytes[0] for size in by_use]


@pytest.fixture(scope="module")
def looped(tmp_path_factory):
    """A Llama whose layers run twice: the second pass reads the first's cache and its own window."""
    folder = make_tiny_model(tmp_path_factory.mktemp("looped") / "model", num_layers=2)
    config = json.loads((folder / "config.json").read_text())
    looped = {"architectures": ["IQuestLoopCoderForCausalLM"], "loop_num": 2, "loop_window_size": 64}
    (folder / "config.json").write_text(json.dumps(config | looped))
    weights = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        gate = f"model.gate_projections.{layer}"
        weights[f"{gate}.weight"] = WEIGHT_STD * torch.randn(4, 64).to(torch.bfloat16)
        weights[f"{gate}.bias"] = torch.zeros(4, dtype=torch.bfloat16)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_passes_of_a_looped_model_have_caches_of_their_own(looped, prompts):
    calls = [Call(prompts[2:], {"logprobs": FULL_LOGPROBS, "max_tokens": 8})]
    # Prompts of several chunks, so that the second pass reads tokens of earlier steps too.
    plain, run = (run_engine(looped, calls, profile=each, max_num_batched_tokens=144) for each in (None, "K8V8"))
    assert "4 of 4 attention layers packed" in run.log
    for expected, answer in zip(plain.answers[0], run.answers[0], strict=True):
        assert mean_kl(expected.logprobs[:1], answer.logprobs[:1]) < LOOPED_KL
