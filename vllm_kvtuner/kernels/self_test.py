"""Store, gather and decode of small random requests by a set of kernels, checked against plain attention.

Rows are dequantized here token by token, so that neither the kernels' nor the reference's paging is trusted. Blocks lie
in random order and apart in memory, and whatever no token occupies is poisoned: read, it shows as NaN; written, it is
counted.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from vllm_kvtuner.kernels.contract import (
    AttentionShape,
    BatchLimits,
    CachedTokens,
    GatherCache,
    LatePacking,
    Pages,
    Queries,
    ReshapeAndCache,
    Segment,
    Span,
    StepRows,
    WindowRows,
)
from vllm_kvtuner.kernels.reference.attention import attention_ref
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.pages.codes import RANGE_FACTORS
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, FEEDBACK_BITS, FP16_MAX, PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import (
    LayerTransforms,
    RotaryTable,
    linear_rotary,
    restore_keys,
    rotate_values,
    transform_keys,
)
from vllm_kvtuner.pages.views import Side, page_sides

SEQ_LENS = (300, 129, 70, 64, 31, 17, 16, 1)
"""Tokens of the requests, as many as there are; the first has those besides that a span leaves out."""
MAX_WINDOW = 4096
"""Tokens of a sliding window that the first request is longer by, at most."""
FEW_TOKENS = 17
"""Tokens that are stored first, by the store's variant for few rows; the others take that for many."""
MANY_ROWS = 1 << 15
"""(token, KV head) rows of that second store, most of them without a slot."""
OFFSET_PAIRS = 8
"""Rotary pairs with a key offset, as many as kernels keep in registers."""
QUERY_SPREAD = 2.0
"""Standard deviation of queries: a few tokens get most of the weight, so that a wrong one shows."""
FEEDBACK = 0.5
"""Of random round feedback, see :func:`_random_feedback`."""
POISON = 255
"""Byte of what nobody stored: scale and minimum of such a token are NaN, and so is all that reads them."""
SPARE_ROWS = 3
"""Rows of queries beyond the last request's, as a CUDA graph's batch has them."""
STORE_LIMIT = 1.0
"""Steps of a row's scale; rounding takes half of one, fp16's of scale and minimum and the kernels' the rest."""
FEEDBACK_LIMIT = 0.03
"""Over the reference's weighted error. A number that lies between two codes moves others of its row, which may be
better or worse for it; nearest codes are about FEEDBACK worse."""
WORST_ROW = 100
"""What the worst row's counts less than that of all: it may have 1 + FEEDBACK_LIMIT WORST_ROW times the reference's."""
GATHER_LIMIT = 1e-2
"""Over the largest number: bf16 rounds what is read by 2^-9 of it, the kernels' arithmetic by less."""
DECODE_LIMIT = 5e-3
"""Over the largest value: weights of 11 bits and queries of 16 move outputs by 1e-3 at most."""
LSE_LIMIT = 3e-2
"""Of log-sum-exps: what queries in 16 bits move logits by, key offsets of several units included."""


class Case(NamedTuple):
    """What decides which variants of the kernels serve a layer.

    Args:
        layout: of the pages.
        shape: of the layer's attention.
        limits: of batches.
        span: cached tokens that decoding serves.
        transforms: names of those that are on (:func:`transform_names`); statics are random here.
        dtype: of queries, keys and values in model space.
        write_lse: decoding gives the log-sum-exp too.
        window_block_size: tokens per block of a recent window that the store keeps new tokens in too, 0 for none.
    """

    layout: PageLayout
    shape: AttentionShape
    limits: BatchLimits
    span: Span = Span()
    transforms: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    write_lse: bool = False
    window_block_size: int = 0

    @property
    def kind(self) -> "Case":
        """Without what vLLM settles only when it makes the cache."""
        layout = PageLayout(self.layout.pair, self.layout.head_size, BLOCK_SIZE_MULTIPLE)
        return self._replace(layout=layout, window_block_size=0)

    @property
    def seq_lens(self) -> tuple[int, ...]:
        span = self.span
        beyond = span.skip_newest + span.skip_first + min(span.sliding_window or 0, MAX_WINDOW)
        return (SEQ_LENS[0] + beyond, *SEQ_LENS[1:])

    def __str__(self) -> str:
        names = f" with {', '.join(self.transforms)}" if self.transforms else ""
        return f"{self.layout.pair} of head size {self.layout.head_size}{names}"


class Kernels(Protocol):
    """What of a KernelSet is tested."""

    @property
    def store(self) -> ReshapeAndCache: ...

    def late_packing(self, pair: PrecisionPair, transforms: LayerTransforms) -> LatePacking | None: ...

    @property
    def gather(self) -> GatherCache: ...

    def attend(
        self,
        query: torch.Tensor,
        queries: Queries,
        pages: Pages,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None: ...


@dataclass(frozen=True)
class Errors:
    """Largest errors of one case.

    Args:
        store: in steps of the row's scale, clipping by range search left out; of sides without round feedback.
        gather: over the largest key or value.
        decode: over the largest value, what the output's type rounds left out; 0 where decoding is not tested.
        lse: of log-sum-exps; 0 where there are none.
        stray: numbers that were written where nothing belongs, or differ from what was to be copied, or from what a
            store in one part has written.
        seconds: for all, compiling included.
        feedback: by how much the weighted error of sides with round feedback is above the reference's, over that.
    """

    store: float
    gather: float
    decode: float
    lse: float
    stray: int
    seconds: float
    feedback: float = 0.0

    @property
    def problem(self) -> str | None:
        """Which of them are too large, or None."""
        limits = {"store": STORE_LIMIT, "feedback": FEEDBACK_LIMIT, "gather": GATHER_LIMIT, "decode": DECODE_LIMIT}
        limits |= {"lse": LSE_LIMIT, "stray": 0}
        # Written so that NaN is too large.
        wrong = [name for name, limit in limits.items() if not getattr(self, name) <= limit]
        return ", ".join(f"{name} error {getattr(self, name):.3g} above {limits[name]:.3g}" for name in wrong) or None

    @property
    def passed(self) -> bool:
        return self.problem is None


def transform_names(transforms: LayerTransforms) -> tuple[str, ...]:
    """Names of the transforms that are on, in the order they are applied."""
    states = {
        "key_offset": transforms.key_offset is not None,
        "key_equalization": transforms.key_equalization is not None,
        "key_hadamard": transforms.key_hadamard,
        "value_hadamard": transforms.value_hadamard,
        "range_search": transforms.range_search,
        "key_round_feedback": transforms.key_feedback is not None,
        "value_round_feedback": transforms.value_feedback is not None,
    }
    return tuple(name for name, on in states.items() if on)


def measure(case: Case, kernels: Kernels, device: torch.device, decode: bool = True) -> Errors:
    """Run a case.

    Args:
        case: what a layer is like.
        kernels: that are tested.
        device: they run on.
        decode: whether they decode such a layer; else store and gather alone are tested.
    """
    begin = time.monotonic()
    with torch.no_grad(), _plain_defaults():
        batch = _Batch(case, device)
        stray = batch.store(kernels) + batch.store_late(kernels)
        keys, values = (batch.stored(side) for side in page_sides(batch.pages.kv_cache, case.layout))
        transforms = batch.pages.transforms
        store = feedback = 0.0
        wanted = transform_keys(batch.key, batch.position, transforms), rotate_values(batch.value, transforms)
        feedbacks = transforms.key_feedback, transforms.value_feedback
        for rows, exact, known in zip((keys, values), wanted, feedbacks, strict=True):
            if known is not None and rows.side.format.bits in FEEDBACK_BITS:
                feedback = max(feedback, rows.excess(exact, known), key=_nan_last)
            else:
                store = max(store, rows.steps(exact, transforms.range_search), key=_nan_last)
        key, value = restore_keys(keys.rows, batch.position, transforms), rotate_values(values.rows, transforms)
        gather, outside = _gather_error(kernels, batch, key, value)
        decode_error = lse_error = 0.0
        if decode:
            for sizes in sorted(case.limits.batches):
                errors = _decode_errors(kernels, batch, sizes, key, value)
                decode_error = max(decode_error, errors[0], key=_nan_last)
                lse_error = max(lse_error, errors[1], key=_nan_last)
    seconds = time.monotonic() - begin
    return Errors(store, gather, decode_error, lse_error, stray + outside, seconds, feedback)


def random_transforms(names: tuple[str, ...], case: Case, device: torch.device) -> LayerTransforms:
    """The transforms of a case with random statics, in half-split (neox) RoPE over the whole head."""
    random = torch.Generator(device).manual_seed(1)
    heads, size = case.shape.num_kv_heads, case.layout.head_size
    factors = 0.5 + torch.rand(heads, size // 2, generator=random, device=device, dtype=torch.float32)
    offset = torch.zeros(heads, size, dtype=torch.float32, device=device)
    rotary = None
    if "key_offset" in names:
        rotary = _rotary(size, max(case.seq_lens), device)
        first, second = rotary.pairs(device)
        pairs = torch.randperm(size // 2, generator=random, device=device)[:OFFSET_PAIRS]
        for dims in (first[pairs], second[pairs]):
            offset[:, dims] = 4 * torch.randn(heads, len(pairs), generator=random, device=device, dtype=torch.float32)
    return LayerTransforms(
        key_offset=None if rotary is None else offset,
        rotary=rotary,
        key_equalization=torch.cat([factors, factors], dim=1) if "key_equalization" in names else None,
        key_hadamard="key_hadamard" in names,
        value_hadamard="value_hadamard" in names,
        range_search="range_search" in names,
        key_feedback=_random_feedback(heads, size, random) if "key_round_feedback" in names else None,
        value_feedback=_random_feedback(heads, size, random) if "value_round_feedback" in names else None,
    )


def _random_feedback(heads: int, size: int, random: torch.Generator) -> RoundFeedback:
    """What a number takes up of others' errors has FEEDBACK of an error's mean square: so much do nearest codes lose.

    It stays below 1, so that errors do not grow from channel to channel.
    """
    coefficients = torch.randn(heads, size, size, generator=random, device=random.device, dtype=torch.float32).triu(1)
    coefficients *= FEEDBACK**0.5 / coefficients.norm(dim=-1, keepdim=True).clamp(min=1.0)
    diagonal = 0.5 + torch.rand(heads, size, generator=random, device=random.device, dtype=torch.float32)
    factors = (coefficients + torch.diag_embed(diagonal)).half()
    return RoundFeedback(factors, dict.fromkeys(FEEDBACK_BITS, (1.0, 1.1)))


@contextlib.contextmanager
def _plain_defaults() -> Iterator[None]:
    """vLLM loads models with the model's dtype as torch's own, in which nothing here is meant."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


@dataclass(frozen=True)
class _StoredRows:
    """Rows as one side of the pages keeps them.

    Args:
        side: keys or values of the whole cache.
        rows: [num_tokens, num_kv_heads, head_size] fp32.
        meta: [num_tokens, num_kv_heads, ...], of each row as its side has it.
    """

    side: Side
    rows: torch.Tensor
    meta: torch.Tensor

    def steps(self, wanted: torch.Tensor, range_search: bool) -> float:
        """Largest error in steps, that of clipping left out, unless it is more than range search may clip.

        A range shrunk by f loses (1 - f) / 2 of what it was at either end, and its ``levels`` steps are f of that. Some
        formats shrink it besides.
        """
        levels = self.side.format.levels
        scale, minimum = (each[..., None] for each in self.side.format.unpack_meta(self.meta))
        rounding = (wanted.clamp(minimum, minimum + levels * scale) - self.rows).abs() / scale
        factor = min(RANGE_FACTORS) if range_search and self.side.format.bits < 8 else 1.0
        factor *= self.side.format.reach
        beyond = (wanted - self.rows).abs() / scale - (1 - factor) / (2 * factor) * levels
        return torch.maximum(rounding, beyond).max().item()

    def excess(self, wanted: torch.Tensor, feedback: RoundFeedback) -> float:
        """By how much the weighted error is above that of the reference's rounding: of all rows, or of the worst."""
        exact = wanted.clamp(-FP16_MAX, FP16_MAX)
        reference = self.side.format.round_trip(wanted, feedback=feedback)
        ours, theirs = (feedback.weighted_error(exact - rows) for rows in (self.rows, reference))
        total, worst = ours.sum() / theirs.sum() - 1, (ours / theirs).max() - 1
        return torch.maximum(total, worst / WORST_ROW).item()


class _Batch:
    """Random tokens of requests, pages that have room for them, and where each is.

    Args:
        case: what a layer is like.
        device: where all of it lies.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.random = torch.Generator(device).manual_seed(0)
        lens, size = case.seq_lens, case.layout.block_size
        tokens, heads = sum(lens), case.shape.num_kv_heads
        self.key, self.value = (self.normal(tokens, heads, case.layout.head_size) for _ in range(2))
        blocks = [math.ceil(length / size) for length in lens]
        shuffled = torch.randperm(sum(blocks), generator=torch.Generator().manual_seed(0))
        # Block 0 belongs to nobody, as in vLLM.
        free = iter((1 + shuffled).tolist())
        table = torch.zeros(len(lens), max(blocks), dtype=torch.int32)
        for row, count in zip(table, blocks, strict=True):
            row[:count] = torch.tensor([next(free) for _ in range(count)], dtype=torch.int32)
        position = torch.cat([torch.arange(length) for length in lens])
        request = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
        self.block_table = table.to(device)
        self.position = position.to(device)
        self.block = table[request, position // size].long().to(device)
        self.offset = (position % size).to(device)
        self.pages = Pages(self.cache(POISON), case.layout, random_transforms(case.transforms, case, device))

    def normal(self, *shape: int) -> torch.Tensor:
        """Random numbers of the case's dtype."""
        numbers = torch.randn(*shape, generator=self.random, device=self.device, dtype=torch.float32)
        return numbers.to(self.case.dtype)

    def cache(self, byte: int) -> torch.Tensor:
        """A cache for all blocks and one more, each a chunk further apart than a page takes."""
        layout, heads = self.case.layout, self.case.shape.num_kv_heads
        blocks = sum(math.ceil(length / layout.block_size) for length in self.case.seq_lens) + 1
        shape = (blocks, heads + 1, layout.block_size, layout.content_bytes)
        return torch.full(shape, byte, dtype=torch.uint8, device=self.device)

    def store(self, kernels: Kernels) -> int:
        """Store all tokens, few of them first; gives how many bytes or numbers lie where they do not belong."""
        whole, heads = self.pages.kv_cache, self.case.shape.num_kv_heads
        self.pages = self.pages._replace(kv_cache=whole[:, :heads])
        window = self._window()
        for begin, end, extra in self._portions():
            kept = None
            if window is not None:
                kept = WindowRows(window[:, :heads], self._window_slots(begin, end, extra))
            key, value, slots, positions = self._rows(begin, end, extra)
            kernels.store(key, value, slots, positions, self.pages, kept)
        taken = self.cache(0)
        for side in page_sides(taken[:, :heads], self.case.layout):
            for part in (side.codes, side.meta.view(torch.uint8)):
                part[self.block, :, self.offset] = 1
        stray = int(((whole != POISON) & (taken == 0)).sum())
        return stray if window is None else stray + self._window_strays(window)

    def store_late(self, kernels: Kernels) -> int:
        """Store all tokens in two parts too, where the layer may; gives how many bytes differ from :meth:`store`'s."""
        size, heads = self.case.window_block_size, self.case.shape.num_kv_heads
        late = kernels.late_packing(self.case.layout.pair, self.pages.transforms) if size else None
        if late is None:
            return 0
        whole, blocks = self.cache(POISON), math.ceil(len(self.key) / size)
        pages = self.pages._replace(kv_cache=whole[:, :heads])
        shape = (blocks, heads, size, 2 * self.case.layout.head_size)
        window = torch.full(shape, torch.nan, dtype=self.case.dtype, device=self.device)
        for begin, end, extra in self._portions():
            key, value, slots, positions = self._rows(begin, end, extra)
            token = torch.arange(begin, end + extra, device=self.device)
            kept = WindowRows(window, torch.where(token < end, blocks * size - 1 - token, -1))
            late.keep_rows(key, value, kept)
            late.pack_rows([StepRows(pages, kept, slots, positions)])
        whole_before = self.pages.kv_cache._base
        assert whole_before is not None
        return int((whole != whole_before).sum())

    def _portions(self) -> Iterator[tuple[int, int, int]]:
        """The first token, the end, and how many without a slot come on top, of what is stored at a time."""
        heads, tokens = self.case.shape.num_kv_heads, len(self.key)
        yield 0, FEW_TOKENS, 0
        yield FEW_TOKENS, tokens, max(math.ceil(MANY_ROWS / heads) - (tokens - FEW_TOKENS), 0)

    def _rows(self, begin: int, end: int, extra: int) -> Iterator[torch.Tensor]:
        """Keys, values, slots and positions of a portion."""
        slots = self.block * self.case.layout.block_size + self.offset
        for rows, fill in ((self.key, 0), (self.value, 0), (slots, -1), (self.position, 0)):
            yield torch.cat([rows[begin:end], rows.new_full((extra, *rows.shape[1:]), fill)])

    def stored(self, side: Side) -> _StoredRows:
        """What one side of the pages holds of the tokens."""
        codes, meta = (each[self.block, :, self.offset] for each in (side.codes, side.meta))
        return _StoredRows(side, side.format.dequantize(codes, meta), meta)

    def _window(self) -> torch.Tensor | None:
        """Poisoned cache of a recent window, which keeps every other token, in order; a KV head more than it needs."""
        size = self.case.window_block_size
        if not size:
            return None
        blocks = math.ceil(len(self.key) / 2 / size) + 1
        shape = (blocks, self.case.shape.num_kv_heads + 1, size, 2 * self.case.layout.head_size)
        return torch.full(shape, torch.nan, dtype=self.case.dtype, device=self.device)

    def _window_slots(self, begin: int, end: int, extra: int) -> torch.Tensor:
        token = torch.arange(begin, end + extra, device=self.device)
        slot = self.case.window_block_size + token // 2
        return torch.where((token % 2 == 0) & (token < end), slot, -1)

    def _window_strays(self, window: torch.Tensor) -> int:
        size, heads = self.case.window_block_size, self.case.shape.num_kv_heads
        want = torch.full_like(window, torch.nan)
        kept = torch.cat([self.key, self.value], dim=-1)[::2]
        slot = size + torch.arange(len(kept), device=self.device)
        want[:, :heads][slot // size, :, slot % size] = kept
        same = (want == window) | (want.isnan() & window.isnan())
        return int((~same).sum())


def _gather_error(kernels: Kernels, batch: _Batch, key: torch.Tensor, value: torch.Tensor) -> tuple[float, int]:
    """Of reading tokens back, whose keys and values in model space are ``key`` and ``value``; and numbers written
    beyond them. Every other request's slice begins behind its first token."""
    lens = torch.tensor(batch.case.seq_lens)
    first = (torch.arange(len(lens)) % 2).minimum(lens - 1)
    starts = torch.nn.functional.pad((lens - first).cumsum(0), (1, 0))
    total = int(starts[-1])
    begins = torch.nn.functional.pad(lens.cumsum(0), (1, 0))
    wanted = torch.cat([torch.arange(int(b + f), int(e)) for b, f, e in zip(begins, first, begins[1:], strict=False)])
    outs = [
        torch.full((total + SPARE_ROWS, *rows.shape[1:]), torch.nan, dtype=batch.case.dtype, device=batch.device)
        for rows in (key, value)
    ]
    rows_at, slice_at = starts.int().to(batch.device), first.int().to(batch.device)
    tokens = CachedTokens(batch.block_table, rows_at, slice_at, total)
    kernels.gather(batch.pages, tokens, outs[0], outs[1])
    wanted = wanted.to(batch.device)
    error = max(
        (_relative(out[:total], rows[wanted]) for out, rows in zip(outs, (key, value), strict=True)), key=_nan_last
    )
    return error, sum(int((~out[total:].isnan()).sum()) for out in outs)


def _decode_errors(
    kernels: Kernels, batch: _Batch, sizes: tuple[int, int], key: torch.Tensor, value: torch.Tensor
) -> tuple[float, float]:
    """Of outputs and log-sum-exps of a batch of (requests, query tokens at most); the last of several is padding.

    Request r reads the tokens of the r-th of the case's, in turn; key and value as :func:`_gather_error` takes them.
    """
    case, device, (count, most) = batch.case, batch.device, sizes
    lens, shape = case.seq_lens, case.shape
    source = [request % len(lens) for request in range(max(count - 1, 1))]
    # One in three has fewer query tokens.
    numbers = [min(lens[of], most if r % 3 else 1 + r % most) for r, of in enumerate(source)]
    if count == 1:
        numbers = [min(lens[0], most)]
    starts = [0]
    for number in numbers:
        starts.append(starts[-1] + number)
    total = starts[-1]
    # The reference leaves such rows as they are, a kernel zeroes them.
    spare = 0 if isinstance(kernels, ReferenceKernels) else SPARE_ROWS
    fused = QUERY_SPREAD * batch.normal(total + spare, 2 * shape.num_heads, shape.head_size)
    query = fused[:, : shape.num_heads]  # as a slice of a projection
    table = batch.block_table[torch.tensor(source, device=device)]
    seq_lens = [lens[of] for of in source]
    if count > 1:
        table = torch.cat([table, torch.zeros_like(table[:1])])
        starts, seq_lens = [*starts, total], [*seq_lens, 0]
    lens_here, starts_here = (torch.tensor(each, dtype=torch.int32, device=device) for each in (seq_lens, starts))
    queries = Queries(table, lens_here, starts_here, most)
    if device.type == "cuda":
        # The decode kernel may start before the kernel before it ends, as in a model, where none writes these.
        torch.cuda.synchronize(device)
    # Twice, since a launch may leave its scratch other than it found it.
    results = [Segment.into(torch.full(query.shape, torch.nan, dtype=case.dtype, device=device)) for _ in range(2)]
    for result in results:
        result.lse.fill_(torch.nan)
        kernels.attend(query, queries, batch.pages, result.output, result.lse if case.write_lse else None)
    want = Segment.into(torch.zeros(query.shape, device=device))
    want.lse.fill_(-torch.inf)
    begins = [0]
    for length in lens:
        begins.append(begins[-1] + length)
    for of in sorted(set(source)):
        here = [r for r, each in enumerate(source) if each == of]
        rows = torch.cat([torch.arange(starts[r], starts[r] + numbers[r]) for r in here]).to(device)
        position = torch.cat([torch.arange(lens[of] - numbers[r], lens[of]) for r in here]).to(device)
        part = slice(begins[of], begins[of + 1])
        one = Segment.into(torch.empty(len(rows), *query.shape[1:], device=device))
        seen = _visible(position, lens[of], case.span)
        attention_ref(query[rows], key[part], value[part], shape, seen, one.output, one.lse)
        want.output[rows], want.lse[:, rows] = one.output, one.lse
    largest = value.abs().max()
    rounding = want.output.abs() * (torch.finfo(case.dtype).eps / 2)
    error = lse_error = 0.0
    for output, lse in results:
        apart = ((output.float() - want.output).abs() - rounding).max() / largest
        error = max(error, apart.item(), key=_nan_last)
        if case.write_lse:
            apart = torch.where(lse == want.lse, 0.0, (lse - want.lse).abs()).max()
            lse_error = max(lse_error, apart.item(), key=_nan_last)
    return error, lse_error


def _visible(position: torch.Tensor, num_keys: int, span: Span) -> torch.Tensor:
    """[num_queries, num_keys] bool: which tokens queries at ``position`` see."""
    token = torch.arange(num_keys, device=position.device)
    distance = position[:, None] - token
    seen = (distance >= span.skip_newest) & (token >= span.skip_first)
    return seen if span.sliding_window is None else seen & (distance < span.sliding_window)


def _nan_last(error: float) -> float:
    """Order of errors, in which NaN is the largest."""
    return math.inf if math.isnan(error) else error


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).abs().max() / want.abs().max()).item()


def _rotary(head_size: int, num_positions: int, device: torch.device) -> RotaryTable:
    frequency = 10000.0 ** (-torch.arange(head_size // 2, dtype=torch.float64) / (head_size // 2))
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    table = linear_rotary(torch.cat([angle.cos(), angle.sin()], dim=-1).float(), True, device)
    assert table is not None
    return table
