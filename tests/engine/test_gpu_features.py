"""Speculative decoding, sleep and wake, and CPU offload on a GPU: text is what it is without them."""

import gc
import random

import pytest
import torch

from tests.helpers.tiny_model import make_tiny_model

pytestmark = pytest.mark.gpu

TOKENS = 24
LOGPROB_TOLERANCE = 0.25
"""As in test_gpu_engine.py: other batch shapes take other kernels, which move a tiny bf16 model by up to about 0.05."""


@pytest.fixture(scope="module", autouse=True)
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "0")
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", head_size=128)


@pytest.fixture(scope="module")
def prompts():
    numbers = random.Random(0)
    phrase = [numbers.randrange(10, 250) for _ in range(20)]
    return [[numbers.randrange(10, 250) for _ in range(length)] for length in (17, 130, 300, 511)] + [phrase * 10]


class Engine:
    """An engine until the block ends."""

    def __init__(self, model, **options):
        self.arguments = {
            "model": str(model),
            "kv_cache_dtype": "kvtuner",
            "additional_config": {"kvtuner_profile": "K8V8", "kvtuner_attend_cached_prefill": True},
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "max_num_seqs": 8,
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": 64 << 20,
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
            **options,
        }

    def __enter__(self):
        from vllm import LLM

        self.llm = LLM(**self.arguments)
        return self

    def __exit__(self, *_):
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        torch.cuda.empty_cache()

    def ask(self, prompts):
        """Tokens and their log-probabilities of each prompt, and how many prompt tokens a cache held."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=0, ignore_eos=True)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        samples = [output.outputs[0] for output in outputs]
        answers = [
            [(token, row[token].logprob) for token, row in zip(sample.token_ids, sample.logprobs, strict=True)]
            for sample in samples
        ]
        return answers, [output.num_cached_tokens for output in outputs]

    def counter(self, name):
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)


def assert_alike(answers, truth):
    """The same tokens until two are nearly as good, and their log-probabilities."""
    for mine, expected in zip(answers, truth, strict=True):
        for (token, logprob), (other, other_logprob) in zip(mine, expected, strict=True):
            assert logprob == pytest.approx(other_logprob, abs=LOGPROB_TOLERANCE)
            if token != other:
                break


@pytest.mark.parametrize("method", ["n-gram", "the model itself"])
def test_speculative_decoding(llama, prompts, method):
    """In full CUDA graphs of verifications. The model drafts for itself with an unquantized cache: most is accepted."""
    speculative = {"method": "draft_model", "model": str(llama), "num_speculative_tokens": 4}
    if method == "n-gram":
        speculative = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with Engine(llama) as engine:
        truth, _ = engine.ask(prompts)
    with Engine(llama, speculative_config=speculative, disable_log_stats=False) as engine:
        for _ in range(2):
            answers, _ = engine.ask(prompts)
            assert_alike(answers, truth)
        drafted = engine.counter("vllm:spec_decode_num_draft_tokens")
        accepted = engine.counter("vllm:spec_decode_num_accepted_tokens")
    assert accepted > 0
    if method == "the model itself":
        assert accepted / drafted > 0.5


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(llama, prompts, level):
    """Level 2 forgets what was allocated while the model loaded, the decode kernel's scratch too."""
    with Engine(llama, enable_sleep_mode=True) as engine:
        truth, _ = engine.ask(prompts)
        for _ in range(2):
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
