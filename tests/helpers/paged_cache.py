"""Packed caches of random bytes: permuted blocks, poisoned tails and stale table entries, blocks apart in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vllm_kvtuner.kernels.contract import AttentionShape, Pages, Queries
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair
from vllm_kvtuner.pages.positions import TokenPositions
from vllm_kvtuner.pages.transforms import LayerTransforms, RotaryTable
from vllm_kvtuner.pages.views import Side, page_sides

POISON_BYTE = 255
"""Fills what no token occupies: scale and minimum read as NaN, codes as the largest."""
STALE_BLOCK = 1 << 30
"""Fills table entries beyond a request: reading that block leaves the cache."""


@dataclass(frozen=True)
class PackedCache:
    """A layer's cache and the requests in it.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] uint8, block stride larger than a page.
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32.
    """

    layout: PageLayout
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor

    @property
    def sides(self) -> tuple[Side, Side]:
        """Keys and values of all chunks."""
        return page_sides(self.kv_cache, self.layout)

    def pages(self, transforms: LayerTransforms | None = None) -> Pages:
        return Pages(self.kv_cache, self.layout, transforms or LayerTransforms())

    def queries(self, query_lens: Sequence[int]) -> Queries:
        """Of as many query tokens of each request."""
        starts = starts_of(query_lens, self.kv_cache.device)
        return Queries(self.block_table, self.seq_lens, starts, max(query_lens))

    def poison_newest(self, tokens: int) -> None:
        """Each request's newest tokens are not packed yet."""
        for request, length in enumerate(self.seq_lens.tolist()):
            token = torch.arange(max(0, length - tokens), length, device=self.kv_cache.device)
            block = self.block_table[request].long()[token // self.layout.block_size]
            offset = token % self.layout.block_size
            for side in self.sides:
                side.codes[block, :, offset] = POISON_BYTE
                side.meta.view(torch.uint8)[block, :, offset] = POISON_BYTE

    def shape(self, num_heads: int, logits_soft_cap: float = 0.0) -> AttentionShape:
        """Of a layer of ``num_heads`` query heads, scale 1 / sqrt."""
        size = self.layout.head_size
        return AttentionShape(num_heads, self.kv_cache.shape[1], size, size**-0.5, logits_soft_cap)


def starts_of(query_lens: Sequence[int], device: torch.device) -> torch.Tensor:
    """query_start_loc of a batch."""
    return torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32, device=device)


def empty_cache(layout: PageLayout, num_blocks: int, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """A poisoned cache whose blocks stand one chunk further apart than a page takes."""
    shape = (num_blocks, num_kv_heads + 1, layout.block_size, layout.content_bytes)
    return torch.full(shape, POISON_BYTE, dtype=torch.uint8, device=device)[:, :num_kv_heads]


def slots_of(block_table: torch.Tensor, seq_lens: list[int], block_size: int) -> torch.Tensor:
    """Slots of every token of every request, one request after the other, int64."""
    slots = []
    for entries, length in zip(block_table.long(), seq_lens, strict=True):
        token = torch.arange(length, device=block_table.device)
        slots.append(entries[token // block_size] * block_size + token % block_size)
    return torch.cat(slots)


def random_table(layout: PageLayout, seq_lens: list[int], device: torch.device) -> tuple[torch.Tensor, int]:
    """A block table of distinct blocks in random order, stale beyond each request, and the blocks it ranges over.

    Block 0 belongs to no request, as in vLLM.
    """
    needed = [-(-length // layout.block_size) for length in seq_lens]
    num_blocks = sum(needed) + 2
    free = (1 + torch.randperm(num_blocks - 1)).tolist()
    table = torch.full((len(seq_lens), max(needed) + 1), STALE_BLOCK, dtype=torch.int32)
    for request, count in enumerate(needed):
        for index in range(count):
            table[request, index] = free.pop()
    return table.to(device), num_blocks


def random_cache(
    layout: PageLayout, seq_lens: list[int], num_kv_heads: int, device: torch.device, spread: float = 1.0
) -> PackedCache:
    """Requests of random codes whose rows span about [-3 spread, 3 spread], each row's range its own."""
    table, num_blocks = random_table(layout, seq_lens, device)
    kv_cache = empty_cache(layout, num_blocks, num_kv_heads, device)
    slots = slots_of(table, seq_lens, layout.block_size)
    block, offset = slots // layout.block_size, slots % layout.block_size
    for side in page_sides(kv_cache, layout):
        rows = (slots.shape[0], num_kv_heads)
        width = side.codes.shape[-1]
        side.codes[block, :, offset] = torch.randint(0, 256, (*rows, width), dtype=torch.uint8, device=device)
        span = 6 * spread * (0.75 + 0.5 * torch.rand(rows, device=device))
        minimum = -span * (0.4 + 0.2 * torch.rand(rows, device=device))
        side.meta[block, :, offset] = torch.stack([span / side.format.levels, minimum], dim=-1).half()
    return PackedCache(layout, kv_cache, table, torch.tensor(seq_lens, dtype=torch.int32, device=device))


def make_layout(pair: str, head_size: int, block_size: int = 16) -> PageLayout:
    return PageLayout(PrecisionPair.parse(pair), head_size, block_size)


def rotary_table(
    rotary_dim: int, is_neox: bool, max_position: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> RotaryTable:
    frequency = 10000.0 ** (-torch.arange(rotary_dim // 2, dtype=torch.float64) / (rotary_dim // 2))
    angle = torch.arange(max_position, dtype=torch.float64)[:, None] * frequency
    return RotaryTable(torch.cat([angle.cos(), angle.sin()], dim=-1).to(device, dtype), is_neox)


def several_positions(
    table: RotaryTable, num_tokens: int, generator: torch.Generator | None = None, interleaved: bool = False
) -> RotaryTable:
    """The same rotation of tokens that have three positions, as M-RoPE's time, height and width.

    Args:
        table: of one position per token.
        num_tokens: of a batch, whose positions are random.
        generator: of them.
        interleaved: pairs take turns, as Qwen3-VL's, and do not lie in three sections, as Qwen2-VL's.
    """
    device, pairs = table.cos_sin.device, table.rotary_dim // 2
    index = torch.arange(pairs, device=device)
    axes = index % 3 if interleaved else (index >= pairs // 4).int() + (index >= 5 * pairs // 8)
    step = torch.randint(table.cos_sin.shape[0], (3, num_tokens + 1), generator=generator, device=device)
    return replace(table, positions=TokenPositions(axes.int(), step))


def random_transforms(
    num_kv_heads: int,
    head_size: int,
    device: torch.device,
    rotary: RotaryTable | None = None,
    offset: float = 0.0,
    equalization: bool = False,
    **switches: bool,
) -> LayerTransforms:
    """Transforms with random statics; ``offset`` is the key offset's standard deviation, 0 for none."""
    factors = None
    if equalization:
        factors = 0.5 + torch.rand(num_kv_heads, head_size, device=device)
        if rotary is not None:
            first, second = rotary.pairs(device)
            factors[:, second] = factors[:, first]
    key_offset = offset * torch.randn(num_kv_heads, head_size, device=device) if offset else None
    return LayerTransforms(key_offset, rotary, factors, **switches)
