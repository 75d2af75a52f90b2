"""Store, gather and decode of small random requests by a set of kernels, checked against plain attention.

Rows are dequantized here token by token, so that neither the kernels' nor the reference's paging is trusted. Blocks lie
in random order and apart in memory, and whatever no token occupies is poisoned: read, it shows as NaN; written, it is
counted.
"""

import contextlib
import math
import time
from collections.abc import Iterator

import torch

from vllm_kvtuner.kernels.contract import (
    CachedTokens,
    KernelSet,
    Pages,
    Queries,
    Segment,
    Span,
    StepRows,
    WindowRows,
)
from vllm_kvtuner.kernels.reference.attention import attention_ref
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.kernels.self_test_cases import Case, random_transforms
from vllm_kvtuner.kernels.self_test_errors import Errors, StoredRows, nan_last, relative_error
from vllm_kvtuner.pages.transforms import (
    SIDES,
    restore_keys,
    rotate_values,
    transform_keys,
)
from vllm_kvtuner.pages.views import Side, page_sides

QUERY_SPREAD = 2.0
"""Standard deviation of queries: a few tokens get most of the weight, so that a wrong one shows."""
SINK_MEAN = 4.0
"""Of random attention sinks: the log-sum-exp of about 8 tokens' logits, so that sinks and tokens both get weight."""
POISON = 255
"""Byte of what nobody stored: scale and minimum of such a token are NaN, and so is all that reads them."""
SPARE_ROWS = 3
"""Rows of queries beyond the last request's, as a CUDA graph's batch has them."""


def measure(case: Case, kernels: KernelSet, device: torch.device, decode: bool = True) -> Errors:
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
        for side, rows, exact in zip(SIDES, (keys, values), wanted, strict=True):
            if (known := transforms.feedback(side, rows.side.format.bits)) is not None:
                feedback = max(feedback, rows.excess(exact, known), key=nan_last)
            else:
                store = max(store, rows.steps(exact, transforms.range_search), key=nan_last)
        key, value = restore_keys(keys.rows, batch.position, transforms), rotate_values(values.rows, transforms)
        gather, outside = _gather_error(kernels, batch, key, value)
        decode_error = lse_error = 0.0
        if decode:
            for sizes in sorted(case.limits.batches):
                errors = _decode_errors(kernels, batch, sizes, key, value)
                decode_error = max(decode_error, errors[0], key=nan_last)
                lse_error = max(lse_error, errors[1], key=nan_last)
    seconds = time.monotonic() - begin
    return Errors(store, gather, decode_error, lse_error, stray + outside, seconds, feedback)


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
        self.whole = self.cache(POISON)
        transforms, sinks = random_transforms(case.transforms, case, device), None
        if case.shape.sinks is not None:
            sinks = (SINK_MEAN + QUERY_SPREAD * self.normal(case.shape.num_heads)).to(case.shape.sinks)
        self.pages = Pages(self.whole[:, :heads], case.layout, transforms, sinks)

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

    def store(self, kernels: KernelSet) -> int:
        """Store all tokens, few of them first; gives how many bytes or numbers lie where they do not belong."""
        heads = self.case.shape.num_kv_heads
        window = self._window()
        for begin, end, extra in self.case.portions:
            kept = None
            if window is not None:
                kept = WindowRows(window[:, :heads], self._window_slots(begin, end, extra))
            key, value, slots, positions = self._rows(begin, end, extra)
            kernels.store(key, value, slots, positions, self.pages, kept)
        taken = self.cache(0)
        for side in page_sides(taken[:, :heads], self.case.layout):
            for part in (side.codes, side.meta.view(torch.uint8)):
                part[self.block, :, self.offset] = 1
        stray = int(((self.whole != POISON) & (taken == 0)).sum())
        return stray if window is None else stray + self._window_strays(window)

    def store_late(self, kernels: KernelSet) -> int:
        """Store all tokens in two parts too, where the layer may; gives how many bytes differ from :meth:`store`'s."""
        size, heads = self.case.window_block_size, self.case.shape.num_kv_heads
        late = kernels.late_packing(self.case.layout.pair, self.pages.transforms) if size else None
        if late is None:
            return 0
        whole, blocks = self.cache(POISON), math.ceil(len(self.key) / size)
        pages = self.pages._replace(kv_cache=whole[:, :heads])
        shape = (blocks, heads, size, 2 * self.case.layout.head_size)
        window = torch.full(shape, torch.nan, dtype=self.case.dtype, device=self.device)
        for begin, end, extra in self.case.portions:
            key, value, slots, positions = self._rows(begin, end, extra)
            token = torch.arange(begin, end + extra, device=self.device)
            kept = WindowRows(window, torch.where(token < end, blocks * size - 1 - token, -1))
            late.keep_rows(key, value, kept)
            late.pack_rows([StepRows(pages, kept, slots, positions)])
        return int((whole != self.whole).sum())

    def _rows(self, begin: int, end: int, extra: int) -> Iterator[torch.Tensor]:
        """Keys, values, slots and positions of a portion."""
        slots = self.block * self.case.layout.block_size + self.offset
        for rows, fill in ((self.key, 0), (self.value, 0), (slots, -1), (self.position, 0)):
            yield torch.cat([rows[begin:end], rows.new_full((extra, *rows.shape[1:]), fill)])

    def stored(self, side: Side) -> StoredRows:
        """What one side of the pages holds of the tokens."""
        codes, meta = (each[self.block, :, self.offset] for each in (side.codes, side.meta))
        return StoredRows(side, side.format.dequantize(codes, meta), meta)

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


def _gather_error(kernels: KernelSet, batch: _Batch, key: torch.Tensor, value: torch.Tensor) -> tuple[float, int]:
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
        (relative_error(out[:total], rows[wanted]) for out, rows in zip(outs, (key, value), strict=True)), key=nan_last
    )
    return error, sum(int((~out[total:].isnan()).sum()) for out in outs)


def _decode_errors(
    kernels: KernelSet, batch: _Batch, sizes: tuple[int, int], key: torch.Tensor, value: torch.Tensor
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
        if (sinks := batch.pages.sinks) is not None:
            counted = torch.logaddexp(one.lse, sinks[:, None].float())
            one = Segment(one.output * (one.lse - counted).exp().T[..., None], counted)
        want.output[rows], want.lse[:, rows] = one.output, one.lse
    largest = value.abs().max()
    rounding = want.output.abs() * (torch.finfo(case.dtype).eps / 2)
    error = lse_error = 0.0
    for output, lse in results:
        apart = ((output.float() - want.output).abs() - rounding).max() / largest
        error = max(error, apart.item(), key=nan_last)
        if case.write_lse:
            apart = torch.where(lse == want.lse, 0.0, (lse - want.lse).abs()).max()
            lse_error = max(lse_error, apart.item(), key=nan_last)
    return error, lse_error


def _visible(position: torch.Tensor, num_keys: int, span: Span) -> torch.Tensor:
    """[num_queries, num_keys] bool: which tokens queries at ``position`` see."""
    token = torch.arange(num_keys, device=position.device)
    distance = position[:, None] - token
    seen = (distance >= span.skip_newest) & (token >= span.skip_first)
    return seen if span.sliding_window is None else seen & (distance < span.sliding_window)
