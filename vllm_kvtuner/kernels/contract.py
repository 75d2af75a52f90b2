"""What kernels on packed pages take and do, written once.

Records that are built once per layer or once per step, the contract of each operation, and the checks that every
implementation on a GPU makes. reference/ defines each operation in torch; triton/ and cuda/ implement them. Operations
have the same name and arguments everywhere (with ``_ref`` behind it in the reference).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.pages.layout import ALIGNMENT, PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms

MANY_DECODES = 256
"""Decodes of a batch that takes the kernels' variants for many rows."""


class AttentionShape(NamedTuple):
    """What of a layer's attention is the same for all its calls.

    Args:
        num_heads: query heads.
        num_kv_heads: KV heads, of which each serves num_heads / num_kv_heads query heads.
        head_size: numbers per row.
        scale: factor on the logits, 1 / sqrt(head_size) as a rule.
        logits_soft_cap: c > 0 replaces each logit x by c tanh(x / c).
        sinks: dtype of its attention sinks (Pages.sinks), None where it has none.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    logits_soft_cap: float = 0.0
    sinks: torch.dtype | None = None

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


class Span(NamedTuple):
    """Which cached tokens a segment of attention serves.

    Args:
        sliding_window: tokens a query sees, itself included, or None for all.
        skip_newest: tokens, the newest of those a query sees and itself the first, that another segment serves. They
            count as part of the sliding window.
        skip_first: tokens of a request, from its first on, that another segment serves likewise.
    """

    sliding_window: int | None = None
    skip_newest: int = 0
    skip_first: int = 0


class BatchLimits(NamedTuple):
    """What a batch has at most.

    Args:
        max_num_seqs: decodes.
        max_decode_query_len: query tokens of one decode.
    """

    max_num_seqs: int
    max_decode_query_len: int

    @property
    def batches(self) -> set[tuple[int, int]]:
        """(decodes, query tokens of each) of batches that between them take every variant of the decode kernels."""
        many, longest = min(self.max_num_seqs, MANY_DECODES), self.max_decode_query_len
        return {(1, 1), (many, 1), (1, longest), (many, longest), (1, MAX_DECODE_QUERY_LEN)}


class Pages(NamedTuple):
    """A layer's packed pages.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] uint8, chunks contiguous.
        layout: of each chunk.
        transforms: of keys and values before they are packed.
        sinks: [num_heads] fp32, fp16 or bf16, the layer's attention sinks, or None. Each is a logit in every softmax of
            its query head, as of one more token with a value of 0; neither scale nor soft cap apply to it. Attention
            over these pages counts them, also for a query that sees none of their tokens. Where attention over other
            tokens is merged with it, that has none, so that they count once.
    """

    kv_cache: torch.Tensor
    layout: PageLayout
    transforms: LayerTransforms
    sinks: torch.Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.kv_cache.shape[1]

    @property
    def positions(self) -> torch.Tensor | None:
        """[num_slots, num_axes] int32, the positions of cached tokens by slot, which a store writes and a key offset is
        given back by; None where a token has one position, its place in its request, or there is no offset."""
        several = self.transforms.positions
        return None if several is None else several.table(self.kv_cache.shape[0], self.layout.block_size)

    def check(self) -> None:
        """Kernels move 16 bytes at a time."""
        cache, layout = self.kv_cache, self.layout
        assert cache.dtype == torch.uint8 and cache.dim() == 4, (cache.dtype, cache.shape)
        content = layout.content_bytes
        assert cache.shape[2:] == (layout.block_size, content), (cache.shape, layout)
        block_stride, head_stride, *within = cache.stride()
        assert within == [content, 1], "a chunk must be contiguous"
        assert block_stride % ALIGNMENT == 0 and head_stride % ALIGNMENT == 0, cache.stride()
        assert cache.data_ptr() % ALIGNMENT == 0, "chunks must be aligned"


class Queries(NamedTuple):
    """The requests whose newest tokens attend in one step.

    Args:
        block_table: [num_reqs, max_blocks] int32; entries beyond a request's tokens may be stale.
        seq_lens: [num_reqs] int32, tokens in the cache, the queries' included; 0 for padding.
        query_start_loc: [num_reqs + 1] int32.
        max_query_len: query tokens that a request has at most.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    max_query_len: int

    @property
    def num_reqs(self) -> int:
        return self.block_table.shape[0]

    def check(self) -> None:
        """Kernels read int32 rows."""
        num_reqs = self.num_reqs
        assert self.seq_lens.shape == (num_reqs,) and self.query_start_loc.shape == (num_reqs + 1,)
        for lengths in (self.block_table, self.seq_lens, self.query_start_loc):
            assert lengths.dtype == torch.int32 and lengths.stride()[-1] == 1


class CachedTokens(NamedTuple):
    """A slice of each request's cached tokens.

    Args:
        block_table: [num_reqs, max_blocks] int32.
        cu_seq_lens: [num_reqs + 1] int32, rows of the output where each request's slice begins, and the end.
        seq_starts: [num_reqs] int32, the first token of each request's slice.
        num_tokens: of all slices, cu_seq_lens[-1], known to the host.
    """

    block_table: torch.Tensor
    cu_seq_lens: torch.Tensor
    seq_starts: torch.Tensor
    num_tokens: int

    def check(self) -> None:
        """Kernels read int32 rows."""
        num_reqs = self.block_table.shape[0]
        assert self.block_table.dtype == torch.int32 and self.block_table.stride()[1] == 1
        for lengths, count in ((self.cu_seq_lens, num_reqs + 1), (self.seq_starts, num_reqs)):
            assert lengths.shape == (count,) and lengths.dtype == torch.int32 and lengths.is_contiguous()


class WindowRows(NamedTuple):
    """Where the recent window of a layer keeps new tokens as they are.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size] of the keys' dtype, each key beside its value.
        slot_mapping: [at least the slots of the packed pages] int64, -1 for tokens that the window does not keep.
    """

    kv_cache: torch.Tensor
    slot_mapping: torch.Tensor

    def check(self, key: torch.Tensor, num_slots: int) -> None:
        """For ``num_slots`` tokens of ``key`` [..., num_kv_heads, head_size]."""
        cache = self.kv_cache
        assert cache.dtype == key.dtype and cache.dim() == 4, (cache.dtype, cache.shape)
        assert (cache.shape[1], cache.shape[3]) == (key.shape[1], 2 * key.shape[2]), (cache.shape, key.shape)
        assert cache.stride(3) == 1 and cache.data_ptr() % ALIGNMENT == 0, "rows must be contiguous and aligned"
        assert all(stride * cache.element_size() % ALIGNMENT == 0 for stride in cache.stride()[:3]), cache.stride()
        slots = self.slot_mapping
        assert slots.shape[0] >= num_slots and slots.is_contiguous() and slots.dtype == torch.int64, slots.shape


class Segment(NamedTuple):
    """Attention over a part of the tokens that queries see; segments merge by log-sum-exp.

    Args:
        output: [num_tokens, num_heads, head_size], normalized.
        lse: [num_heads, num_tokens] fp32, log-sum-exp of the logits; -inf where a query sees nothing of this part.
    """

    output: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def into(cls, output: torch.Tensor) -> "Segment":
        """A segment to be written, its output there."""
        num_tokens, num_heads, _ = output.shape
        return cls(output, torch.empty(num_heads, num_tokens, dtype=torch.float32, device=output.device))


class Launch(NamedTuple):
    """How a GPU kernel is launched, besides what it computes.

    Args:
        workspace: the scratch of the implementation; launches that run one after the other may share it.
        pass_query_len: query tokens of a request that a pass over its tokens has room for, max_query_len if None; less
            where few requests have as many as that.
        dependent: begin before the kernel before on the stream has ended, if both the card and that kernel allow it.
            That kernel must not write what says where tokens are (Queries).
        config: knobs of the implementation, or None for its own choice.
    """

    workspace: Any = None
    pass_query_len: int | None = None
    dependent: bool = False
    config: Any = None


class ReshapeAndCache(Protocol):
    """Store: transform, quantize, pack and scatter new tokens to their slots, in place."""

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None,
        pages: Pages,
        window: WindowRows | None = None,
    ) -> None:
        """Store tokens.

        Args:
            key: [num_tokens, num_kv_heads, head_size], after RoPE.
            value: as key.
            slot_mapping: [num_slots] int64, num_slots <= num_tokens; block * block_size + offset, or -1 for a token
                that is not stored. Tokens beyond num_slots are padding.
            positions: [>= num_slots] int64, the tokens' positions, or [num_axes, >= num_slots] where a token has
                several, which then also go to the pages' table of them; needed with a key offset only.
            pages: where they are packed.
            window: where a recent window keeps them too, as they are.
        """


class StepRows(NamedTuple):
    """A step's new tokens of one layer, which its recent window holds and its pages do not yet.

    Args:
        pages: where they are packed.
        window: where they are kept as they are.
        slot_mapping: of the pages, as a store's; each token that has a slot here has one in the window.
        positions: as a store's.
    """

    pages: Pages
    window: WindowRows
    slot_mapping: torch.Tensor
    positions: torch.Tensor | None


class KeepRows(Protocol):
    """The part of a store that the recent window is: new tokens as they are, to their slots there, in place."""

    def __call__(self, key: torch.Tensor, value: torch.Tensor, window: WindowRows) -> None:
        """Store tokens.

        Args:
            key: [num_tokens, num_kv_heads, head_size], after RoPE.
            value: as key.
            window: where they are kept.
        """


class PackRows(Protocol):
    """The other part, of many layers at once and later: pages then hold what a store would have written, bit by bit."""

    def __call__(self, layers: Sequence[StepRows]) -> None:
        """Pack tokens.

        Launches depend on shapes alone, as decoding's, so that a CUDA graph may hold them. Of layers in different KV
        cache groups the slot mappings are different tensors.

        Args:
            layers: whose, in the order in which they have stored; each with head count, head size and pair of its own.
        """


class LatePacking(NamedTuple):
    """A store in two parts.

    Args:
        keep_rows: what a layer stores while it is computed.
        pack_rows: what is done for all layers when the last of them has attended.
    """

    keep_rows: KeepRows
    pack_rows: PackRows


class GatherCache(Protocol):
    """Gather: dequantize a slice of each request's cached tokens back to model space, in place."""

    def __call__(self, pages: Pages, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor) -> None:
        """Read tokens back.

        Args:
            pages: where they are packed.
            tokens: which.
            key_out: [>= num_tokens, num_kv_heads, head_size], any float dtype.
            value_out: as key_out.
        """


class PagedAttention(Protocol):
    """Decode: attention of each request's newest tokens over its cached ones, themselves included, on packed pages."""

    def __call__(
        self,
        query: torch.Tensor,
        queries: Queries,
        pages: Pages,
        shape: AttentionShape,
        span: Span,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Attend.

        Token i of the n query tokens of a request stands at position seq_len - n + i and sees the tokens up to itself
        that ``span`` serves, beside the attention sinks of the pages. A request of seq_len 0 is padding: its rows of
        output become 0.

        GPU kernels take a :class:`Launch` besides, at most MAX_DECODE_QUERY_LEN query tokens of a request, and
        skip_newest less than a sliding window. They read nothing back to the host and allocate nothing: a launch
        depends on shapes alone, so a CUDA graph may hold it. Rows of output beyond the last query become 0, their
        log-sum-exp -inf.

        Args:
            query: [num_tokens, num_heads, head_size].
            queries: whose they are.
            pages: that they read.
            shape: of the layer.
            span: tokens that are served.
            output: [num_tokens, num_heads, head_size], written in place.
            lse: [num_heads, num_tokens] fp32, contiguous, written in place: log-sum-exp of each row's logits, its
                sink's included, by which segments merge. Where a query sees no token, its output is 0, and this is its
                sink's logit, or -inf without one.
        """


class WindowAttention(Protocol):
    """Decode beside a recent window: attention over what the window holds, merged into that over all other tokens."""

    def __call__(
        self,
        query: torch.Tensor,
        queries: Queries,
        rows: torch.Tensor,
        shape: AttentionShape,
        span: Span,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """Attend and merge, in place.

        A query sees what ``span`` leaves to others: its newest skip_newest tokens, itself the first, and the skip_first
        first of its request, as far as its sliding window reaches. Rows of output beyond the last query are left as
        they are.

        Args:
            query: [num_tokens, num_heads, head_size].
            queries: whose they are; the block table is the window's, of which only blocks of tokens that some query
                sees are read.
            rows: [num_blocks, num_kv_heads, block_size, 2 * head_size], each key beside its value.
            shape: of the layer.
            span: of the segment that ``output`` holds.
            output: as query, on entry attention over the tokens that span serves.
            lse: [num_heads, num_tokens] fp32, contiguous: log-sum-exp of that; -inf where there are none.
        """


class KernelSet(Protocol):
    """All operations on the packed pages of one layer: C++ or the reference on a CPU, GPU kernels on a card."""

    shape: AttentionShape
    span: Span

    @property
    def decode_kernel(self) -> str | None:
        """Name of what decodes; None before it is chosen, by the first call at the latest."""

    def forget(self) -> None:
        """Choose anew at the next call: the layer's pair or transforms have changed."""

    def reserve(self, pair: PrecisionPair, transforms: LayerTransforms, names: tuple[str, ...]) -> None:
        """Take the scratch of decoding, so that it is counted before the cache is sized.

        Args:
            pair: of the layer.
            transforms: of the layer, without statics that are bound later.
            names: of all its transforms; a key offset may leave the layer to another kernel.
        """

    def wake_up(self) -> None:
        """Make the scratch ready again after a sleep of level 2, which discards what lies beside the weights."""

    @property
    def store(self) -> ReshapeAndCache:
        """New tokens into the layer's pages."""

    def late_packing(self, pair: PrecisionPair, transforms: LayerTransforms) -> LatePacking | None:
        """The store in two parts, for a layer with a recent window of 16 bits; None where it gains nothing or is not
        served, so that the layer stores at once.

        Args:
            pair: of the layer.
            transforms: of the layer, statics included.
        """

    @property
    def gather(self) -> GatherCache:
        """Tokens back from the layer's pages."""

    def attend(
        self,
        query: torch.Tensor,
        queries: Queries,
        pages: Pages,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """As :class:`PagedAttention`, with the layer's shape and span."""

    def merge_window(
        self,
        query: torch.Tensor,
        queries: Queries,
        rows: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """As :class:`WindowAttention`, beside what :meth:`attend` has given."""

    def warm_up(
        self, pages: Pages, workspace: tuple[torch.Tensor, torch.Tensor], window_rows: torch.Tensor | None = None
    ) -> None:
        """Compile what the first requests would wait for, without storing anything.

        Args:
            pages: of the layer.
            workspace: [tokens, num_kv_heads, head_size] of the model's dtype, twice, to gather into.
            window_rows: cache of a recent window that keeps new tokens as they are, if the layer has one.
        """

    def warm_up_window(self, window_rows: torch.Tensor) -> None:
        """The same of :meth:`merge_window`, with the window's cache."""
