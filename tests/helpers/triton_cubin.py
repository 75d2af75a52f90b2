"""Compile the Triton kernels for cards that are not here, in a process of its own: tests interpret them.

    python -m tests.helpers.triton_cubin sm_86 512 K4V4 all

prints a JSON object per kernel, a :class:`Compiled`. Nothing runs.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.helpers.cubin import instructions, resource_usage
from tests.helpers.paged_cache import make_layout, random_cache, random_transforms, rotary_table
from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, Launch, Span, WindowRows
from vllm_kvtuner.kernels.triton import (
    gather_cache,
    paged_attention,
    prompt_attention,
    reshape_and_cache,
    window_attention,
)
from vllm_kvtuner.pages.transforms import LayerTransforms

KV_HEADS, GROUP = 2, 8
CPU = torch.device("cpu")


class Compiled(NamedTuple):
    """What a compiled kernel takes.

    Args:
        kernel: its name.
        shared_bytes: shared memory of a program.
        registers: of a thread.
        stack_bytes: of a thread, where registers that do not fit are spilled to.
        num_warps: of a program.
        warp_group_products: instructions of Hopper's.
    """

    kernel: str
    shared_bytes: int
    registers: int
    stack_bytes: int
    num_warps: int
    warp_group_products: int


def compile_kernels(arch: str, head_size: int, pair: str, kernels: Sequence[str] = ()) -> list[Compiled]:
    """Those of the names, or all of store, gather, decode and recent window: bf16, groups of 8, all transforms."""
    command = [sys.executable, "-m", __name__, arch, str(head_size), pair, ",".join(kernels) or "all"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [Compiled(**json.loads(line)) for line in result.stdout.splitlines()]


class _Card:
    """Stands in for Triton's driver."""

    def __init__(self, arch: str) -> None:
        self.target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _launch_all(layout: Any, transforms: LayerTransforms) -> None:
    """Every kernel once, as a layer in bf16 does."""
    size = layout.head_size
    cache = random_cache(layout, [300, 77], KV_HEADS, CPU)
    pages = cache.pages(transforms)
    key, value, query = (torch.zeros(2, heads, size).bfloat16() for heads in (KV_HEADS, KV_HEADS, KV_HEADS * GROUP))
    slots = torch.zeros(2, dtype=torch.int64)
    rows = torch.zeros(4, KV_HEADS, 16, 2 * size).bfloat16()
    reshape_and_cache.reshape_and_cache(key, value, slots, slots, pages, WindowRows(rows, slots))
    many = torch.zeros(reshape_and_cache.MANY_ROWS // KV_HEADS, KV_HEADS, size).bfloat16()
    many_slots = torch.zeros(len(many), dtype=torch.int64)
    reshape_and_cache.reshape_and_cache(many, many, many_slots, many_slots, pages)
    ends = torch.tensor([0, 1, 2], dtype=torch.int32)
    gather_cache.gather_cache(pages, CachedTokens(cache.block_table, ends, ends[:2], 2), key, value)
    shape = AttentionShape(KV_HEADS * GROUP, KV_HEADS, size, size**-0.5)
    for query_lens in ([1, 1], [4, 4]):
        query = torch.zeros(sum(query_lens), KV_HEADS * GROUP, size).bfloat16()
        output, lse = torch.empty_like(query), torch.empty(KV_HEADS * GROUP, len(query))
        queries = cache.queries(query_lens)
        launch = Launch(paged_attention.decode_workspace(len(query), KV_HEADS * GROUP, size, CPU))
        span = Span(None, 64, 4)
        paged_attention.paged_attention(query, queries, pages, shape, span, output, lse, launch=launch)
        window_attention.window_attention(query, queries, rows, shape, span, output, lse, launch=Launch())
    prompts = prompt_attention.Prompts(ends, ends, 1)
    prompt_attention.prompt_attention(query, key, value, prompts, shape, causal=True)


def main(arch: str, head_size: str, pair: str, wanted: str) -> None:
    size, names = int(head_size), wanted.split(",")
    triton.runtime.driver.set_active(_Card(arch))
    launch, found = JITFunction.run, {}

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if wanted == "all" or self.__name__ in names:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
            found[kernel.hash] = kernel

    JITFunction.run = compile_only
    rotary = rotary_table(size, True, 4096, CPU, torch.bfloat16)
    switches = dict(equalization=True, key_hadamard=True, value_hadamard=True, range_search=True)
    _launch_all(make_layout(pair, size), random_transforms(KV_HEADS, size, CPU, rotary, offset=1.0, **switches))
    for kernel in found.values():
        cubin, metadata = kernel.asm["cubin"], kernel.metadata
        usage, products = resource_usage(cubin), instructions(cubin)["HGMMA"]
        compiled = Compiled(metadata.name, metadata.shared, usage["REG"], usage["STACK"], metadata.num_warps, products)
        print(json.dumps(compiled._asdict()))


if __name__ == "__main__":
    main(*sys.argv[1:])
