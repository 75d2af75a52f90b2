"""Cases that every decode kernel must serve, and how its outputs are judged."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tests.helpers.paged_cache import PackedCache, make_layout, random_cache, rotary_table, starts_of
from vllm_kvtuner.kernels.contract import Launch, Queries, Span
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms, RotaryTable, linear_rotary, rotated_offset

HEAD_SIZES = (64, 96, 128, 256)
SEQ_LENS = [70, 1, 15, 16, 17, 129]


def attend(
    function: Callable[..., None],
    cache: PackedCache,
    query: torch.Tensor,
    query_lens: Sequence[int],
    transforms: LayerTransforms,
    lse: torch.Tensor | None = None,
    **options: object,
) -> torch.Tensor:
    """Output of an implementation of paged_attention, NaN where it wrote nothing.

    Args:
        options: fields of Span, of Launch (none for the reference), sinks, and logits_soft_cap.
    """
    output = torch.full(query.shape, torch.nan, dtype=query.dtype, device=query.device)
    run(function, cache, query, cache.queries(query_lens), transforms, output, lse, **options)
    return output


def run(
    function: Callable[..., None],
    cache: PackedCache,
    query: torch.Tensor,
    queries: Queries,
    transforms: LayerTransforms,
    output: torch.Tensor,
    lse: torch.Tensor | None = None,
    **options: object,
) -> None:
    """Call an implementation of paged_attention; options as :func:`attend`."""
    span = Span(**{name: options.pop(name) for name in Span._fields if name in options})
    sinks = options.pop("sinks", None)
    shape = cache.shape(query.shape[1], options.pop("logits_soft_cap", 0.0))
    shape = shape._replace(sinks=None if sinks is None else sinks.dtype)
    arguments = {} if function is paged_attention_ref else {"launch": Launch(**options)}
    assert arguments or not options, options
    pages = cache.pages(transforms)._replace(sinks=sinks)
    function(query, queries, pages, shape, span, output, lse, **arguments)


def largest_value(cache: PackedCache) -> float:
    """Largest magnitude of a cached value."""
    values = cache.sides[1]
    scale, minimum = values.meta.float().nan_to_num(0).unbind(-1)
    maximum = minimum + scale * values.format.levels
    return max(minimum.abs().max().item(), maximum.abs().max().item())


def random_sinks(num_heads: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[num_heads] attention sinks of about the log-sum-exp of 1 to 100 tokens' logits of unit variance; the first head
    has none, as vLLM pads heads."""
    sinks = 3 + 2 * torch.randn(num_heads, device=device)
    sinks[0] = -torch.inf
    return sinks.to(dtype)


def scale_values(cache: PackedCache, factor: float) -> None:
    """Multiply all cached values, up to what fp16 holds."""
    meta = cache.sides[1].meta
    meta.copy_((meta.float() * factor).clamp(-65000, 65000))


def changing_value_scales(device: torch.device) -> PackedCache:
    """Values that grow, that shrink, and that alternate by 2^20 between tokens; each row's share must survive."""
    cache = random_cache(make_layout("K4V4", 64), [200, 200, 200], 1, device)
    meta = cache.sides[1].meta
    token = torch.arange(200, device=device)
    for request, factor in enumerate(
        (10.0 ** (token / 50 - 3), 10.0 ** (1 - token / 50), 2.0 ** (10 - 20 * (token % 2)))
    ):
        blocks = cache.block_table[request, token // 16].long()
        meta[blocks, 0, token % 16] = (meta[blocks, 0, token % 16].float() * factor[:, None]).half()
    return cache


def flat_rows_beside_steep_ones(device: torch.device) -> PackedCache:
    """Every other value row is one large number, all of which is in its minimum."""
    cache = random_cache(make_layout("K4V4", 64), [60], 1, device)
    _, codes, meta = cache.sides[1]
    for token in range(0, 60, 2):
        block = int(cache.block_table[0, token // 16])
        meta[block, :, token % 16] = torch.tensor([0.0 if token % 4 else 2.0**-20, 50.0], dtype=torch.float16)
        codes[block, :, token % 16] = 0
    return cache


def values_near_the_middle(device: torch.device) -> tuple[PackedCache, float]:
    """Codes close to the middle of a wide range, so that values are 1/60 of what codes and minima contribute each.

    Returns:
        the cache, and an error that only weights rounded alike for codes and minima stay below: a value is at most
        2.5 steps; rounded apart, the two would err by 2^-12 of 128 steps each.
    """
    cache = random_cache(make_layout("K4V8", 64), [400, 30], 1, device)
    _, codes, meta = cache.sides[1]
    codes.copy_(torch.randint(126, 131, codes.shape))
    scale = meta[..., 0].float()
    meta[..., 1] = torch.where(scale.isnan(), torch.nan, -128 * scale)
    return cache, 2.5 * scale.nan_to_num(0).max().item() * 2**-11


@functools.cache
def linear_table(rotary_dim: int, is_neox: bool, max_position: int, device: torch.device) -> RotaryTable:
    """The rotary table of a kernel that turns the offset on from token to token."""
    table = rotary_table(rotary_dim, is_neox, max_position, torch.device("cpu"), torch.float32)
    linear = linear_rotary(table.cos_sin, is_neox, device)
    assert linear is not None
    return linear


def with_offset_pairs(transforms: LayerTransforms, count: int) -> LayerTransforms:
    """Only ``count`` rotary pairs, spread over all, keep their key offset; what is not rotated keeps it too."""
    assert transforms.key_offset is not None and transforms.rotary is not None
    pairs = torch.stack(transforms.rotary.pairs(transforms.key_offset.device), dim=-1)
    kept = torch.zeros(len(pairs), dtype=torch.bool)
    kept[torch.randperm(len(pairs))[:count]] = True
    offset = transforms.key_offset.clone()
    offset[:, pairs[~kept].flatten()] = 0
    return replace(transforms, key_offset=offset)


def balanced_query(transforms: LayerTransforms, num_heads: int, size: float) -> torch.Tensor:
    """[1, num_heads, head_size] fp32, for which the offset's logits of tokens 0 and 1 are equal, of hundreds each."""
    assert transforms.key_offset is not None
    num_kv_heads, head_size = transforms.key_offset.shape
    device = transforms.key_offset.device
    query = size * torch.randn(1, num_kv_heads, num_heads // num_kv_heads, head_size, device=device)
    first, second = rotated_offset(transforms, torch.arange(2, device=device))
    apart = (first - second)[:, None]
    query -= (query * apart).sum(-1, keepdim=True) / apart.square().sum(-1, keepdim=True) * apart
    return query.view(1, num_heads, head_size)


@dataclass(frozen=True)
class PaddedBatch:
    """A CUDA graph's batch: a request of length 0 with a row, requests without rows, rows beyond the last query.

    Args:
        cache: five requests.
        query: [7, 4, 64].
        starts: [6] int32; row 2 is the padding request's, rows 4 to 6 are nobody's.
    """

    cache: PackedCache
    query: torch.Tensor
    starts: torch.Tensor

    def attend(self, function: Callable[..., None], **options: object) -> torch.Tensor:
        output = torch.full(self.query.shape, torch.nan, dtype=self.query.dtype, device=self.query.device)
        queries = Queries(self.cache.block_table, self.cache.seq_lens, self.starts, 2)
        run(function, self.cache, self.query, queries, LayerTransforms(), output, **options)
        return output


def padded_batch(dtype: torch.dtype, device: torch.device) -> PaddedBatch:
    cache = random_cache(make_layout("K4V4", 64), [20, 0, 35, 0, 0], 2, device)
    query = torch.randn(7, 4, 64, device=device).to(dtype)
    return PaddedBatch(cache, query, torch.tensor([0, 2, 3, 4, 4, 4], dtype=torch.int32, device=device))


@dataclass(frozen=True)
class FarWindow:
    """One request of 20,000 tokens under a window, and the same with every block before the window's first poisoned."""

    whole: PackedCache
    poisoned: PackedCache
    window: int = 40


def far_window(device: torch.device) -> FarWindow:
    length, layout = 20_000, make_layout("K4V4", 64)
    small = random_cache(layout, [80], 1, device)
    table = torch.full((1, -(-length // 16)), int(small.block_table[0, 0]), dtype=torch.int32, device=device)
    table[0, -5:] = small.block_table[0, :5]
    seq_lens = torch.tensor([length], dtype=torch.int32, device=device)
    used = set(small.block_table[0, :5].tolist())
    poisoned = table.clone()
    poisoned[0, :-5] = next(block for block in range(small.kv_cache.shape[0]) if block not in used)
    return FarWindow(*(PackedCache(layout, small.kv_cache, blocks, seq_lens) for blocks in (table, poisoned)))


def beyond_32_bits(layout: PageLayout, device: torch.device) -> tuple[PackedCache, PackedCache]:
    """Two requests at the end of a cache of 5 GiB, and the same in a small one."""
    small = random_cache(layout, [300, 77], 8, device)
    num_small = small.kv_cache.shape[0]
    num_blocks = (5 << 30) // (8 * layout.chunk_bytes)
    shape = (num_blocks, 8, layout.block_size, layout.content_bytes)
    kv_cache = torch.empty(shape, dtype=torch.uint8, device=device)
    kv_cache[-num_small:] = small.kv_cache
    table = small.block_table + (num_blocks - num_small)
    return PackedCache(layout, kv_cache, table, small.seq_lens), small


class GraphBatch:
    """Buffers of one shape, in which batches of six requests come and go as they do under a CUDA graph."""

    BATCHES = ([900] * 6, [5000, 3, 64, 17, 0, 0])
    NUM_HEADS, NUM_KV_HEADS = 32, 8
    MAX_POSITION = 5000

    def __init__(self, layout: PageLayout, max_query_len: int, device: torch.device) -> None:
        self.max_query_len, self.device = max_query_len, device
        self.caches = [random_cache(layout, lengths, self.NUM_KV_HEADS, device) for lengths in self.BATCHES]
        num_blocks = max(cache.kv_cache.shape[0] for cache in self.caches)
        width = max(cache.block_table.shape[1] for cache in self.caches)
        shape = (num_blocks, *self.caches[0].kv_cache.shape[1:])
        self.kv_cache = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.block_table = torch.zeros(6, width, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(6, dtype=torch.int32, device=device)
        self.query_start_loc = torch.zeros(7, dtype=torch.int32, device=device)
        query = torch.empty(6 * max_query_len, self.NUM_HEADS, layout.head_size, dtype=torch.bfloat16, device=device)
        self.query, self.output = query, torch.empty_like(query)

    def query_lens(self, batch: int) -> list[int]:
        return [[self.max_query_len] * 6, [self.max_query_len, 1, 1, self.max_query_len, 0, 0]][batch]

    def fill(self, batch: int) -> None:
        """Put one of BATCHES, with fresh queries, where the captured launch reads."""
        cache = self.caches[batch]
        self.kv_cache[: cache.kv_cache.shape[0]] = cache.kv_cache
        self.block_table[:, : cache.block_table.shape[1]] = cache.block_table
        self.seq_lens.copy_(cache.seq_lens)
        self.query_start_loc.copy_(starts_of(self.query_lens(batch), self.device))
        self.query.normal_()
        self.output.fill_(torch.nan)

    def check_replay(self, run: Callable[[], None]) -> None:
        """Capture ``run``, then replay it on every batch: the bits that an eager call gives, and no row left out."""
        self.fill(0)
        run()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for batch in range(len(self.BATCHES)):
            self.fill(batch)
            graph.replay()
            replayed = self.output.clone()
            self.output.fill_(torch.nan)
            run()
            assert torch.equal(replayed, self.output)
            assert not self.output.isnan().any()


def dequantized(cache: PackedCache, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a request as they are stored, [tokens, num_kv_heads, head_size] float64."""
    length = int(cache.seq_lens[request])
    token = torch.arange(length, device=cache.kv_cache.device)
    block, offset = cache.block_table[request, token // cache.layout.block_size].long(), token % cache.layout.block_size
    rows = []
    for side in cache.sides:
        scale, minimum = side.meta[block, :, offset].double()[..., None].unbind(-2)
        rows.append(side.format.unpack(side.codes[block, :, offset]) * scale + minimum)
    return rows[0], rows[1]


def attention_float64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[num_heads, head_size] float64: one query token [num_heads, head_size] over its request, scale 1 / sqrt."""
    heads = query.double().view(key.shape[1], -1, query.shape[1])
    scores = torch.einsum("kgd,tkd->kgt", heads, key.double()) / math.sqrt(query.shape[1])
    return torch.einsum("kgt,tkd->kgd", scores.softmax(-1), value.double()).reshape(query.shape)


def plain_attention(
    cache: PackedCache,
    query: torch.Tensor,
    query_lens: Sequence[int],
    sinks: torch.Tensor,
    span: Span,
    soft_cap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with sinks from its definition: a softmax with one column more, whose value is 0.

    Returns:
        [num_tokens, num_heads, head_size] and log-sum-exps [num_heads, num_tokens], float64; rows beyond the last query
        are 0 and -inf.
    """
    output = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full((query.shape[1], len(query)), -torch.inf, dtype=torch.float64, device=query.device)
    first = 0
    for request, count in enumerate(query_lens):
        rows, first = slice(first, first + count), first + count
        group = query.shape[1] // cache.kv_cache.shape[1]
        keys, values = (rows.repeat_interleave(group, 1) for rows in dequantized(cache, request))
        logits = torch.einsum("qhd,thd->hqt", query[rows].double(), keys) / math.sqrt(query.shape[2])
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        token = torch.arange(len(keys), device=query.device)
        distance = len(keys) - count + torch.arange(count, device=query.device)[:, None] - token
        seen = (distance >= span.skip_newest) & (token >= span.skip_first)
        seen &= distance < (span.sliding_window or math.inf)
        columns = [logits.masked_fill(~seen, -torch.inf), sinks.double()[:, None, None].expand(-1, count, 1)]
        logits = torch.cat(columns, -1)
        lse[:, rows] = logits.logsumexp(-1)
        # A head whose sink is -inf has none.
        weights = (logits - lse[:, rows, None]).exp().nan_to_num(0.0)[..., :-1]
        output[rows] = torch.einsum("hqt,thd->qhd", weights, values)
    return output, lse


def attention_bf16(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The same in FlashAttention's arithmetic on a bf16 cache, before it rounds its output; fp32.

    Scores, sums and the normalization in fp32; the unnormalized probabilities, at most 1, rounded to bf16 for the
    second product.
    """
    heads = query.float().view(key.shape[1], -1, query.shape[1])
    scores = torch.einsum("kgd,tkd->kgt", heads, key.bfloat16().float()) / math.sqrt(query.shape[1])
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    sums = torch.einsum("kgt,tkd->kgd", weights.bfloat16().float(), value.bfloat16().float())
    return (sums / weights.sum(-1, keepdim=True)).reshape(query.shape)
