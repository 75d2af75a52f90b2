"""Two ranks answer as one does: heads are split between them, or stand on both, and the statics with them."""

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.engine import cpu_only, fork_server
from tests.helpers.tiny_model import make_tiny_model

pytestmark = cpu_only

LOGPROB = {True: 0.02, "from_weights": 0.25}
"""Summed over an answer, by the source of the offset; measured 0.002 and 0.074. Ranks add their halves in another
order, which can move a code by one, and what is left of a bias makes the steps larger."""
FACTOR = 2e-3
"""Of a number of round feedback: a step of fp16."""
TRANSFORMS = ("key_offset", "key_hadamard", "value_hadamard", "range_search")


def offsets(worker: Any) -> list[list[list[float]]]:
    """Key offsets of a rank and its keys' round feedback, [layers][KV heads][numbers]."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    chosen = [layer.impl.transforms for layer in layers]
    feedback = [each.key_feedback for each in chosen]
    factors = [
        each.key_offset[:, :0] if known is None else known.factors for each, known in zip(chosen, feedback, strict=True)
    ]
    return [
        torch.cat([each.key_offset, more.float().flatten(1)], 1).tolist()
        for each, more in zip(chosen, factors, strict=True)
    ]


def answers(
    keywords: Mapping[str, Any], prompts: list[list[int]]
) -> tuple[list[tuple[tuple[int, ...], float]], list[list[list[list[float]]]]]:
    """Each prompt's greedy tokens and the sum of their log-probabilities; and the offsets of each rank."""
    # Each rank would bind itself to cores of its own, of which there may be too few.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM, SamplingParams

    llm = LLM(**keywords)
    sampling = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=1, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [output.outputs[0] for output in llm.generate(inputs, sampling, use_tqdm=False)]
    found = [
        (tuple(out.token_ids), sum(at[token].logprob for at, token in zip(out.logprobs, out.token_ids, strict=True)))
        for out in outputs
    ]
    return found, llm.collective_rpc(offsets)


def run(model: Path, profile: Path, prompts: list[list[int]], ranks: int) -> tuple[list[Any], list[Any]]:
    keywords = {
        "model": str(model),
        "kv_cache_dtype": "kvtuner",
        "additional_config": {"kvtuner_profile": str(profile), "kvtuner_attend_cached_prefill": True},
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 16 << 20,
        "tensor_parallel_size": ranks,
        "distributed_executor_backend": "mp",
    }
    with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
        return pool.submit(answers, keywords, prompts).result()


@pytest.mark.parametrize(
    ("num_kv_heads", "key_offset"),
    [
        pytest.param(2, True, id="split"),
        pytest.param(2, "from_weights", id="split, of the weights"),
        pytest.param(1, "from_weights", id="replicated, of the weights"),
    ],
)
def test_two_ranks_answer_as_one(tmp_path, num_kv_heads, key_offset):
    from kvtuner_tools.bias_offset import key_offsets
    from vllm_kvtuner.profile.statics import save_statics

    model = make_tiny_model(tmp_path / "model", "qwen2", num_kv_heads=num_kv_heads)
    save_statics(tmp_path / "statics.safetensors", key_offsets(str(model)), {})
    profile = tmp_path / "profile.yaml"
    profile.write_text(
        yaml.safe_dump(
            {
                "version": 1,
                "layers": {0: "K8V4", "1-2": "K4V4", 3: "K4V2"},
                "transforms": {
                    **dict.fromkeys(TRANSFORMS, True),
                    "key_offset": key_offset,
                    "key_round_feedback": key_offset if key_offset == "from_weights" else False,
                },
                "statics": "statics.safetensors",
            }
        )
    )
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 250, (length,), generator=generator).tolist() for length in (5, 40, 200)]
    (one, (whole,)), (two, parts) = (run(model, profile, prompts, ranks) for ranks in (1, 2))
    for layer, of_ranks in zip(whole, zip(*parts, strict=True), strict=True):
        heads = [head for rank in of_ranks for head in rank] if num_kv_heads == 2 else of_ranks[0]
        # Ranks that share a head add what their queries read of it in another order.
        torch.testing.assert_close(torch.tensor(layer), torch.tensor(heads), rtol=FACTOR, atol=FACTOR)
        assert num_kv_heads == 2 or of_ranks[0] == of_ranks[1]
    for (tokens, logprob), (other_tokens, other_logprob) in zip(one, two, strict=True):
        assert tokens == other_tokens
        assert logprob == pytest.approx(other_logprob, abs=LOGPROB[key_offset])
