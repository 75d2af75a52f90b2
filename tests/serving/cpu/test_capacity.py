"""The cache vLLM allocates and reports is the one that pages/layout.py computes."""

import pytest

from tests.helpers.engine import cpu_only, run_engine
from vllm_kvtuner.pages.layout import PrecisionPair, content_bytes

pytestmark = cpu_only

KV_HEADS, HEAD_SIZE = 2, 64
MEMORY = 256 << 20
LAYERS = {
    "uniform": ["K4V2"] * 4,
    "mixed": ["K8V8", "K4V2", "K2V2", "K8V4"],
    "beside unquantized layers": ["K16V16", "K8V8", "K4V4", "K16V16"],
}


def write_profile(folder, pairs):
    path = folder / "profile.yaml"
    lines = "\n".join(f"  {layer}: {pair}" for layer, pair in enumerate(pairs))
    path.write_text(f"version: 1\nlayers:\n{lines}\n")
    return path


@pytest.fixture(scope="module")
def auto(llama):
    return run_engine(llama, dtype="bfloat16", kv_cache_memory_bytes=MEMORY)


@pytest.mark.parametrize("pairs", LAYERS.values(), ids=LAYERS.keys())
def test_capacity_is_what_the_layout_says(llama, auto, tmp_path, pairs):
    run = run_engine(llama, profile=write_profile(tmp_path, pairs), dtype="bfloat16", kv_cache_memory_bytes=MEMORY)
    per_token = [KV_HEADS * content_bytes(PrecisionPair.parse(pair), HEAD_SIZE) for pair in pairs]

    assert run.page_bytes == tuple(run.block_size * each for each in per_token)
    block_bytes = run.block_size * sum(per_token)
    assert run.num_gpu_blocks == MEMORY // block_bytes
    assert run.allocated_bytes == run.num_gpu_blocks * block_bytes
    assert run.kv_cache_size_tokens == run.num_gpu_blocks * run.block_size

    stored_bits = 8 * sum(per_token) / (2 * KV_HEADS * HEAD_SIZE * len(pairs))
    assert auto.block_size == run.block_size
    # Either count is rounded down to whole blocks.
    rounding = 1 / auto.num_gpu_blocks + 1 / run.num_gpu_blocks
    assert run.kv_cache_size_tokens / auto.kv_cache_size_tokens == pytest.approx(16 / stored_bits, rel=rounding)
    assert f"{stored_bits:.3f} stored bits" in run.log
    assert f"{run.kv_cache_size_tokens:,} KV tokens fit, {16 / stored_bits:.2f} times as many as bf16" in run.log
