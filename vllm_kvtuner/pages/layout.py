"""Byte layout of a packed KV cache page, and every number that follows from it.

The only place with byte arithmetic: kernels, KV cache specs, tools and docs read sizes from here. No torch.

A page holds, per KV head, one contiguous *chunk* of ``block_size`` tokens, in this order, each part 16-byte aligned::

    key codes    [block_size][head_size * k_bits / 8]    value codes  [block_size][head_size * v_bits / 8]
    key meta     [block_size](scale, minimum) fp16       value meta   [block_size](scale, minimum) fp16

Codes are packed along head_size: with ``n = 8 / bits`` codes per byte, byte ``j`` of a row holds dimensions
``j, j + D/n, j + 2D/n, ...`` from the low bits up (D = head_size). Writing one token touches only its own bytes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

PAGE_FORMAT = 1
"""Counts up where bytes of a page come to mean something else, so that what an older release has put into files is not
read."""
QUANTIZED_BITS = (2, 4, 8)
BITS = (*QUANTIZED_BITS, 16)
META_BYTES = 4
"""Bytes of one row's scale and minimum, two fp16 numbers."""
ALIGNMENT = 16
"""Bytes every part of a chunk is aligned to: one bulk copy or one 16-byte load."""
BLOCK_SIZE_MULTIPLE = 16
"""Tokens a block must be a multiple of, so that every part of a chunk is aligned."""
MAX_HEAD_SIZE = 256
"""Up to this head_size any rows that pack are served."""
LARGE_HEAD_SIZES = (512,)
"""Beyond it these, whose Hadamard matrix is one block that kernels take in steps."""
ROW_MULTIPLE = 4
"""Bytes a packed row must be a multiple of: decoding reads it by 32-bit words."""
FEEDBACK_BITS = (2, 4)
"""Bits of codes that round feedback serves; codes of 8 are nearest ones, whose errors are too small to matter."""
MAX_RANGES = 3
"""Ranges that round feedback tries for a row, at most."""
FP16_MAX = 65504.0
RECENT_BITS = (8, 16)
"""Bits in which a recent window keeps its tokens: K8V8 pages, or rows of the model's dtype."""

PAIR_FORM = re.compile(r"K(\d+)V(\d+)", re.IGNORECASE)
"""How a precision pair is written."""


@dataclass(frozen=True, order=True)
class PrecisionPair:
    """Bits of keys and of values of one layer, written ``K8V4``. K16V16 leaves the layer to vLLM's own cache.

    Args:
        k_bits: of a key's codes.
        v_bits: of a value's codes.

    Raises:
        ValueError: bits outside (2, 4, 8, 16), or 16 for only one of the two.
    """

    k_bits: int
    v_bits: int

    def __post_init__(self) -> None:
        for name, bits in (("k_bits", self.k_bits), ("v_bits", self.v_bits)):
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
                raise ValueError(f"{name} must be one of {BITS}, but got {bits!r}")
        if (self.k_bits == 16) != (self.v_bits == 16):
            raise ValueError(f"16 bits must be given to keys and values together (K16V16), but got {self.name}")

    @classmethod
    def parse(cls, text: str) -> "PrecisionPair":
        """Read ``K8V4`` (any case).

        Raises:
            ValueError: not of that form, or bits outside the set.
        """
        match = PAIR_FORM.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"a precision pair is written like K8V4, but got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        return f"K{self.k_bits}V{self.v_bits}"

    def __str__(self) -> str:
        return self.name

    @property
    def is_quantized(self) -> bool:
        return self.k_bits != 16

    @property
    def nominal_bits(self) -> Fraction:
        """Mean of key and value bits, scales not counted (what KVTuner's paper prints)."""
        return Fraction(self.k_bits + self.v_bits, 2)


QUANTIZED_PAIRS = tuple(PrecisionPair(k, v) for k in reversed(QUANTIZED_BITS) for v in reversed(QUANTIZED_BITS))
UNQUANTIZED = PrecisionPair(16, 16)


def unsupported_head_size(head_size: int, bits: int) -> str | None:
    """The rule that rows of ``head_size`` codes of ``bits`` break, or None if they pack."""
    if not 0 < head_size <= MAX_HEAD_SIZE and head_size not in LARGE_HEAD_SIZES:
        return f"head_size must be between 1 and {MAX_HEAD_SIZE}, or {', '.join(map(str, LARGE_HEAD_SIZES))}"
    if head_size * bits % (8 * ROW_MULTIPLE):
        return f"head_size * {bits} bits must fill a multiple of {ROW_MULTIPLE} bytes"
    return None


def content_bytes(pair: PrecisionPair, head_size: int) -> int:
    """Bytes one token takes in one KV head: both rows, scales and minima included."""
    if not pair.is_quantized:
        return 4 * head_size
    return head_size * (pair.k_bits + pair.v_bits) // 8 + 2 * META_BYTES


def stored_bits(pair: PrecisionPair, head_size: int) -> Fraction:
    """Bits a page holds per cached number, scales and minima included."""
    return Fraction(8 * content_bytes(pair, head_size), 2 * head_size)


def mean_bits(layers: Iterable[tuple[PrecisionPair, int, int]]) -> tuple[float, float]:
    """Nominal and stored bits per cached number over ``(pair, num_kv_heads, head_size)`` of each layer.

    Both are weighted by how many numbers a layer caches per token, so that stored bits are exactly
    16 * bytes per token / bytes per token in bf16; layers of one shape weigh the same.
    """
    numbers = nominal = stored = Fraction(0)
    for pair, num_kv_heads, head_size in layers:
        weight = Fraction(2 * num_kv_heads * head_size)
        numbers += weight
        nominal += weight * pair.nominal_bits
        stored += weight * stored_bits(pair, head_size)
    if not numbers:
        raise ValueError("mean_bits needs at least one layer, but got none")
    return float(nominal / numbers), float(stored / numbers)


def recent_block_size(block_size: int, block_bytes: int, token_bytes: int) -> int:
    """Tokens per block of recent windows: as many as let one block of the pool hold the pages of all their layers.

    Windows take their blocks from the pool that the packed pages come from, and a request holds whole blocks: larger
    ones hold more tokens than a window has, smaller ones leave most of a block empty.

    Args:
        block_size: tokens of a packed page.
        block_bytes: bytes of a block of the pool, the packed pages of all layers.
        token_bytes: bytes of one token in the windows of all layers that have one of this length.

    Returns:
        A divisor of block_size and a multiple of 16, at least 16 (then vLLM spreads the layers over several blocks).
    """
    sizes = (size for size in range(block_size, 0, -BLOCK_SIZE_MULTIPLE) if block_size % size == 0)
    return next((size for size in sizes if size * token_bytes <= block_bytes), BLOCK_SIZE_MULTIPLE)


def recent_blocks(tokens: int, block_size: int, fresh_tokens: int = 1) -> int:
    """Blocks that a request's recent window of ``tokens`` spans at most while ``fresh_tokens`` are computed."""
    return -(-(tokens - 1 + fresh_tokens) // block_size) + 1


@dataclass(frozen=True)
class PageLayout:
    """Bytes and offsets of one (block, KV head) chunk.

    Args:
        pair: a quantized precision pair.
        head_size: numbers per row.
        block_size: tokens per block, a multiple of 16.

    Raises:
        ValueError: K16V16, a head_size whose rows do not pack, or a block_size that is no multiple of 16.
    """

    pair: PrecisionPair
    head_size: int
    block_size: int

    def __post_init__(self) -> None:
        if not self.pair.is_quantized:
            raise ValueError(f"a packed page needs a quantized pair, but got {self.pair}")
        for bits in (self.pair.k_bits, self.pair.v_bits):
            if rule := unsupported_head_size(self.head_size, bits):
                raise ValueError(f"{rule}, but got head_size {self.head_size} with {self.pair}")
        if self.block_size <= 0 or self.block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(f"block_size must be a multiple of {BLOCK_SIZE_MULTIPLE}, but got {self.block_size}")

    @property
    def k_bits(self) -> int:
        return self.pair.k_bits

    @property
    def v_bits(self) -> int:
        return self.pair.v_bits

    @property
    def k_row_bytes(self) -> int:
        return self.head_size * self.k_bits // 8

    @property
    def v_row_bytes(self) -> int:
        return self.head_size * self.v_bits // 8

    @property
    def content_bytes(self) -> int:
        return content_bytes(self.pair, self.head_size)

    @property
    def k_codes_offset(self) -> int:
        return 0

    @property
    def v_codes_offset(self) -> int:
        return self.block_size * self.k_row_bytes

    @property
    def k_meta_offset(self) -> int:
        return self.v_codes_offset + self.block_size * self.v_row_bytes

    @property
    def v_meta_offset(self) -> int:
        return self.k_meta_offset + self.block_size * META_BYTES

    @property
    def chunk_bytes(self) -> int:
        return self.block_size * self.content_bytes

    def constants(self) -> dict[str, int]:
        """Every number of a chunk, by the names that kernels in C++ have for them: offsets and sizes in bytes."""
        return {
            "TOKENS": self.block_size,
            "K_ROW": self.k_row_bytes,
            "V_ROW": self.v_row_bytes,
            "META_ROW": META_BYTES,
            "K_CODES": self.k_codes_offset,
            "V_CODES": self.v_codes_offset,
            "K_META": self.k_meta_offset,
            "V_META": self.v_meta_offset,
            "BYTES": self.chunk_bytes,
        }
