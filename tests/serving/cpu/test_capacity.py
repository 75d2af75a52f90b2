"""The cache vLLM allocates and reports is the one that pages/layout.py computes."""

import pytest

from tests.helpers.engine import cpu_only, run_engine
from tests.helpers.tiny_model import make_tiny_model
from vllm_kvtuner.engine.pair_window import CPU_BLOCK_SIZE, largest_share
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


@pytest.fixture(scope="module")
def long_llama(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama", max_model_len=32_768)


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


@pytest.mark.parametrize("length", [1_024, 8_192, 32_768])
@pytest.mark.parametrize("windowed", [False, True], ids=["plain", "window"])
def test_the_start_up_line_says_what_vllm_hands_out(long_llama, auto, tmp_path, length, windowed):
    """At all lengths of requests, with a window and without; and a pair's window takes a small share."""
    run = run_engine(
        long_llama,
        profile="K4V4" if windowed else "K4V4:plain",
        dtype="bfloat16",
        max_model_len=length,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=MEMORY,
    )
    assert f"; {run.kv_cache_size_tokens:,} KV tokens fit, " in run.log
    alone = MEMORY // (4 * KV_HEADS * content_bytes(PrecisionPair.parse("K4V4"), HEAD_SIZE))
    share = alone / run.kv_cache_size_tokens - 1
    assert ("recent windows of" in run.log) == windowed
    assert share < (largest_share(length) if windowed else 0) + run.block_size / length


def test_a_profile_with_a_window_has_blocks_that_the_window_fills(long_llama, tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text("version: 1\nlayers: K4V4\nrecent_window: 64\nsink_tokens: 4\n")
    sizes = [
        run_engine(long_llama, profile=path, dtype="bfloat16", kv_cache_memory_bytes=MEMORY, **given).groups[0][1]
        for given in ({}, {"block_size": 64})
    ]
    assert sizes == [CPU_BLOCK_SIZE, 64]
