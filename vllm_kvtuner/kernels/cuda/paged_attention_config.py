"""Knobs of paged_attention.cu and the heuristics that set them, apart from the launcher so that they can be swept."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

from vllm_kvtuner.pages.layout import PageLayout

MAX_CTAS_PER_MULTIPROCESSOR = 4
MAX_WARPS_PER_MULTIPROCESSOR = 16
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the system takes of each CTA."""
PASS_ROWS = (4, 8, 16, 32, 64)
"""Query rows (heads of the group times query tokens) of one pass over the tokens."""
FEW_SEGMENTS = {4: 8, 8: 16, 16: 16, 32: 16, 64: 16}
"""By rows of a pass, requests times KV heads of the largest batches that larger CTAs serve."""
TEAM_WARPS = 4
"""Of a team, whose products are those of a warp group."""
TEAM_STAGE_TOKENS = 64
"""Cached tokens of a team's stage, 16 for each warp."""


class Multiprocessor(NamedTuple):
    """What the knobs depend on of a card.

    Args:
        shared_bytes: shared memory of a multiprocessor.
        warp_groups: whether it has matrix instructions of warp groups (sm_90a alone).
    """

    shared_bytes: int
    warp_groups: bool


@dataclass(frozen=True)
class DecodeConfig:
    """Knobs of one variant.

    Args:
        stage_tokens: cached tokens that a copy of a warp or team brings.
        num_stages: copies that a warp or team has in flight.
        min_ctas: CTAs per multiprocessor that registers and shared memory must allow.
        num_warps: of a CTA.
        team_warps: warps that share their stages: 1, or ``TEAM_WARPS``.
        fp16: products of fp16 numbers, each row in one column, instead of bytes, each row in two.
        query_registers: that a warp alone has for queries; 0: they come from shared memory.
        part_groups: groups of 16 tokens that a warp alone attends to at once.
    """

    stage_tokens: int
    num_stages: int
    min_ctas: int
    num_warps: int = 4
    team_warps: int = 1
    fp16: bool = False
    query_registers: int = 64
    part_groups: int = 2


class Needs(NamedTuple):
    """What a variant's knobs depend on besides rows and card.

    Args:
        layout: of the pages.
        offset_pairs: rotary pairs that the key offset keeps, 0 or a multiple of 8.
        query_terms: fp16 numbers that a query's number is the sum of: 2 where transforms fold it, else 1.
        few: whether there are so few segments (``FEW_SEGMENTS``) that most CTAs have a part of one. Then larger CTAs
            leave fewer parts.
    """

    layout: PageLayout
    offset_pairs: int = 0
    query_terms: int = 1
    few: bool = False


@functools.lru_cache(maxsize=1024)
def pass_rows(rows: int, needs: Needs, card: Multiprocessor) -> int:
    """Rows of a pass that serves ``rows`` query rows per KV head: few passes, of no more rows than that takes."""
    sizes = [size for size in PASS_ROWS if decode_config(size, needs, card) is not None]
    return next((size for size in sizes if rows <= size), sizes[-1])


def most_pass_rows(rows: int) -> int:
    """Of any layout and card."""
    return next((size for size in PASS_ROWS if rows <= size), PASS_ROWS[-1])


def decode_config(rows: int, needs: Needs, card: Multiprocessor) -> DecodeConfig | None:
    """Knobs for passes of so many rows, from sweeps on an H200; None if there are none that fit.

    As many CTAs as registers and shared memory allow, two stages (more only lengthen the way to memory), and stages as
    long as fit. See docs/notes/stages-and-rings.md and docs/notes/many-query-rows.md.
    """
    wanted = _wanted(rows, needs, card)
    return None if wanted is None else _fitting(wanted, rows, needs, card)


def _fitting(config: DecodeConfig, rows: int, needs: Needs, card: Multiprocessor) -> DecodeConfig | None:
    """The nearest knobs that fit the card's shared memory, or None."""
    block_size, least_warps = needs.layout.block_size, TEAM_WARPS if config.team_warps > 1 else 2

    def fits() -> bool:
        cta = shared_bytes(rows, needs, config)
        return config.min_ctas * (cta + RESERVED_SHARED_BYTES) <= card.shared_bytes

    while not fits() and config.min_ctas > 2:
        config = replace(config, min_ctas=config.min_ctas - 1)
    while not fits() and config.team_warps == 1 and config.stage_tokens > 16:
        config = replace(config, stage_tokens=config.stage_tokens // 2)
    while not fits() and config.min_ctas > 1:
        config = replace(config, min_ctas=config.min_ctas - 1)
    # Many offset pairs of a large head, which turn in steps of ANGLE_STEP.
    while not fits() and config.num_warps > least_warps:
        fewer = config.num_warps - TEAM_WARPS if config.team_warps > 1 else config.num_warps // 2
        config = replace(config, num_warps=fewer)
    while config.team_warps == 1 and block_size % config.stage_tokens and config.stage_tokens % block_size:
        config = replace(config, stage_tokens=config.stage_tokens // 2)
    return config if fits() else None


def _wanted(rows: int, needs: Needs, card: Multiprocessor) -> DecodeConfig | None:
    """Before what fits is looked at."""
    size, bits, few = needs.layout.head_size, needs.layout.pair.nominal_bits, needs.few
    long_rows = size > 128
    if rows <= 4:
        # Wide rows want long stages; narrow ones want warps, whose arithmetic limits them.
        return DecodeConfig(64, 2, 1, 8) if few else DecodeConfig(64, 2, 3 if bits < 3 and not long_rows else 2)
    if rows <= 8:
        # Bytes take fewer instructions up to here, but where rows are so narrow that those of rows count most.
        if size <= 64 and bits < 3:
            return DecodeConfig(64, 2, 1, 8, fp16=True) if few else DecodeConfig(64, 2, 4, fp16=True, query_registers=0)
        if long_rows and bits >= 6:
            return DecodeConfig(32, 2, 1, 4, fp16=True, query_registers=0)
        if few or (long_rows and bits >= 4):
            return DecodeConfig(32 if long_rows else 64, 2, 1, 8)
        return DecodeConfig(32 if long_rows else 64, 2, 2)
    if rows <= 16:
        if long_rows and 3 <= bits < 6 and _takes_teams(needs.layout, card):
            return DecodeConfig(TEAM_STAGE_TOKENS, 2, 1, 12, TEAM_WARPS, True)
        if long_rows:
            return DecodeConfig(32, 2, 2 if bits < 3 and not few else 1, 4, 1, True, 0, 1)
        return DecodeConfig(64, 2, 1, 8, fp16=True) if few else DecodeConfig(64, 2, 2, fp16=True)
    if _takes_teams(needs.layout, card):
        if rows <= 32:
            return DecodeConfig(TEAM_STAGE_TOKENS, 2, 1, 8 if long_rows else 12, TEAM_WARPS, True)
        return None if long_rows else DecodeConfig(TEAM_STAGE_TOKENS, 2, 1, 8, TEAM_WARPS, True)
    return None if long_rows or rows > 32 else DecodeConfig(64, 2, 2, 4, 1, True, 0, 1)


def _takes_teams(layout: PageLayout, card: Multiprocessor) -> bool:
    """Each warp of a team has a fourth of a stage's tokens, and of a value's dimensions: tiles of 16, whose codes are
    all those of whole bytes, or a part of one's."""
    whole = layout.block_size % TEAM_STAGE_TOKENS == 0 or TEAM_STAGE_TOKENS % layout.block_size == 0
    tiles, codes = layout.head_size // (16 * TEAM_WARPS), 8 // layout.v_bits
    even = layout.head_size % (16 * TEAM_WARPS) == 0 and (tiles % codes == 0 or codes % tiles == 0)
    return card.warp_groups and whole and even


def shared_bytes(rows: int, needs: Needs, config: DecodeConfig) -> int:
    """Dynamic shared memory of a CTA: at least the size of the kernel's struct."""
    layout, pairs = needs.layout, needs.offset_pairs
    size, warps, teams = layout.head_size, config.num_warps, config.num_warps // config.team_warps
    ring = teams * config.num_stages * config.stage_tokens * layout.content_bytes
    raw_queries = 2 * rows * size * 2
    offset = pairs * (16 + 48 * warps + 8 * rows)
    if config.fp16:
        outputs = teams * 8 * size * 4
        # Rows that four lanes do not share by whole words are filled up.
        filled = max(-(-size * layout.k_bits // 128) * 128 // layout.k_bits, 128)
        queries = needs.query_terms * rows * 2 * filled + 16 * rows
        turns = 2 if config.team_warps == 1 and config.stage_tokens == 64 else 1
        offset += pairs * warps * rows * 8 * turns
        weights = teams * config.stage_tokens * rows * 2 + warps * rows * 4 if config.team_warps > 1 else 0
        return ring + outputs + queries + raw_queries + weights + offset + 512 + 384 * max(warps, 2)
    outputs = teams * rows * size * 4
    queries = rows // 4 * 8 * (size + 16)
    if pairs > 8 or rows > 4 or config.stage_tokens == 16:  # else registers hold it
        offset += pairs * warps * rows // 4 * 64
    elif pairs:
        offset += 256
    return ring + outputs + queries + raw_queries + offset + 320 * max(warps, 2)
