"""The compiled operations as a KernelSet: what serves layers on a CPU that has a C++ compiler."""

import ctypes
import dataclasses
import functools
import logging
import time
from typing import Any, NamedTuple

import torch

from vllm_kvtuner import envs
from vllm_kvtuner.kernels.checks import check_attention, check_rows, check_sinks
from vllm_kvtuner.kernels.contract import AttentionShape, CachedTokens, LatePacking, Pages, Queries, Span, WindowRows
from vllm_kvtuner.kernels.cpu import build
from vllm_kvtuner.kernels.cpu.arguments import ATTEND, CACHE, GATHER, LAYER, ROUNDING, STORE, TRANSFORMS
from vllm_kvtuner.kernels.reference.kernels import ReferenceKernels
from vllm_kvtuner.pages.codes import RANGE_FACTORS, UniformCodes, code_format
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import FEEDBACK_BITS, UNQUANTIZED, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms

logger = logging.getLogger(f"vllm.{__name__}")

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the sources' Type."""
KNOWN_TRANSFORMS = {
    "key_offset",
    "rotary",
    "key_equalization",
    "key_hadamard",
    "value_hadamard",
    "range_search",
    "key_feedback",
    "value_feedback",
}
"""Fields of LayerTransforms that the sources know."""
COMPILED = "compiled"
REFERENCE = "reference"


def cpu_kernels(shape: AttentionShape, span: Span) -> ReferenceKernels:
    """What serves a layer on this CPU: the compiled operations, or the reference where there are none.

    The log says once which, and why.

    Raises:
        ValueError: KVTUNER_CPU_KERNELS asks for the compiled ones where there are none.
    """
    _log_choice(shape.head_size)
    return ReferenceKernels(shape, span) if unavailable(shape.head_size) else CompiledKernels(shape, span)


def unavailable(head_size: int) -> str | None:
    """Why the compiled operations do not serve rows of ``head_size``, or None; compiles them where they are not kept.

    Raises:
        ValueError: as :func:`cpu_kernels`.
    """
    asked = envs.cpu_kernels()
    if asked == REFERENCE:
        return f"KVTUNER_CPU_KERNELS is {REFERENCE!r}"
    try:
        build.library(head_size)
    except build.BuildError as error:
        if asked == COMPILED:
            raise ValueError(f"KVTUNER_CPU_KERNELS is {COMPILED!r}, but {error}") from error
        return str(error)
    return None


def choice(head_size: int) -> str:
    """``compiled``, or ``reference`` and why, for rows of ``head_size``.

    Raises:
        ValueError: as :func:`cpu_kernels`.
    """
    reason = unavailable(head_size)
    return COMPILED if reason is None else f"{REFERENCE}, since {reason}"


@functools.cache
def _log_choice(head_size: int) -> None:
    begin = time.monotonic()
    reason = unavailable(head_size)
    if reason is None:
        seconds = time.monotonic() - begin
        logger.info("CPU kernels: compiled by %s, ready in %.1f s", build.compiler_version(), seconds)
    else:
        logger.warning("CPU kernels: the reference in PyTorch, which is several times slower, since %s", reason)


class _Layer(NamedTuple):
    """A layer's pages as the compiled operations know them.

    Args:
        arguments: of the sources' Layer.
        address: of that.
        kept: what its pointers lead to.
    """

    arguments: Any
    address: int
    kept: tuple[Any, ...]


class CompiledKernels(ReferenceKernels):
    """Store, gather and decode of a layer in C++; pages in a format that it does not know are left to the reference.

    Args:
        shape: of the layer's attention.
        span: cached tokens that decoding serves.
    """

    decode_kernel = COMPILED

    def __init__(self, shape: AttentionShape, span: Span) -> None:
        super().__init__(shape, span)
        self._library = build.library(shape.head_size)
        self._layer: tuple[Pages, _Layer] | None = None
        self._window: tuple[torch.Tensor, _Layer] | None = None

    def forget(self) -> None:
        """The layer's transforms have changed."""
        self._layer = None

    def serves(self, pages: Pages) -> bool:
        """As the function; what a layer hands over again and again is not looked at again."""
        return (self._layer is not None and self._layer[0] is pages) or serves(pages)

    def late_packing(self, pair: PrecisionPair, transforms: LayerTransforms) -> LatePacking | None:
        """A store at once reads new rows where the model has put them, and nothing waits for it."""
        return None

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        positions: torch.Tensor | None,
        pages: Pages,
        window: WindowRows | None = None,
    ) -> None:
        """As the contract's ReshapeAndCache."""
        if not self.serves(pages):
            super().store(key, value, slot_mapping, positions, pages, window)
            return
        key, value = _rows(key), _rows(value)
        assert value.shape == key.shape and value.dtype == key.dtype, (key.shape, value.shape)
        assert slot_mapping.dtype == torch.int64 and slot_mapping.is_contiguous()
        arguments = STORE.structure(
            layer=self._of(pages).address,
            key=key.data_ptr(),
            value=value.data_ptr(),
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            slots=slot_mapping.data_ptr(),
            type=TYPES[key.dtype],
            num_slots=slot_mapping.shape[0],
            num_kv_heads=key.shape[1],
            threads=torch.get_num_threads(),
        )
        if pages.transforms.key_offset is not None:
            assert positions is not None and positions.dtype == torch.int64 and positions.is_contiguous()
            arguments.positions = positions.data_ptr()
        if window is not None:
            window.check(key, slot_mapping.shape[0])
            arguments.window = self._of_window(window.kv_cache).arguments.cache
            arguments.window_slots = window.slot_mapping.data_ptr()
        self._library.kvtuner_store(ctypes.byref(arguments))

    def gather(self, pages: Pages, tokens: CachedTokens, key_out: torch.Tensor, value_out: torch.Tensor) -> None:
        """As the contract's GatherCache."""
        if not self.serves(pages):
            super().gather(pages, tokens, key_out, value_out)
            return
        tokens.check()
        for rows in (key_out, value_out):
            check_rows(rows)
            assert rows.shape[0] >= tokens.num_tokens and rows.dtype == key_out.dtype, (rows.shape, rows.dtype)
        arguments = GATHER.structure(
            layer=self._of(pages).address,
            block_table=tokens.block_table.data_ptr(),
            cu_seq_lens=tokens.cu_seq_lens.data_ptr(),
            seq_starts=tokens.seq_starts.data_ptr(),
            key_out=key_out.data_ptr(),
            value_out=value_out.data_ptr(),
            table_stride=tokens.block_table.stride(0),
            key_stride=key_out.stride(0),
            value_stride=value_out.stride(0),
            type=TYPES[key_out.dtype],
            num_reqs=tokens.block_table.shape[0],
            num_tokens=tokens.num_tokens,
            num_kv_heads=pages.num_kv_heads,
            threads=torch.get_num_threads(),
        )
        self._library.kvtuner_gather(ctypes.byref(arguments))

    def attend(
        self,
        query: torch.Tensor,
        queries: Queries,
        pages: Pages,
        output: torch.Tensor,
        lse: torch.Tensor | None = None,
    ) -> None:
        """As the contract's PagedAttention, with the layer's shape and span; rows beyond the last query become 0."""
        if not self.serves(pages):
            super().attend(query, queries, pages, output, lse)
            return
        check_sinks(pages, self.shape)
        arguments = self._arguments(query, queries, output, lse)
        arguments.layer = self._of(pages).address
        if pages.sinks is not None:
            # Read anew, since a model's weights, these among them, may be loaded again.
            sinks = pages.sinks.float().contiguous()
            arguments.sinks = sinks.data_ptr()
        self._library.kvtuner_attend(ctypes.byref(arguments))

    def merge_window(
        self,
        query: torch.Tensor,
        queries: Queries,
        rows: torch.Tensor | Pages,
        output: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        """As the contract's WindowAttention; also of a window that packs its tokens."""
        if isinstance(rows, torch.Tensor):
            layer = self._of_window(rows)
        elif serves(rows):
            layer = _layer(rows)
        else:
            super().merge_window(query, queries, rows, output, lse)
            return
        arguments = self._arguments(query, queries, output, lse)
        arguments.layer, arguments.in_window = layer.address, True
        self._library.kvtuner_attend(ctypes.byref(arguments))

    def _arguments(self, query: torch.Tensor, queries: Queries, output: torch.Tensor, lse: torch.Tensor | None) -> Any:
        """Of attention, but for what is attended to."""
        shape, span = self.shape, self.span
        check_attention(query, queries, shape, output, lse)
        return ATTEND.structure(
            query=query.data_ptr(),
            output=output.data_ptr(),
            lse=0 if lse is None else lse.data_ptr(),
            block_table=queries.block_table.data_ptr(),
            seq_lens=queries.seq_lens.data_ptr(),
            query_start_loc=queries.query_start_loc.data_ptr(),
            query_stride=query.stride(0),
            output_stride=output.stride(0),
            lse_stride=0 if lse is None else lse.stride(0),
            table_stride=queries.block_table.stride(0),
            type=TYPES[query.dtype],
            output_type=TYPES[output.dtype],
            num_reqs=queries.num_reqs,
            num_tokens=query.shape[0],
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            sliding_window=span.sliding_window or 0,
            skip_newest=span.skip_newest,
            skip_first=span.skip_first,
            threads=torch.get_num_threads(),
            scale=shape.scale,
            soft_cap=shape.logits_soft_cap,
        )

    def _of(self, pages: Pages) -> _Layer:
        """Kept for the pages of the last call, which a layer hands over again and again."""
        if self._layer is None or self._layer[0] is not pages:
            self._layer = pages, _layer(pages)
        return self._layer[1]

    def _of_window(self, rows: torch.Tensor) -> _Layer:
        """Likewise of a window's rows [num_blocks, num_kv_heads, block_size, 2 * head_size]."""
        if self._window is None or self._window[0] is not rows:
            arguments = LAYER.structure(cache=_plain_cache(rows))
            self._window = rows, _Layer(arguments, ctypes.addressof(arguments), (rows,))
        return self._window[1]


def serves(pages: Pages) -> bool:
    """Whether the compiled operations know all that the pages are: formats of codes, and no transform added since."""
    layout, transforms = pages.layout, pages.transforms
    if any(type(code_format(bits)) is not UniformCodes for bits in (layout.k_bits, layout.v_bits)):
        return False
    if transforms.positions is not None:  # their table is read by the reference alone
        return False
    names = (field.name for field in dataclasses.fields(transforms))
    return not any(getattr(transforms, name) for name in names if name not in KNOWN_TRANSFORMS)


def _rows(rows: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, head_size] in which a token's heads are contiguous."""
    return rows if rows.stride()[1:] == (rows.shape[2], 1) else rows.contiguous()


def _plain_cache(rows: torch.Tensor) -> Any:
    """Of a window's rows [num_blocks, num_kv_heads, block_size, 2 * head_size], each key beside its value."""
    block, head, token, _ = (stride * rows.element_size() for stride in rows.stride())
    bits = UNQUANTIZED.k_bits
    return CACHE.structure(
        data=rows.data_ptr(),
        block_stride=block,
        head_stride=head,
        token_stride=token,
        block_size=rows.shape[2],
        type=TYPES[rows.dtype],
        k_bits=bits,
        v_bits=bits,
    )


def _layer(pages: Pages) -> _Layer:
    pages.check()
    layout, transforms = pages.layout, pages.transforms
    block, head, *_ = pages.kv_cache.stride()
    cache = CACHE.structure(
        data=pages.kv_cache.data_ptr(),
        block_stride=block,
        head_stride=head,
        block_size=layout.block_size,
        k_bits=layout.k_bits,
        v_bits=layout.v_bits,
        k_codes=layout.k_codes_offset,
        v_codes=layout.v_codes_offset,
        k_meta=layout.k_meta_offset,
        v_meta=layout.v_meta_offset,
    )
    kept: list[Any] = []

    def pointer(numbers: torch.Tensor | None) -> int:
        if numbers is None:
            return 0
        numbers = numbers.float().contiguous()
        kept.append(numbers)
        return numbers.data_ptr()

    def rounding(bits: int, feedback: RoundFeedback | None) -> Any:
        codes = code_format(bits)
        common = {"bits": bits, "levels": codes.levels}
        if feedback is not None and bits in FEEDBACK_BITS:
            ranges = feedback.range_factors[bits]
            return ROUNDING.structure(
                ranges=pointer(ranges),
                columns=pointer(feedback.coefficients.mT),
                weights=pointer(feedback.weights),
                num_ranges=len(ranges),
                **common,
            )
        factors = RANGE_FACTORS if transforms.range_search and bits < 8 else (1.0,)
        ranges = torch.tensor(
            [(factor / codes.levels, 0.5 * (1.0 - factor)) for factor in factors], dtype=torch.float32
        )
        return ROUNDING.structure(ranges=pointer(ranges), num_ranges=len(factors), **common)

    rotary = transforms.rotary if transforms.key_offset is not None else None
    arguments = LAYER.structure(
        cache=cache,
        transforms=TRANSFORMS.structure(
            offset=pointer(transforms.key_offset),
            table=pointer(None if rotary is None else rotary.cos_sin),
            equalization=pointer(transforms.key_equalization),
            rotary_dim=0 if rotary is None else rotary.rotary_dim,
            is_neox=rotary is not None and rotary.is_neox,
            key_hadamard=transforms.key_hadamard,
            value_hadamard=transforms.value_hadamard,
        ),
        key=rounding(layout.k_bits, transforms.key_feedback),
        value=rounding(layout.v_bits, transforms.value_feedback),
    )
    return _Layer(arguments, ctypes.addressof(arguments), tuple(kept))
