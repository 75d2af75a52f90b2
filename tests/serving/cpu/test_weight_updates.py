"""Weights that are swapped under a running engine, as trainers do; float32."""

import os
import shutil
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.engine import KV_CACHE_BYTES, cpu_only, fork_server
from vllm_kvtuner.engine.key_bias import PAIRS_STEP

pytestmark = cpu_only

PROFILE = (
    "version: 1\nlayers: K4V4\nrecent_window: 16\n"
    "transforms: {key_offset: from_weights, key_hadamard: true, key_round_feedback: from_weights}\n"
)
KV_HEADS = 2
TOKENS = 12
"""That a request gets, a third of them before the weights are swapped."""


@pytest.fixture
def without_biases(qwen2, tmp_path):
    """A checkpoint as the model's, whose k projections add nothing, as that of an engine's dummy weights."""
    folder = shutil.copytree(qwen2, tmp_path / "before")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("k_proj.bias"):
            tensor.zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def swap_weights(before, after, profile, prompt):
    """Swap while a request is decoded; in a process of its own.

    Returns:
        The request's tokens before and after; what its prompt with those before it is answered once more; and the first
        layer's offset before and after.
    """
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(before),
        kv_cache_dtype="kvtuner",
        additional_config={"kvtuner_profile": str(profile)},
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )
    engine = llm.llm_engine

    def sampling(tokens):
        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def offset():
        runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        found = next(iter(runner.compilation_config.static_forward_context.values())).impl.transforms.key_offset
        return None if found is None else found.clone()

    offsets, got, whole = [offset()], [], []
    engine.add_request("0", {"prompt_token_ids": prompt}, sampling(TOKENS))
    while engine.has_unfinished_requests():
        for output in engine.step():
            whole = list(output.outputs[0].token_ids)
        if not got and len(whole) == TOKENS // 3:
            got = whole
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(after)})
            offsets.append(offset())
    rest = whole[len(got) :]
    assert llm.reset_prefix_cache()  # which the request did not find either
    (again,) = llm.generate([{"prompt_token_ids": [*prompt, *got]}], sampling(len(rest)), use_tqdm=False)
    return got, rest, list(again.outputs[0].token_ids), offsets


def test_key_offsets_follow_swapped_weights(qwen2, without_biases, prompts, tmp_path):
    """And the request in flight goes on as one that begins with the new weights."""
    profile = tmp_path / "profile.yaml"
    profile.write_text(PROFILE)
    prompt = [*prompts[-1], *range(20, 120)]
    with ProcessPoolExecutor(1, fork_server()) as pool:
        got, rest, again, offsets = pool.submit(swap_weights, without_biases, qwen2, profile, prompt).result()
    assert len(got) == TOKENS // 3
    assert rest == again
    assert offsets[0] is None
    bias = load_file(qwen2 / "model.safetensors")["model.layers.0.self_attn.k_proj.bias"].float()
    kept = offsets[1].flatten() != 0
    assert kept.sum() == KV_HEADS * 2 * PAIRS_STEP
    assert torch.equal(offsets[1].flatten()[kept], bias[kept])
