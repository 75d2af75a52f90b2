"""Store, gather and decode of a small random batch by what would serve it, checked against plain attention.

Rows are dequantized here token by token, so that neither the kernels' nor the reference's paging is trusted.
"""

import time
from dataclasses import dataclass

import torch

from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, KernelSet, Pages, Queries, Span
from vllm_kvtuner.kernels.gpu import BatchLimits, GpuKernels
from vllm_kvtuner.kernels.reference.attention import attention_ref
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.pages.codes import RANGE_FACTORS
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import (
    LayerTransforms,
    RotaryTable,
    linear_rotary,
    restore_keys,
    rotate_values,
    transform_keys,
)
from vllm_kvtuner.pages.views import Side, page_sides
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

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(GROUP * NUM_KV_HEADS, NUM_KV_HEADS, self.head_size, self.head_size**-0.5)

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
        store, gather, decode = _measure(case, device)
    return Errors(store, gather, decode, seconds=time.monotonic() - begin)


def _measure(case: Case, device: torch.device) -> tuple[float, float, float]:
    batch = _make_batch(case, device)
    kernels = _kernel_set(case, device)
    kernels.store(batch.key, batch.value, batch.slots, batch.position, batch.pages)
    keys, values = (batch.stored(side) for side in page_sides(batch.pages.kv_cache, case.layout))
    transforms = batch.pages.transforms
    store_error = max(
        keys.steps(transform_keys(batch.key, batch.position, transforms), transforms.range_search),
        values.steps(rotate_values(batch.value, transforms), transforms.range_search),
    )
    key, value = restore_keys(keys.rows, batch.position, transforms), rotate_values(values.rows, transforms)
    return store_error, _gather_error(kernels, batch, key, value), _decode_error(kernels, batch, key, value)


def _kernel_set(case: Case, device: torch.device) -> KernelSet:
    """What serves a layer on the device."""
    if device.type == "cpu":
        return ReferenceKernels(case.shape, Span())
    return GpuKernels(case.shape, Span(), BatchLimits(len(SEQ_LENS), 1), device)


@dataclass(frozen=True)
class _StoredRows:
    """Rows as one side of the pages keeps them.

    Args:
        side: keys or values of the whole cache.
        rows: [num_tokens, num_kv_heads, head_size] fp32.
        meta: [num_tokens, num_kv_heads, 2] fp16, scale and minimum of each row.
    """

    side: Side
    rows: torch.Tensor
    meta: torch.Tensor

    def steps(self, wanted: torch.Tensor, range_search: bool) -> float:
        """Largest error in steps, that of clipping left out, unless it is more than range search may clip.

        A range shrunk by f loses (1 - f) / 2 of what it was at either end, and its ``levels`` steps are f of that.
        """
        levels = self.side.format.levels
        scale, minimum = self.meta.float().unsqueeze(-1).unbind(-2)
        rounding = (wanted.clamp(minimum, minimum + levels * scale) - self.rows).abs() / scale
        factor = min(RANGE_FACTORS) if range_search and self.side.format.bits < 8 else 1.0
        beyond = (wanted - self.rows).abs() / scale - (1 - factor) / (2 * factor) * levels
        return torch.maximum(rounding, beyond).max().item()


@dataclass(frozen=True)
class _Batch:
    """Random tokens of requests of ``SEQ_LENS``, and pages that have room for them.

    Args:
        key: [num_tokens, NUM_KV_HEADS, head_size] bf16.
        value: as key.
        position: [num_tokens] int64, in the token's request.
        block: [num_tokens] int64, where the token is stored.
        offset: [num_tokens] int64, its place in that block.
        block_table: [num_reqs, max_blocks] int32.
        starts: [num_reqs + 1] int32, where each request's tokens begin, and the end.
        pages: all bytes 255: scale and minimum of a token that nobody stored are NaN, and so is all that reads it.
    """

    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    block: torch.Tensor
    offset: torch.Tensor
    block_table: torch.Tensor
    starts: torch.Tensor
    pages: Pages

    @property
    def slots(self) -> torch.Tensor:
        return self.block * self.pages.layout.block_size + self.offset

    def stored(self, side: Side) -> _StoredRows:
        """What one side of the pages holds of the tokens."""
        codes, meta = (each[self.block, :, self.offset] for each in (side.codes, side.meta))
        return _StoredRows(side, side.format.dequantize(codes, meta), meta)


def _make_batch(case: Case, device: torch.device) -> _Batch:
    transforms, size = case.layer_transforms(device), case.layout.block_size
    tokens = sum(SEQ_LENS)
    key, value = (torch.randn(tokens, NUM_KV_HEADS, case.head_size, device=device).to(torch.bfloat16) for _ in range(2))
    blocks = [-(-length // size) for length in SEQ_LENS]
    free = (1 + torch.randperm(sum(blocks))).to(torch.int32)
    table = torch.zeros(len(SEQ_LENS), max(blocks), dtype=torch.int32)
    for row, ids in zip(table, free.split(blocks), strict=True):
        row[: len(ids)] = ids
    position = torch.cat([torch.arange(length) for length in SEQ_LENS])
    request = torch.repeat_interleave(torch.arange(len(SEQ_LENS)), torch.tensor(SEQ_LENS))
    cache_shape = (sum(blocks) + 1, NUM_KV_HEADS, size, case.layout.content_bytes)
    kv_cache = torch.full(cache_shape, 255, dtype=torch.uint8, device=device)
    return _Batch(
        key=key,
        value=value,
        position=position.to(device),
        block=table[request, position // size].long().to(device),
        offset=(position % size).to(device),
        block_table=table.to(device),
        starts=torch.tensor([0, *torch.tensor(SEQ_LENS).cumsum(0).tolist()], dtype=torch.int32, device=device),
        pages=Pages(kv_cache, case.layout, transforms),
    )


def _gather_error(kernels: KernelSet, batch: _Batch, key: torch.Tensor, value: torch.Tensor) -> float:
    """Of reading all tokens back, whose keys and values in model space are ``key`` and ``value``."""
    key_out, value_out = torch.full_like(batch.key, torch.nan), torch.full_like(batch.value, torch.nan)
    first = torch.zeros(len(SEQ_LENS), dtype=torch.int32, device=key.device)
    kernels.gather(batch.pages, CachedTokens(batch.block_table, batch.starts, first, len(key)), key_out, value_out)
    return max(_relative(key_out, key), _relative(value_out, value))


def _decode_error(kernels: KernelSet, batch: _Batch, key: torch.Tensor, value: torch.Tensor) -> float:
    """Of one decoded token of each request, over keys and values as :func:`_gather_error` takes them."""
    shape, device, starts = kernels.shape, key.device, batch.starts
    query = torch.randn(len(SEQ_LENS), shape.num_heads, shape.head_size, device=device).to(torch.bfloat16)
    output, expected = torch.full_like(query, torch.nan), torch.empty_like(query, dtype=torch.float32)
    query_starts = torch.arange(len(SEQ_LENS) + 1, dtype=torch.int32, device=device)
    queries = Queries(batch.block_table, starts[1:] - starts[:-1], query_starts, max_query_len=1)
    if device.type == "cuda":
        # The decode kernel may start before the kernel before it ends, as in a model, where none writes these.
        torch.cuda.synchronize(device)
    kernels.attend(query, queries, batch.pages, output)
    for index, (begin, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        one = slice(index, index + 1)
        attention_ref(query[one], key[begin:end], value[begin:end], shape, Span(), expected[one])
    return ((output.float() - expected).abs().max() / value.abs().max()).item()


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).abs().max() / want.abs().max()).item()


def _rotary(head_size: int, device: torch.device) -> RotaryTable:
    frequency = 10000.0 ** (-torch.arange(head_size // 2, dtype=torch.float64) / (head_size // 2))
    angle = torch.arange(max(SEQ_LENS), dtype=torch.float64)[:, None] * frequency
    table = linear_rotary(torch.cat([angle.cos(), angle.sin()], dim=-1).float(), True, device)
    assert table is not None
    return table
