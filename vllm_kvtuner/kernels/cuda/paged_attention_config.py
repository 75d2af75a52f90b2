"""Knobs of paged_attention.cu and the heuristics that set them, apart from the launcher so that they can be swept."""

from dataclasses import dataclass, replace

from vllm_kvtuner.pages.layout import PageLayout

MAX_CTAS_PER_MULTIPROCESSOR = 4
MAX_WARPS_PER_MULTIPROCESSOR = 16
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the system takes of each CTA."""
PASS_ROWS = (4, 8, 16, 32, 64)
"""Query rows (heads of the group times query tokens) of one pass over the tokens."""
FEW_SEGMENTS = {4: 8, 8: 16, 16: 16, 32: 16, 64: 16}
"""By rows of a pass, requests times KV heads of the largest batches that larger CTAs serve."""


@dataclass(frozen=True)
class DecodeConfig:
    """Knobs of one variant.

    Args:
        stage_tokens: cached tokens that a warp's copy brings.
        num_stages: copies that a warp has in flight.
        min_ctas: CTAs per multiprocessor that registers and shared memory must allow.
        num_warps: of a CTA.
    """

    stage_tokens: int
    num_stages: int
    min_ctas: int
    num_warps: int = 4
    team_warps: int = 1
    fp16: bool = False
    query_registers: int = 64
    part_groups: int = 2


def pass_rows(rows: int) -> int:
    """Rows of a pass that serves ``rows`` query rows per KV head."""
    return next((size for size in PASS_ROWS if rows <= size), PASS_ROWS[-1])


def decode_config(
    layout: PageLayout,
    rows: int,
    offset_pairs: int,
    shared_bytes_per_sm: int,
    few: bool = False,
    query_terms: int = 2,
) -> DecodeConfig:
    """Knobs for a layout, rows of a pass and a multiprocessor's shared memory, from sweeps on an H200.

    As many CTAs as registers and shared memory allow, two stages (more only lengthen the way to memory), and stages as
    long as fit. See docs/notes/stages-and-rings.md.

    Args:
        few: whether there are so few segments (``FEW_SEGMENTS``) that most CTAs have a part of one. Then larger CTAs
            leave fewer parts.
        query_terms: fp16 numbers that a query's number is the sum of, 2 where transforms fold it.
    """
    config = _few_rows(layout, few) if rows <= PASS_ROWS[0] else _many_rows(layout, rows, few)

    def fits() -> bool:
        cta = shared_bytes(layout, rows, config, offset_pairs, query_terms)
        return config.min_ctas * (cta + RESERVED_SHARED_BYTES) <= shared_bytes_per_sm

    least = config.num_warps // 2 if config.fp16 else 2
    while config.fp16 and not fits() and config.stage_tokens > 32:
        config = replace(config, stage_tokens=config.stage_tokens // 2)
    while not fits() and config.min_ctas > 2:
        config = replace(config, min_ctas=config.min_ctas - 1)
    while not fits() and config.stage_tokens > 16:
        config = replace(config, stage_tokens=config.stage_tokens // 2)
    while not fits() and config.min_ctas > 1:
        config = replace(config, min_ctas=config.min_ctas - 1)
    # Many offset pairs of a large head, which turn in steps of ANGLE_STEP.
    while not fits() and config.num_warps > least:
        config = replace(config, num_warps=config.num_warps // 2)
    while layout.block_size % config.stage_tokens and config.stage_tokens % layout.block_size:
        config = replace(config, stage_tokens=config.stage_tokens // 2)
    return config


def _few_rows(layout: PageLayout, few: bool) -> DecodeConfig:
    """Wide rows want long stages; narrow ones want warps, whose arithmetic limits them."""
    if few:
        return DecodeConfig(64, 2, min_ctas=1, num_warps=8)
    return DecodeConfig(64, 2, min_ctas=3 if layout.pair.nominal_bits < 3 and layout.head_size <= 128 else 2)


def _many_rows(layout: PageLayout, rows: int, few: bool) -> DecodeConfig:
    """As many warps as registers for the rows' sums allow."""
    long_rows = layout.head_size > 128
    min_ctas = 3 if rows == 8 and not long_rows else 2
    config = DecodeConfig(64, 2, min_ctas, 4, fp16=True, query_registers=64 if rows <= 16 and not long_rows else 0)
    if few or (long_rows and rows > 8):
        config = replace(config, min_ctas=1, num_warps=8)
    return config


def shared_bytes(layout: PageLayout, rows: int, config: DecodeConfig, offset_pairs: int, query_terms: int = 2) -> int:
    """Dynamic shared memory of a CTA: at least the size of the kernel's struct."""
    size, teams = layout.head_size, config.num_warps // config.team_warps
    ring = teams * config.num_stages * config.stage_tokens * layout.content_bytes
    raw_queries = 2 * rows * size * 2
    offset = offset_pairs * (16 + 48 * config.num_warps + 8 * rows)
    if config.fp16:
        outputs = teams * 8 * size * 4
        queries = query_terms * rows * 2 * max(size, 128) + 16 * rows
        turns = 2 if config.team_warps == 1 and config.stage_tokens == 64 else 1
        offset += offset_pairs * config.num_warps * rows * 8 * turns
        weights = teams * config.stage_tokens * rows * 2 + config.num_warps * rows * 4 if config.team_warps > 1 else 0
        return ring + outputs + queries + raw_queries + weights + offset + 512 + 384 * max(config.num_warps, 2)
    outputs = teams * rows * size * 4
    queries = rows // 4 * 8 * (size + 16)
    if offset_pairs > 8 or rows > PASS_ROWS[0] or config.stage_tokens == 16:  # else registers hold it
        offset += offset_pairs * config.num_warps * rows // 4 * 64
    elif offset_pairs:
        offset += 256
    return ring + outputs + queries + raw_queries + offset + 320 * max(config.num_warps, 2)
