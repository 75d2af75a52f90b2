"""Engines on a GPU: the kernels chosen by default against vLLM's unquantized cache, eager and in CUDA graphs."""

import gc
import random

import pytest
import torch

from tests.helpers.tiny_model import make_tiny_model

pytestmark = pytest.mark.gpu

# bf16 activations alone move a tiny random model's log-probabilities by up to about 0.05 between two kernels; an
# 8-bit cache adds less. A wrong position, mask, slot or scale moves them by whole units.
LOGPROB_TOLERANCE = 0.25
LENGTHS = (3, 17, 130, 300, 511)
OUTPUT_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": make_tiny_model(folder / "llama", "llama", head_size=128),
        "gemma3": make_tiny_model(folder / "gemma3", "gemma3", head_size=64),
    }


def prompts():
    numbers = random.Random(0)
    return [{"prompt_token_ids": [numbers.randrange(10, 250) for _ in range(length)]} for length in LENGTHS]


def chosen_logprobs(model, kv_cache_dtype, profile=None, forced=None, twice=False, **options):
    """Tokens and their log-probabilities, [prompts][tokens]; ``forced`` scores given continuations instead."""
    from vllm import LLM, SamplingParams

    additional = {"kvtuner_profile": profile} if profile else {}
    llm = LLM(
        str(model),
        kv_cache_dtype=kv_cache_dtype,
        dtype="bfloat16",
        max_model_len=1024,
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=64 << 20,
        additional_config=additional,
        **{"max_num_seqs": 8, "enforce_eager": True, **options},
    )
    try:
        batch = prompts()
        if forced is not None:
            batch = [
                {"prompt_token_ids": prompt["prompt_token_ids"] + tokens}
                for prompt, tokens in zip(batch, forced, strict=True)
            ]
            parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True)
            outputs = llm.generate(batch, parameters, use_tqdm=False)
            return [
                [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[-OUTPUT_TOKENS:]]
                for output in outputs
            ]
        parameters = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, logprobs=0, ignore_eos=True)
        for _ in range(2 if twice else 1):
            outputs = llm.generate(batch, parameters, use_tqdm=False)
        return [
            (
                list(output.outputs[0].token_ids),
                [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs],
            )
            for output in outputs
        ]
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        torch.cuda.empty_cache()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="eager"),
        pytest.param({"max_num_batched_tokens": 64}, id="chunked prefill"),
        pytest.param({"twice": True}, id="prefix hit"),
        pytest.param(
            {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
            id="full CUDA graphs",
        ),
    ],
)
def test_k8v8_decodes_like_the_unquantized_cache(models, architecture, options):
    generated = chosen_logprobs(models[architecture], "kvtuner", "K8V8", **options)
    truth = chosen_logprobs(models[architecture], "auto", forced=[tokens for tokens, _ in generated])
    for (_, logprobs), expected in zip(generated, truth, strict=True):
        assert logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


@pytest.fixture(scope="module")
def window_profiles(tmp_path_factory):
    """Two bits behind windows that hold every token of the tests, and eight behind short windows."""
    folder = tmp_path_factory.mktemp("windows")
    texts = {
        "16 bits": "layers: K2V2\nrecent_window: 600\n",
        "8 bits": "layers: K2V2\nrecent_window: 600\nrecent_window_bits: 8\n",
        "short": "layers: K8V8\nrecent_window: 40\nrecent_window_overrides: {1: 100}\n",
        "gemma": "layers: K8V8\nrecent_window: 24\n",
        "short, attend": "layers: K8V8\nrecent_window: 40\nattend_cached_prefill: true\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(f"version: 1\n{text}")
    return {name: str(folder / f"{name}.yaml") for name in texts}


@pytest.mark.parametrize("profile", ["16 bits", "8 bits", "short", "short, attend"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="eager"),
        pytest.param({"max_num_batched_tokens": 64}, id="chunked prefill"),
        pytest.param({"twice": True}, id="prefix hit"),
        pytest.param(
            {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}},
            id="full CUDA graphs",
        ),
    ],
)
def test_recent_windows_decode_like_the_unquantized_cache(models, window_profiles, profile, options):
    """Also where the packed pages are of 2 bits, since no query reads them."""
    generated = chosen_logprobs(models["llama"], "kvtuner", window_profiles[profile], **options)
    truth = chosen_logprobs(models["llama"], "auto", forced=[tokens for tokens, _ in generated])
    for (_, logprobs), expected in zip(generated, truth, strict=True):
        assert logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("decode_kernel", ["cuda", "triton"])
def test_both_decode_kernels_serve_recent_windows(models, window_profiles, decode_kernel, monkeypatch):
    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", decode_kernel)
    generated = chosen_logprobs(models["gemma3"], "kvtuner", window_profiles["gemma"])
    truth = chosen_logprobs(models["gemma3"], "auto", forced=[tokens for tokens, _ in generated])
    for (_, logprobs), expected in zip(generated, truth, strict=True):
        assert logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)


def test_decode_steps_replay_full_cuda_graphs(models, monkeypatch):
    from vllm_kvtuner.kernels.cuda import paged_attention as kernel

    launches = []
    original = kernel.paged_attention

    def counted(*arguments, **keywords):
        launches.append(torch.cuda.is_current_stream_capturing())
        original(*arguments, **keywords)

    monkeypatch.setattr(kernel, "paged_attention", counted)
    options = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    chosen_logprobs(models["llama"], "kvtuner", "K4V4", **options)
    # Each size is warmed up, then captured.
    assert any(launches)
    after_capture = launches[len(launches) - launches[::-1].index(True) :]
    # 12 tokens for each prompt came from 11 decode steps, and Python launched the kernel for none of them.
    assert not after_capture
