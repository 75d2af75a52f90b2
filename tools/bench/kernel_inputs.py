"""Inputs of one attention call: requests, block tables, transforms, and attention over them in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvtuner_tools.bench.points import LayerHeads, QueryTokens
from vllm_kvtuner.kernels.contract import AttentionShape, Pages
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms, linear_rotary
from vllm_kvtuner.pages.views import page_sides

TABLE_PADDING = 8
"""Table columns beyond the longest request: vLLM's tables have room for its longest model length, and its kernels
read an entry or two past a request."""
MAX_COPIES = 256
STORE_COPIES = 8
"""Sets of slots that a graph's calls store to."""
L2_FACTOR = 6
"""Bytes of all copies over bytes of the L2 cache, so that a copy's bytes are gone when its turn comes again."""


@dataclass(frozen=True)
class Batch:
    """Requests of one decode call, laid out several times over in one cache.

    Args:
        heads: of the layer.
        block_size: tokens per block.
        lengths: tokens in the cache of each request, its query's included.
        query_tokens: that its requests bring.
        num_blocks: blocks of the cache; block 0 belongs to no request, as in vLLM.
        block_tables: per copy [num_reqs, max_blocks] int32, no block in two of them; 0 beyond a request.
        seq_lens: [num_reqs] int32.
        query_start_loc: [num_reqs + 1] int32.
        query: [query tokens of all requests, num_heads, head_size] bf16.
        key_scale: factor on the keys that the cache holds, which are of order 1 without.
        sinks: [num_heads] bf16, attention sinks; None where the layer has none.
    """

    heads: LayerHeads
    block_size: int
    lengths: tuple[int, ...]
    query_tokens: QueryTokens
    num_blocks: int
    block_tables: tuple[torch.Tensor, ...]
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    query: torch.Tensor
    key_scale: float = 1.0
    sinks: torch.Tensor | None = None

    @property
    def num_reqs(self) -> int:
        return len(self.lengths)

    @property
    def query_lens(self) -> tuple[int, ...]:
        """Query tokens of each request."""
        return self.query_tokens.of(self.num_reqs)

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def attention_shape(self) -> AttentionShape:
        """The heads, with the scale that models have as a rule."""
        heads, sinks = self.heads, None if self.sinks is None else self.sinks.dtype
        scale = heads.head_size**-0.5
        return AttentionShape(heads.num_heads, heads.num_kv_heads, heads.head_size, scale, sinks=sinks)

    def empty_rows(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the keys and values of all requests, each [total tokens, num_kv_heads, head_size]."""
        shape = (sum(self.lengths), self.heads.num_kv_heads, self.heads.head_size)
        return torch.empty(shape, dtype=dtype, device=self.device), torch.empty(shape, dtype=dtype, device=self.device)


def make_batch(
    heads: LayerHeads,
    block_size: int,
    lengths: Sequence[int],
    query_tokens: QueryTokens,
    copies: int,
    device: torch.device,
    query_scale: float = 1.0,
    key_scale: float = 1.0,
) -> Batch:
    """Random queries of standard deviation ``query_scale`` over randomly placed blocks."""
    needed = torch.tensor([-(-length // block_size) for length in lengths], device=device)
    per_copy = int(needed.sum())
    blocks = 1 + torch.randperm(copies * per_copy, device=device, dtype=torch.int32)
    present = torch.arange(int(needed.max()) + TABLE_PADDING, device=device) < needed[:, None]
    tables = []
    for part in blocks.split(per_copy):
        table = torch.zeros(present.shape, dtype=torch.int32, device=device)
        table[present] = part
        tables.append(table)
    query_lens = torch.tensor(query_tokens.of(len(lengths)), dtype=torch.int32, device=device)
    starts = torch.cat([query_lens.new_zeros(1), query_lens.cumsum(0, dtype=torch.int32)])
    query = query_scale * torch.randn(int(starts[-1]), heads.num_heads, heads.head_size, device=device)
    # About as much as all tokens of the longest request together.
    sinks = math.log(max(lengths)) + torch.randn(heads.num_heads, device=device) if heads.sinks else None
    return Batch(
        heads=heads,
        block_size=block_size,
        lengths=tuple(lengths),
        query_tokens=query_tokens,
        num_blocks=1 + copies * per_copy,
        block_tables=tuple(tables),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_start_loc=starts,
        query=query.bfloat16(),
        key_scale=key_scale,
        sinks=None if sinks is None else sinks.bfloat16(),
    )


@dataclass(frozen=True)
class NewTokens:
    """Tokens to store.

    Args:
        key: [num_tokens, num_kv_heads, head_size] bf16.
        value: as key.
        positions: [num_tokens] int64.
        slot_mappings: per call [num_tokens] int64.
    """

    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor
    slot_mappings: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class StoredTokens(NewTokens):
    """Tokens to store in random blocks.

    Args:
        heads: of the layer.
        block_size: tokens per block.
        num_blocks: blocks of the cache.
    """

    heads: LayerHeads
    block_size: int
    num_blocks: int

    @property
    def num_tokens(self) -> int:
        return self.key.shape[0]

    def moved_bytes(self, content_bytes: int) -> int:
        """Bytes a store reads and writes; ``content_bytes`` are a token's in one KV head of the cache."""
        return self.num_tokens * self.heads.num_kv_heads * (4 * self.heads.head_size + content_bytes)


def new_tokens(heads: LayerHeads, block_size: int, num_tokens: int, decode: bool, device: torch.device) -> StoredTokens:
    """Random tokens: one of each of ``num_tokens`` requests if ``decode``, else consecutive ones of one request."""
    blocks_per_copy = num_tokens if decode else -(-num_tokens // block_size)
    blocks = 1 + torch.randperm(STORE_COPIES * blocks_per_copy, device=device)
    token = torch.arange(num_tokens, device=device)
    slots = []
    for part in blocks.split(blocks_per_copy):
        if decode:
            slots.append(part * block_size + torch.randint(block_size, (num_tokens,), device=device))
        else:
            slots.append(part[token // block_size] * block_size + token % block_size)
    key, value = torch.randn(2, num_tokens, heads.num_kv_heads, heads.head_size, device=device).bfloat16()
    return StoredTokens(
        key=key,
        value=value,
        positions=torch.full_like(token, 1000) if decode else token,
        slot_mappings=tuple(slots),
        heads=heads,
        block_size=block_size,
        num_blocks=int(blocks.max()) + 1,
    )


def newest_tokens(batch: Batch) -> NewTokens:
    """Random keys and values of the tokens that a batch's queries belong to, which a layer stores before it attends;
    a call per copy of the batch."""
    heads, device = batch.heads, batch.device
    request = torch.arange(batch.num_reqs, device=device).repeat_interleave(batch.query_start_loc.diff())
    behind = torch.cat([torch.arange(count, 0, -1, device=device) for count in batch.query_lens])
    positions = batch.seq_lens.long()[request] - behind
    blocks, offsets = positions // batch.block_size, positions % batch.block_size
    slots = tuple(table[request, blocks].long() * batch.block_size + offsets for table in batch.block_tables)
    key, value = torch.randn(2, len(request), heads.num_kv_heads, heads.head_size, device=device).bfloat16()
    return NewTokens(key, value, positions, slots)


def copies_for(stored_bytes: int, l2_bytes: int) -> int:
    """Copies of a call's cache that together exceed the L2 cache ``L2_FACTOR`` times, 2 to ``MAX_COPIES``."""
    return min(max(2, math.ceil(L2_FACTOR * l2_bytes / stored_bytes)), MAX_COPIES)


def token_places(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset in it, each int64 [total tokens], of every request's tokens in the first copy."""
    places = []
    for table, length in zip(batch.block_tables[0].long(), batch.lengths, strict=True):
        token = torch.arange(length, device=batch.device)
        places.append((table[token // batch.block_size], token % batch.block_size))
    blocks, offsets = zip(*places, strict=True)
    return torch.cat(blocks), torch.cat(offsets)


def attention_float64(batch: Batch, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of each request's newest tokens over its own, in float64.

    Args:
        batch: the requests.
        query: [num_tokens, num_heads, head_size].
        keys: [total tokens, num_kv_heads, head_size], one request after the other.
        values: as keys.

    Returns:
        [num_tokens, num_heads, head_size] float64.
    """
    output = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    group = batch.attention_shape.group
    begin = first = 0
    for length, count in zip(batch.lengths, batch.query_lens, strict=True):
        rows = slice(first, first + count)
        position = torch.arange(length - count, length, device=query.device)
        future = torch.arange(length, device=query.device) > position[:, None]
        for head in range(batch.heads.num_kv_heads):
            heads = slice(head * group, (head + 1) * group)
            key, value = (x[begin : begin + length, head].double() for x in (keys, values))
            scores = torch.einsum("nhd,ld->hnl", query[rows, heads].double(), key) * batch.attention_shape.scale
            scores = scores.masked_fill(future, -torch.inf)
            if batch.sinks is not None:
                column = batch.sinks[heads].double()[:, None, None].expand(-1, count, 1)
                scores = torch.cat([scores, column], dim=-1)
            probabilities = torch.softmax(scores, dim=-1)[..., :length]
            output[rows, heads] = torch.einsum("hnl,ld->nhd", probabilities, value)
        begin += length
        first += count
    return output


def random_pages(batch: Batch, layout: PageLayout, transforms: LayerTransforms) -> Pages:
    """Packed pages of a batch, of random codes: values reach about 3, and keys 3 times the batch's ``key_scale``."""
    shape = (batch.num_blocks, batch.heads.num_kv_heads, layout.block_size, layout.content_bytes)
    kv_cache = torch.randint(0, 256, shape, dtype=torch.uint8, device=batch.device)
    for side, scale in zip(page_sides(kv_cache, layout), (batch.key_scale, 1.0), strict=True):
        span = 6 * scale * (0.75 + 0.5 * torch.rand(side.meta.shape[:-1], device=batch.device))
        side.meta[..., 0] = span / side.format.levels
        side.meta[..., 1] = -span / 2
    return Pages(kv_cache, layout, transforms, batch.sinks)


def make_transforms(name: str, heads: LayerHeads, max_position: int, device: torch.device) -> LayerTransforms:
    """What one of ``points.TRANSFORMS`` names, with random statics: 8 channel pairs have large offsets."""
    if name == "none":
        return LayerTransforms()
    if name == "hadamard":
        return LayerTransforms(key_hadamard=True, value_hadamard=True)
    num_kv_heads, size = heads.num_kv_heads, heads.head_size
    half = size // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angle = torch.arange(max_position, dtype=torch.float64, device=device)[:, None] * frequency
    rotary = linear_rotary(torch.cat([angle.cos(), angle.sin()], dim=-1).float().cpu(), True, device)
    few = torch.randperm(half, device=device)[:8]
    offset = torch.zeros(num_kv_heads, size, device=device)
    for pair_half in (few, few + half):
        offset[:, pair_half] = 8 * torch.randn(num_kv_heads, 8, device=device)
    if name == "offset":
        return LayerTransforms(offset, rotary, key_hadamard=True, value_hadamard=True)
    offset += torch.randn(num_kv_heads, size, device=device)
    equalization = (0.5 + torch.rand(num_kv_heads, half, device=device)).repeat(1, 2)
    return LayerTransforms(offset, rotary, equalization, key_hadamard=True, value_hadamard=True, range_search=True)
