"""Two ranks that share a KV head and store half of the tokens each, against one rank; float32.

vLLM's CPU build computes no slots for it: tests/helpers/context_parallel.py does. All else is as served.
"""

import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.helpers.context_parallel import allow_on_cpu
from tests.helpers.engine import KV_CACHE_BYTES, Call, cpu_only, fork_server, run_engine
from tests.helpers.tiny_model import make_tiny_model

pytestmark = cpu_only

PROFILE = """\
version: 1
layers: {0: K8V4, 1-2: K4V4, 3: K4V2}
transforms: {key_hadamard: true, value_hadamard: true, range_search: true}
"""
LOGPROB = 0.02
"""Summed over an answer; ranks add their parts in another order, which can move a code by one."""
OPTIONS = {"block_size": 32, "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 128}


def answers(model, profile, prompts):
    """Tokens, summed log-probabilities and cached tokens of two calls, and the cache's capacity in tokens."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    allow_on_cpu()
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        kv_cache_dtype="kvtuner",
        additional_config={"kvtuner_profile": str(profile)},
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        tensor_parallel_size=2,
        decode_context_parallel_size=2,
        distributed_executor_backend="mp",
        **OPTIONS,
    )
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1, detokenize=False)
    found = []
    for _ in range(2):
        for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
            (answer,) = output.outputs
            chosen = zip(answer.logprobs, answer.token_ids, strict=True)
            logprob = sum(row[token].logprob for row, token in chosen)
            found.append((tuple(answer.token_ids), logprob, output.num_cached_tokens))
    return found, llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


def test_two_ranks_hold_twice_the_tokens_and_answer_as_one(tmp_path):
    """Prompts in chunks, decodes of unlike lengths, and a prefix that the cache holds."""
    model = make_tiny_model(tmp_path / "model", "llama", num_kv_heads=1)
    profile = tmp_path / "profile.yaml"
    profile.write_text(PROFILE)
    random = torch.Generator().manual_seed(0)
    # Of the longer ones, a hit leaves more than the few tokens that one rank would read back as it decodes.
    prompts = [torch.randint(0, 250, (length,), generator=random).tolist() for length in (5, 26, 220, 345)]
    with ProcessPoolExecutor(1, fork_server()) as pool:
        got, capacity = pool.submit(answers, model, profile, prompts).result()
    call = Call(prompts, {"max_tokens": 12, "logprobs": -1})
    one = run_engine(model, [call] * 2, profile=profile, **OPTIONS)
    expected = [answer for answers in one.answers for answer in answers]
    for (tokens, logprob, cached), answer in zip(got, expected, strict=True):
        assert tokens == answer.token_ids
        assert cached == answer.cached_tokens
        chosen = answer.logprobs[range(len(tokens)), list(tokens)].sum()
        assert logprob == pytest.approx(chosen, abs=LOGPROB)
    assert [cached for _, _, cached in got[4:]] == [0, 0, 192, 320]
    assert capacity == pytest.approx(2 * one.kv_cache_size_tokens, rel=0.01)
