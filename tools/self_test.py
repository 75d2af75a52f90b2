"""Store, gather and decode of a small random batch by what would serve it, checked against plain attention.

Rows are dequantized here token by token, so that neither the kernels' nor the reference's paging is trusted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvtuner.kernels.layer import LayerKernels
from vllm_kvtuner.kernels.reference.attention import attention_ref, paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import gather_cache_ref, reshape_and_cache_ref
from vllm_kvtuner.pages.codes import RANGE_FACTORS, dequantize
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import (
    LayerTransforms,
    RotaryTable,
    linear_rotary,
    restore_keys,
    rotate_values,
    transform_keys,
)
from vllm_kvtuner.pages.views import page_parts
from vllm_kvtuner.profile.profile import TransformSettings

SEQ_LENS = (1, 16, 17, 129)
"""Tokens of the batch's requests: one, a whole block, a block and one more, several blocks."""
NUM_KV_HEADS = 2
GROUP = 4
"""Query heads per KV head."""
STORE_LIMIT = 1.0
"""Steps of a row's scale; rounding takes half of one, fp16's of scale and minimum and the kernels' the rest."""
READ_LIMIT = 1e-2
"""Over the largest number: bf16 rounds what is read by 2^-9 of it, the kernels' arithmetic by less."""


@dataclass(frozen=True)
class Case:
    """What layers have in common that decides which kernel serves them.

    Args:
        pair: a quantized pair.
        head_size: numbers per row.
        transforms: which are on; statics are random here.
    """

    pair: PrecisionPair
    head_size: int
    transforms: TransformSettings

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.pair, self.head_size, BLOCK_SIZE_MULTIPLE)

    def layer_transforms(self, device: torch.device) -> LayerTransforms:
        """The transforms with random statics, in half-split (neox) RoPE over the whole head."""
        shape = (NUM_KV_HEADS, self.head_size)
        factors = 0.5 + torch.rand(NUM_KV_HEADS, self.head_size // 2, device=device)
        chosen = self.transforms
        return LayerTransforms(
            key_offset=4 * torch.randn(shape, device=device) if chosen.key_offset else None,
            rotary=_rotary(self.head_size, device) if chosen.key_offset else None,
            key_equalization=torch.cat([factors, factors], dim=1) if chosen.key_equalization else None,
            key_hadamard=chosen.key_hadamard,
            value_hadamard=chosen.value_hadamard,
            range_search=chosen.range_search,
        )


@dataclass(frozen=True)
class Errors:
    """Largest errors of one case.

    Args:
        store: in steps of the row's scale, clipping by range search left out.
        gather: over the largest key or value.
        decode: over the largest value.
        seconds: for all, compiling included.
    """

    store: float
    gather: float
    decode: float
    seconds: float

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.store <= STORE_LIMIT and self.gather <= READ_LIMIT and self.decode <= READ_LIMIT


def measure(case: Case, device: torch.device) -> Errors:
    """Run a case with the kernels that serve the device: the reference on a CPU, else those that are chosen.

    Args:
        case: pair, head size and transforms.
        device: CPU or GPU.
    """
    begin = time.monotonic()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        errors = _measure(case, device)
    return Errors(*errors, seconds=time.monotonic() - begin)


def _measure(case: Case, device: torch.device) -> tuple[float, float, float]:
    layout, transforms = case.layout, case.layer_transforms(device)
    store, gather, attend = _reference(case) if device.type == "cpu" else _kernels(case, device)
    tokens, size = sum(SEQ_LENS), layout.block_size
    key, value = (torch.randn(tokens, NUM_KV_HEADS, case.head_size, device=device).to(torch.bfloat16) for _ in range(2))
    blocks = [-(-length // size) for length in SEQ_LENS]
    free = (1 + torch.randperm(sum(blocks))).to(torch.int32)
    table = torch.zeros(len(SEQ_LENS), max(blocks), dtype=torch.int32)
    for row, ids in zip(table, free.split(blocks), strict=True):
        row[: len(ids)] = ids
    position = torch.cat([torch.arange(length) for length in SEQ_LENS])
    request = torch.repeat_interleave(torch.arange(len(SEQ_LENS)), torch.tensor(SEQ_LENS))
    block, offset = table[request, position // size].long().to(device), (position % size).to(device)
    table, position = table.to(device), position.to(device)
    starts = torch.tensor([0, *torch.tensor(SEQ_LENS).cumsum(0).tolist()], dtype=torch.int32, device=device)
    cache_shape = (sum(blocks) + 1, NUM_KV_HEADS, size, layout.content_bytes)
    # All ones: scale and minimum of a token that nobody stored are NaN, and so is all that reads it.
    kv_cache = torch.full(cache_shape, 255, dtype=torch.uint8, device=device)

    store(key, value, kv_cache, block * size + offset, position, layout, transforms)
    k_codes, v_codes, k_meta, v_meta = page_parts(kv_cache, layout)
    keys = dequantize(k_codes[block, :, offset], k_meta[block, :, offset], layout.k_bits)
    values = dequantize(v_codes[block, :, offset], v_meta[block, :, offset], layout.v_bits)
    store_error = max(
        _steps(transform_keys(key, position, transforms), keys, k_meta[block, :, offset], layout.k_bits, transforms),
        _steps(rotate_values(value, transforms), values, v_meta[block, :, offset], layout.v_bits, transforms),
    )

    keys, values = restore_keys(keys, position, transforms), rotate_values(values, transforms)
    key_out, value_out = torch.full_like(key, torch.nan), torch.full_like(value, torch.nan)
    first = torch.zeros(len(SEQ_LENS), dtype=torch.int32, device=device)
    arguments = (kv_cache, table, starts, first, key_out, value_out)
    gather(*arguments, layout=layout, transforms=transforms, num_tokens=tokens)
    gather_error = max(_relative(key_out, keys), _relative(value_out, values))

    query = torch.randn(len(SEQ_LENS), GROUP * NUM_KV_HEADS, case.head_size, device=device).to(torch.bfloat16)
    output, expected = torch.full_like(query, torch.nan), torch.empty_like(query, dtype=torch.float32)
    lens = starts[1:] - starts[:-1]
    query_starts = torch.arange(len(SEQ_LENS) + 1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        # The decode kernel may start before the kernel before it ends, as in a model, where none writes these.
        torch.cuda.synchronize(device)
    attend(query, kv_cache, table, lens, query_starts, 1, layout, transforms, output)
    for index, (begin, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        one = slice(index, index + 1)
        attention_ref(query[one], keys[begin:end], values[begin:end], _scale(case), expected[one])
    decode_error = ((output.float() - expected).abs().max() / values.abs().max()).item()
    return store_error, gather_error, decode_error


_Operations = tuple[Callable[..., None], Callable[..., None], Callable[..., None]]
"""Store, gather and decode with the contracts of :class:`LayerKernels`."""


def _kernels(case: Case, device: torch.device) -> _Operations:
    num_heads = GROUP * NUM_KV_HEADS
    kernels = LayerKernels(num_heads, NUM_KV_HEADS, case.head_size, _scale(case), None, 0.0, len(SEQ_LENS), 1, device)
    return kernels.store, kernels.gather, kernels.attend


def _reference(case: Case) -> _Operations:
    gather_ref: Callable[..., None] = gather_cache_ref
    attend_ref: Callable[..., None] = paged_attention_ref

    def gather(*arguments: Any, layout: PageLayout, transforms: LayerTransforms, num_tokens: int) -> None:
        gather_ref(*arguments, layout, transforms, num_tokens=num_tokens)

    def attend(*arguments: Any) -> None:
        *batch, layout, transforms, output = arguments
        attend_ref(*batch, _scale(case), layout, transforms, output)

    return reshape_and_cache_ref, gather, attend


def _scale(case: Case) -> float:
    return case.head_size**-0.5


def _steps(
    rows: torch.Tensor, stored: torch.Tensor, meta: torch.Tensor, bits: int, transforms: LayerTransforms
) -> float:
    """Largest error in steps, that of clipping left out, unless it is more than range search may clip.

    A range shrunk by f loses (1 - f) / 2 of what it was at either end, and its 2^bits - 1 steps are f of that.
    """
    scale, minimum = meta.float().unsqueeze(-1).unbind(-2)
    rounding = (rows.clamp(minimum, minimum + (2**bits - 1) * scale) - stored).abs() / scale
    factor = min(RANGE_FACTORS) if transforms.range_search and bits < 8 else 1.0
    beyond = (rows - stored).abs() / scale - (1 - factor) / (2 * factor) * (2**bits - 1)
    return torch.maximum(rounding, beyond).max().item()


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).abs().max() / want.abs().max()).item()


def _rotary(head_size: int, device: torch.device) -> RotaryTable:
    frequency = 10000.0 ** (-torch.arange(head_size // 2, dtype=torch.float64) / (head_size // 2))
    angle = torch.arange(max(SEQ_LENS), dtype=torch.float64)[:, None] * frequency
    table = linear_rotary(torch.cat([angle.cos(), angle.sin()], dim=-1).float(), True, device)
    assert table is not None
    return table
