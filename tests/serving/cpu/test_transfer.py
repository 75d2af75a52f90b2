"""KV connectors move our pages as bytes and bring them back exactly, whatever the layers store; float32."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.engine import FULL_LOGPROBS, KV_CACHE_BYTES, Call, cpu_only, fork_server, run_engine

pytestmark = cpu_only

GREEDY = {"max_tokens": 8, "logprobs": FULL_LOGPROBS}
PROFILE = """\
version: 1
layers: {0: K8V8, 1: K4V2, 2: K16V16, 3: K2V2}
transforms: {key_hadamard: true, value_hadamard: true}
"""


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.yaml"
    path.write_text(PROFILE)
    return path


@pytest.mark.parametrize("length", [200, 300])
def test_an_external_connector_brings_a_prompts_pages_back(llama, profile, tmp_path, length):
    """Stored by one engine and loaded by another, which answers as one whose own prefix cache holds them."""
    numbers = random.Random(length)
    prompt = [numbers.randrange(10, 250) for _ in range(length)]
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    options = {"profile": profile, "attend_cached_prefill": True}
    run_engine(llama, [Call([prompt], GREEDY)], **options, kv_transfer_config=connector)
    loaded = run_engine(llama, [Call([prompt], GREEDY)], **options, kv_transfer_config=connector)
    own = run_engine(llama, [Call([prompt], GREEDY)] * 2, **options)
    (mine,), (_, expected) = loaded.answers[0], [call[0] for call in own.answers]
    whole = (length - 1) // own.block_size * own.block_size
    assert mine.cached_tokens == expected.cached_tokens == whole
    assert mine.token_ids == expected.token_ids
    assert np.array_equal(mine.logprobs, expected.logprobs)


def offload_and_bring_back(model, profile, prompt):
    """Copy all that the offload connector takes for pages, wipe the cache, copy it back; in a process of its own.

    Returns:
        Log-probabilities of the first tokens from the prefix cache before and after, tokens that it held, and bytes of
        the copy and of the cache. Its worker is not made, since its copies need a GPU.
    """
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker

    llm = LLM(
        str(model),
        kv_cache_dtype="kvtuner",
        additional_config={"kvtuner_profile": str(profile), "kvtuner_attend_cached_prefill": True},
        dtype="float32",
        max_model_len=1024,
        max_logprobs=-1,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    )

    def ask():
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=5)
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        rows = output.outputs[0].logprobs
        return [[entry.logprob for entry in row.values()] for row in rows], output.num_cached_tokens

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    taken = []
    connector = SimpleNamespace(
        vllm_config=runner.vllm_config, kv_cache_config=runner.kv_cache_config, _init_worker=taken.append
    )
    layers = runner.compilation_config.static_forward_context
    caches = {
        name: layers[name].kv_cache for group in runner.kv_cache_config.kv_cache_groups for name in group.layer_names
    }
    OffloadingConnectorWorker.register_kv_caches(connector, caches)
    ask()
    before, held = ask()
    copies = [each.tensor.clone() for each in taken[0].tensors]
    for cache in caches.values():
        cache.zero_()
    for each, copied in zip(taken[0].tensors, copies, strict=True):
        each.tensor.copy_(copied)
    after, still = ask()
    sizes = {cache.untyped_storage().data_ptr(): cache.untyped_storage().nbytes() for cache in caches.values()}
    assert still == held
    return before, after, held, sum(copied.nbytes for copied in copies), sum(sizes.values())


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_offload_connector_takes_whole_pages(architecture, profile, request):
    """Of layers in one group, and of sliding-window and full layers whose pages overlay each other in blocks."""
    prompt = [random.Random(1).randrange(10, 250) for _ in range(300)]
    with ProcessPoolExecutor(1, fork_server()) as pool:
        arguments = (request.getfixturevalue(architecture), profile, prompt)
        before, after, held, copied, whole = pool.submit(offload_and_bring_back, *arguments).result()
    assert held == 256
    assert after == before
    assert copied <= whole


def test_the_offload_connector_is_refused_on_a_cpu(llama):
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    connector["kv_connector_extra_config"] = {"cpu_bytes_to_use": 1 << 24}
    with pytest.raises(Exception, match="only supported on CUDA"):
        run_engine(llama, profile="K8V8:plain", kv_transfer_config=connector)
