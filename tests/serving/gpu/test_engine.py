"""Engines on a GPU: the kernels chosen by default against vLLM's unquantized cache, eager and in CUDA graphs."""

import importlib
import importlib.util
import random

import pytest
import torch

from tests.helpers.gpu_engine import LOGPROB_TOLERANCE, Engine, assert_alike
from tests.helpers.tiny_model import make_tiny_model
from vllm_kvtuner.attention import prefill

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("in_process")]

LENGTHS = (3, 17, 130, 300, 511)
OUTPUT_TOKENS = 12
MODES = [
    pytest.param({}, id="eager"),
    pytest.param({"max_num_batched_tokens": 64}, id="chunked prefill"),
    pytest.param({"twice": True}, id="prefix hit"),
    pytest.param({"enforce_eager": False}, id="full CUDA graphs"),
]
"""How the engine runs."""
NEEDS_EXPERTS = pytest.mark.skipif(
    "not has_kernels_for_experts()",  # looked up when a test runs, since it imports vLLM
    reason="needs vLLM's kernels for mixtures of experts",
)
QWEN3_NEXT = pytest.param("qwen3_next", marks=NEEDS_EXPERTS)
GPT_OSS = pytest.param("gpt_oss", marks=NEEDS_EXPERTS)
VALUES_OF_4_BITS = 0.5
"""Tolerance of log-probabilities, in nats, where some layers store values in 4 bits; measured up to 0.23 on a CPU."""


def has_kernels_for_experts():
    return importlib.util.find_spec("vllm._moe_C_stable_libtorch") is not None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"llama": 128, "qwen2": 64, "qwen3": 128, "gemma3": 64, "granite_hybrid": 64, "qwen3_next": 128}
    sizes["granite_swa"] = 64
    made = {name: make_tiny_model(folder / name, name, head_size=size) for name, size in sizes.items()}
    made["gpt_oss"] = make_tiny_model(folder / "gpt_oss", "gpt_oss", num_heads=64, num_kv_heads=8)  # as gpt-oss-20b
    made["gemma4"] = make_tiny_model(folder / "gemma4", "gemma4", head_size=80)
    made["heads of 192"] = make_tiny_model(folder / "heads_of_192", "llama", head_size=192)
    return made | {"gemma3 of 6": make_tiny_model(folder / "gemma3_6", "gemma3", num_layers=6)}


def prompts():
    numbers = random.Random(0)
    return [[numbers.randrange(10, 250) for _ in range(length)] for length in LENGTHS]


def generate(model, profile, twice=False, **options):
    """Greedy answers of an engine that runs eagerly unless told otherwise."""
    with Engine(model, profile, attend_cached_prefill=None, **{"enforce_eager": True, **options}) as engine:
        for _ in range(2 if twice else 1):
            answers, _ = engine.ask(prompts(), OUTPUT_TOKENS)
    return answers


def check(model, profile, tolerance=LOGPROB_TOLERANCE, **options):
    """What was generated has the log-probabilities that vLLM's unquantized cache gives it."""
    answers = generate(model, profile, **options)
    with Engine(model, None, enforce_eager=True) as engine:
        truth = engine.score(prompts(), answers)
    for answer, expected in zip(answers, truth, strict=True):
        assert [logprob for _, logprob in answer] == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(
    "architecture",
    ["llama", "heads of 192", "gemma3", "gemma4", "granite_hybrid", "granite_swa", QWEN3_NEXT, GPT_OSS],
)
@pytest.mark.parametrize("options", MODES)
def test_k8v8_decodes_like_the_unquantized_cache(models, architecture, options):
    check(models[architecture], "K8V8:plain", **options)


@pytest.mark.parametrize("options", MODES)
def test_prompts_of_large_heads_where_flash_attention_takes_none(models, options, monkeypatch):
    """As on cards without FlashAttention 4."""
    monkeypatch.setattr(prefill, "MAX_FLASH_HEAD_SIZE", 256)
    check(models["gemma4"], "K8V8:plain", **options)


@pytest.mark.parametrize("options", MODES)
def test_a_pair_alone_takes_the_key_bias_off(models, options):
    """Its offset is there before the first launch and before CUDA graphs are captured."""
    check(models["qwen2"], "K8V8", **options)


@pytest.fixture(scope="module")
def mixed_profiles(tmp_path_factory):
    """Layers of unlike pairs, some of them left to vLLM's own cache; of Gemma, a pair per kind of layer."""
    folder = tmp_path_factory.mktemp("mixed")
    layers = {
        "islands": "{0: K16V16, 1: K8V8, 2: K16V16, 3: K8V4}",
        "a pair per kind": "{0: K8V4, 1: K8V8, 2: K8V4, 3: K8V8}",
        "islands of a kind": "{0: K16V16, 1: K8V8, 2: K8V4, 3: K16V16}",
        "unlike": "{0: K8V8, 1: K8V4, 2: K16V16, 3: K8V8}",
        "unequal numbers": "{0: K8V8, 1: K8V4, 2: K8V4, 3: K8V8, 4: K8V8, 5: K8V8}",
        "odd layers": "{0-1: K8V8, 2-3: K8V4}",
        "island of the odd": "{0-1: K16V16, 2-3: K8V8}",
    }
    for name, text in layers.items():
        (folder / f"{name}.yaml").write_text(f"version: 1\nlayers: {text}\n")
    return {name: str(folder / f"{name}.yaml") for name in layers}


@pytest.mark.parametrize(
    ("architecture", "profile"),
    [
        ("llama", "islands"),
        ("gemma3", "a pair per kind"),
        ("gemma3", "islands of a kind"),
        ("gemma3 of 6", "unequal numbers"),  # of sliding-window layers of a pair
        ("qwen3", "unlike"),  # queries and keys are normalized per head
        ("granite_hybrid", "odd layers"),  # the even ones are linear attention
        pytest.param("qwen3_next", "odd layers", marks=QWEN3_NEXT.marks),
        pytest.param("qwen3_next", "island of the odd", marks=QWEN3_NEXT.marks),
    ],
)
def test_layers_of_unlike_pairs_decode_like_the_unquantized_cache(models, mixed_profiles, architecture, profile):
    check(models[architecture], mixed_profiles[profile], VALUES_OF_4_BITS, enforce_eager=False)


@pytest.fixture(scope="module")
def window_profiles(tmp_path_factory):
    """Two bits behind windows that hold every token of the tests, and eight behind short windows."""
    folder = tmp_path_factory.mktemp("windows")
    texts = {
        "16 bits": "layers: K2V2\nrecent_window: 600\n",
        "8 bits": "layers: K2V2\nrecent_window: 600\nrecent_window_bits: 8\n",
        "short": "layers: K8V8\nrecent_window: 40\nrecent_window_overrides: {1: 100}\n",
        "gemma": "layers: K8V8\nrecent_window: 24\nsink_tokens: 4\n",
        "short, attend": "layers: K8V8\nrecent_window: 40\nattend_cached_prefill: true\n",
        "sink_tokens": "layers: K8V8\nrecent_window: 40\nsink_tokens: 4\n",
        "sink_tokens, attend": "layers: K8V8\nrecent_window: 40\nsink_tokens: 16\nattend_cached_prefill: true\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(f"version: 1\n{text}")
    return {name: str(folder / f"{name}.yaml") for name in texts}


@pytest.mark.parametrize(
    "profile", ["16 bits", "8 bits", "short", "short, attend", "sink_tokens", "sink_tokens, attend"]
)
@pytest.mark.parametrize("options", MODES)
def test_recent_windows_decode_like_the_unquantized_cache(models, window_profiles, profile, options):
    """Also where the packed pages are of 2 bits, since no query reads them."""
    check(models["llama"], window_profiles[profile], **options)


@pytest.mark.parametrize("architecture", ["granite_hybrid", QWEN3_NEXT])
def test_recent_windows_beside_linear_attention(models, window_profiles, architecture):
    check(models[architecture], window_profiles["short"], twice=True)


@pytest.mark.parametrize("architecture", ["gemma3", "granite_swa"])
@pytest.mark.parametrize("decode_kernel", ["cuda", "triton"])
def test_both_decode_kernels_serve_recent_windows(models, window_profiles, architecture, decode_kernel, monkeypatch):
    """Attention sinks beside them too, which Granite SWA has."""
    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", decode_kernel)
    check(models[architecture], window_profiles["gemma"])


def test_decode_steps_replay_full_cuda_graphs(models, monkeypatch):
    from vllm_kvtuner.kernels.cuda import paged_attention as kernel

    launches = []
    original = kernel.paged_attention

    def counted(*arguments, **keywords):
        launches.append(torch.cuda.is_current_stream_capturing())
        original(*arguments, **keywords)

    monkeypatch.setattr(kernel, "paged_attention", counted)
    generate(models["llama"], "K4V4:plain", enforce_eager=False)
    # Each size is warmed up, then captured.
    assert any(launches)
    after_capture = launches[len(launches) - launches[::-1].index(True) :]
    # 12 tokens for each prompt came from 11 decode steps, and Python launched the kernel for none of them.
    assert not after_capture


@pytest.mark.parametrize("decode_kernel", ["cuda", "triton"])
@pytest.mark.parametrize("profile", ["K4V2", "K4V2:plain", "short", "sink_tokens"])
def test_nothing_is_compiled_under_a_request(models, window_profiles, profile, decode_kernel, monkeypatch):
    """Prefills, decodes, and decodes beside what the prefix cache leaves of prompts: 1, 2, 4, 7, 11 and 16 tokens."""
    from triton.runtime import JITFunction

    from vllm_kvtuner.kernels import triton
    from vllm_kvtuner.kernels.cuda import build

    stems = ("fold_query", "gather_cache", "paged_attention", "window_attention", "reshape_and_cache")
    modules = [importlib.import_module(f"{triton.__name__}.{stem}") for stem in stems]
    triton_kernels = [it for module in modules for it in vars(module).values() if isinstance(it, JITFunction)]

    def compiled():
        variants = [len(cache[0]) for kernel in triton_kernels for cache in kernel.device_caches.values()]
        return sum(variants), build.build.cache_info().misses

    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", decode_kernel)
    # What other tests have compiled does not count.
    build.build.cache_clear()
    for kernel in triton_kernels:
        kernel.device_caches.clear()
    numbers = random.Random(1)
    questions = [[numbers.randrange(10, 250) for _ in range(length)] for length in (33, 50, 68, 87, 107, 128)]
    options = {"attend_cached_prefill": None, "enforce_eager": True, "max_num_seqs": 2}
    with Engine(models["llama"], window_profiles.get(profile, profile), **options) as engine:
        at_start = compiled()
        for _ in range(2):
            engine.ask(questions, OUTPUT_TOKENS)
        assert compiled() == at_start
    assert at_start[decode_kernel == "cuda"], "the kernels that served were seen"


@pytest.mark.parametrize("decode_kernel", ["cuda", "triton"])
def test_what_the_prefix_cache_leaves_of_a_prompt_is_decoded(models, decode_kernel, monkeypatch):
    """In batches with decodes, without a launch of FlashAttention; the answers are those of whole prefills."""
    from vllm_kvtuner.attention.prefill import GpuPrefill

    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", decode_kernel)
    prefills = []
    original = GpuPrefill.__call__

    def counted(self, batch, output):
        prefills.append(len(batch.query))
        original(self, batch, output)

    monkeypatch.setattr(GpuPrefill, "__call__", counted)
    # Prompts of 17 tokens and more leave 1 to 16; two requests at once, so that others wait until one has ended.
    options = {"attend_cached_prefill": None, "enforce_eager": True, "max_num_seqs": 2}
    with Engine(models["llama"], **options) as engine:
        cold, _ = engine.ask(prompts()[1:], OUTPUT_TOKENS)
        assert prefills
        prefills.clear()
        warm, cached = engine.ask(prompts()[1:], OUTPUT_TOKENS)
    assert cached == [(length - 1) // 16 * 16 for length in LENGTHS[1:]]
    assert not prefills
    assert_alike(warm, cold)


@pytest.fixture
def untested(monkeypatch, tmp_path):
    """No card is known, and no kernel compiled."""
    from vllm_kvtuner.kernels import trial

    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", str(tmp_path / "kernels"))
    trial._verdict.cache_clear()
    yield trial
    trial._verdict.cache_clear()


def test_a_card_that_fails_its_self_test_is_served_by_triton(models, monkeypatch, untested):
    """In graphs too; and not at all where CUDA's kernels are asked for."""
    from vllm_kvtuner.kernels import gpu
    from vllm_kvtuner.kernels.cuda import paged_attention as kernel
    from vllm_kvtuner.kernels.self_test_errors import Errors

    monkeypatch.setattr(gpu, "measure_cuda", lambda case, device: Errors(0.5, 0.0, 1.0, 0.0, 0, 0.0))
    monkeypatch.setattr(kernel, "paged_attention", lambda *_, **__: pytest.fail("the kernel that failed"))
    check(models["llama"], "K8V8:plain", enforce_eager=False)
    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", "cuda")
    with pytest.raises(ValueError, match="failed their self-test on this card"):
        generate(models["llama"], "K8V8:plain")


def test_a_card_that_nobody_ran_is_tried_in_a_process_once(models, window_profiles, monkeypatch, untested):
    """As which this one passes; the next engine tests in its own process alone."""
    import subprocess

    monkeypatch.setattr(untested, "RUN_CAPABILITIES", ())
    started = []
    run = subprocess.run
    monkeypatch.setattr(untested.subprocess, "run", lambda *a, **k: started.append(a[0]) or run(*a, **k))
    for _ in range(2):
        untested._verdict.cache_clear()
        check(models["llama"], window_profiles["sink_tokens"], enforce_eager=False)
        processes = [command for command in started if untested.PROCESS in command[-1]]
        assert len(processes) == 1
