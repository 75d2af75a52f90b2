"""Captures made of numbers: one layer's queries, keys and values, written as an engine's capture is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvtuner_tools.calibration.captured import (
    Capture,
    CapturedLayer,
    gram_file,
    layer_file,
    save_rotary,
    save_tensors,
)
from kvtuner_tools.calibration.rotation import apply_rotary
from vllm_kvtuner.pages.transforms import RotaryTable

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 64
LAYER = CapturedLayer(
    index=0,
    num_heads=NUM_HEADS,
    num_kv_heads=NUM_KV_HEADS,
    head_size=HEAD_SIZE,
    scale=HEAD_SIZE**-0.5,
    sliding_window=None,
    logits_soft_cap=0.0,
    rotary=0,
    offset_unsupported=None,
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: for tensors this small, threads that wait for each other cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rotary_table(max_position: int = 16384, rotary_dim: int = HEAD_SIZE, is_neox: bool = True) -> RotaryTable:
    frequency = 10000.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float64) / (rotary_dim // 2))
    angle = torch.arange(max_position, dtype=torch.float64)[:, None] * frequency
    return RotaryTable(torch.cat([angle.cos(), angle.sin()], dim=-1).float(), is_neox)


def make_capture(
    folder: Path,
    *,
    offset: torch.Tensor | None = None,
    spread: torch.Tensor | None = None,
    query_spread: torch.Tensor | None = None,
    value_spread: torch.Tensor | None = None,
    output_gram: torch.Tensor | None = None,
    layer: CapturedLayer = LAYER,
    num_windows: int = 3,
    num_tokens: int = 192,
    seed: int = 0,
) -> Capture:
    """A capture of one layer with normal queries, keys and values.

    Args:
        folder: where to.
        offset: [num_kv_heads, head_size], mean of the keys before RoPE; 0 by default.
        spread: their standard deviation, [head_size]; 1 by default.
        query_spread: that of the queries; 1.5 by default.
        value_spread: that of the values; 1 by default.
        output_gram: [num_kv_heads, group, head_size, group, head_size]; nothing reads the outputs by default.
        layer: the layer.
        num_windows: windows.
        num_tokens: tokens of each.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    table = rotary_table()

    def normal(rows: int, heads: int, deviation: torch.Tensor | float) -> torch.Tensor:
        return torch.randn(rows, heads, HEAD_SIZE, generator=generator) * deviation

    for window in range(num_windows):
        positions = torch.arange(num_tokens)
        key = normal(num_tokens, NUM_KV_HEADS, 1.0 if spread is None else spread)
        key = key if offset is None else key + offset
        query = normal(num_tokens, NUM_HEADS, 1.5 if query_spread is None else query_spread)
        if layer.rotary is not None:
            key, query = apply_rotary(key, positions, table), apply_rotary(query, positions, table)
        rows = torch.arange(3, num_tokens, 5)
        path = layer_file(folder, window, layer.index)
        path.parent.mkdir(parents=True)
        value = normal(num_tokens, NUM_KV_HEADS, 1.0 if value_spread is None else value_spread)
        tensors = {"key": key, "value": value, "query": query, "query_position": rows}
        save_tensors(path, tensors)
    if layer.rotary is not None:
        save_rotary(folder, 0, table, num_tokens)
    if output_gram is not None:
        save_tensors(gram_file(folder, layer.index), {"output_gram": output_gram})
    capture = Capture(
        folder=folder,
        inputs=f"numbers {seed}",
        model={"name": "numbers", "architecture": "NumbersForCausalLM", "num_layers": 1}
        | {"num_kv_heads": NUM_KV_HEADS, "head_size": HEAD_SIZE},
        data={"source": "numbers", "sha256": "0" * 64, "tokens": num_windows * num_tokens},
        seed=seed,
        versions={"vllm-kvtuner": "0"},
        dtype="float32",
        windows=(num_tokens,) * num_windows,
        layers=(layer,),
        gram_unsupported="nothing reads these numbers" if output_gram is None else None,
    )
    capture.write()
    return Capture.read(folder)
