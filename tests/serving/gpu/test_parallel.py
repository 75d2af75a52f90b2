"""Two GPUs answer as one does: heads split between ranks or standing on both, and layers split between stages.

Each engine lives in a process of its own, which starts its ranks; NVLink multicast is off.
"""

import multiprocessing
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.helpers.gpu_engine import Answer, Engine, assert_alike, attention_layers
from tests.helpers.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.usefixtures("in_process", "without_multicast"),
]

TRANSFORMS = ("key_offset", "key_hadamard", "value_hadamard", "range_search")
LAYERS = {0: "K8V8", "1-2": "K8V4", 3: "K4V8"}
TOLERANCE = 0.1
"""Of log-probabilities in fp16, whose rounding in sums of two halves moves single codes."""

Rank = dict[int, dict[str, Any]]
"""What stands on one rank, by layer."""


@pytest.fixture(scope="module")
def without_multicast():
    """NCCL's NVLS and memory that multicast needs are off, and so is every all-reduce but NCCL's own."""
    names = ("NCCL_NVLS_ENABLE", "NCCL_CUMEM_ENABLE", "VLLM_ALLREDUCE_USE_SYMM_MEM", "VLLM_ALLREDUCE_USE_FLASHINFER")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, "0")
        # A process that has asked for the number of GPUs cannot be forked into one that uses them.
        patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        yield


def describe(worker: Any) -> Rank:
    """Of each layer of a rank: KV heads, bytes of a page, and key offset [KV heads, head size]."""
    from vllm.model_executor.models.utils import extract_layer_index

    return {
        extract_layer_index(name): {
            "heads": layer.num_kv_heads,
            "page bytes": layer.kv_cache[0].nbytes,
            "key offset": layer.impl.transforms.key_offset.float().cpu().numpy(),
        }
        for name, layer in attention_layers(worker).items()
    }


def live(arguments: Mapping[str, Any], prompts: Sequence[list[int]]) -> tuple[list[Answer], list[Rank]]:
    """An engine's answers, and what stands on each of its ranks."""
    with Engine(**arguments) as engine:
        answers, _ = engine.ask(prompts)
        return answers, engine.on_ranks(describe)


def run(folder: Path, prompts: Sequence[list[int]], **options: Any) -> tuple[list[Answer], list[Rank]]:
    arguments = {"model": folder / "model", "profile": folder / "profile.yaml", "dtype": "float16", **options}
    if options:
        arguments |= {"distributed_executor_backend": "mp", "disable_custom_all_reduce": True}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(live, arguments, prompts).result()


def make_model(folder: Path, num_kv_heads: int) -> Path:
    """A model whose heads have unlike biases, and beside it a profile with their statics."""
    from safetensors.torch import load_file, save_file

    from kvtuner_tools.bias_offset import key_offsets
    from vllm_kvtuner.profile.statics import save_statics

    model = make_tiny_model(folder / "model", "qwen2", num_kv_heads=num_kv_heads)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("k_proj.bias"):
            factors = 1 - 0.5 * torch.arange(num_kv_heads)  # heads would hardly differ otherwise
            weights[name] = (weight.view(num_kv_heads, -1) * factors[:, None]).view(-1).to(weight.dtype)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    save_statics(folder / "statics.safetensors", key_offsets(str(model)), {})
    profile = {"version": 1, "layers": LAYERS, "statics": "statics.safetensors"}
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile | {"transforms": dict.fromkeys(TRANSFORMS, True)}))
    return folder


@pytest.fixture(scope="module")
def prompts():
    numbers = random.Random(0)
    return [[numbers.randrange(10, 250) for _ in range(length)] for length in (5, 40, 200, 500)]


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("two heads"), 2)


@pytest.fixture(scope="module")
def one_gpu(two_heads, prompts, in_process, without_multicast):
    return run(two_heads, prompts)


def test_two_ranks_split_the_heads(two_heads, prompts, one_gpu):
    """And the statics with them."""
    truth, (whole,) = one_gpu
    answers, ranks = run(two_heads, prompts, tensor_parallel_size=2)
    assert len(ranks) == 2
    for layer, expected in whole.items():
        assert expected["heads"] == 2
        for rank, found in enumerate(ranks):
            assert found[layer]["heads"] == 1
            assert 2 * found[layer]["page bytes"] == expected["page bytes"]
            assert np.array_equal(found[layer]["key offset"], expected["key offset"][rank : rank + 1])
    assert_alike(answers, truth, TOLERANCE)


def test_two_ranks_hold_a_single_head_each(tmp_path, prompts):
    one_head = make_model(tmp_path, 1)
    truth, (whole,) = run(one_head, prompts)
    answers, ranks = run(one_head, prompts, tensor_parallel_size=2)
    assert len(ranks) == 2
    for layer, expected in whole.items():
        for found in ranks:
            assert found[layer]["heads"] == expected["heads"] == 1
            assert found[layer]["page bytes"] == expected["page bytes"]
            assert np.array_equal(found[layer]["key offset"], expected["key offset"])
    assert_alike(answers, truth, TOLERANCE)


def test_two_stages_split_the_layers(two_heads, prompts, one_gpu):
    truth, (whole,) = one_gpu
    answers, stages = run(two_heads, prompts, pipeline_parallel_size=2)
    assert [sorted(stage) for stage in stages] == [[0, 1], [2, 3]]
    for layer, found in (item for stage in stages for item in stage.items()):
        assert found["page bytes"] == whole[layer]["page bytes"]
        assert np.array_equal(found["key offset"], whole[layer]["key offset"])
    assert_alike(answers, truth, TOLERANCE)


def test_two_ranks_share_the_tokens_of_a_head(tmp_path, prompts):
    """Decode context parallelism, in full CUDA graphs: half of the tokens on each, and the answers of one."""
    make_tiny_model(tmp_path / "model", "llama", num_kv_heads=1, head_size=128)
    profile = {"version": 1, "layers": LAYERS, "transforms": {"key_hadamard": True, "value_hadamard": True}}
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    arguments = {"model": tmp_path / "model", "profile": tmp_path / "profile.yaml", "dtype": "float16"}
    arguments |= {"distributed_executor_backend": "mp", "disable_custom_all_reduce": True, "tensor_parallel_size": 2}
    arguments |= {"attend_cached_prefill": None, "max_num_batched_tokens": 256}  # so that prompts come in chunks
    answers, capacity = zip(*(share(arguments, size, prompts) for size in (1, 2)), strict=True)
    assert_alike(answers[1], answers[0], TOLERANCE)
    assert capacity[1] == pytest.approx(2 * capacity[0], rel=0.02)


def share(arguments: Mapping[str, Any], size: int, prompts: Sequence[list[int]]) -> tuple[list[Answer], int]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        options = {**arguments, "decode_context_parallel_size": size}
        return pool.submit(live_and_count, options, prompts).result()


def live_and_count(arguments: Mapping[str, Any], prompts: Sequence[list[int]]) -> tuple[list[Answer], int]:
    """An engine's answers, and the tokens that its cache holds."""
    with Engine(**arguments) as engine:
        answers, _ = engine.ask(prompts)
        return answers, engine.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
