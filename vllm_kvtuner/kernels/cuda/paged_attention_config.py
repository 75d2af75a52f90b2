"""Knobs of paged_attention.cu and the heuristics that set them, apart from the launcher so that they can be swept."""

from dataclasses import dataclass

from vllm_kvtuner.pages.layout import PageLayout

MAX_CTAS_PER_MULTIPROCESSOR = 4
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the system takes of each CTA."""
PASS_ROWS = (4, 8)
"""Query rows (heads of the group times query tokens) of one pass over the tokens."""
FEW_SEGMENTS = {4: 8, 8: 16}
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


def pass_rows(rows: int) -> int:
    """Rows of a pass that serves ``rows`` query rows per KV head."""
    return PASS_ROWS[0] if rows <= PASS_ROWS[0] else PASS_ROWS[1]


def decode_config(
    layout: PageLayout, rows: int, offset_pairs: int, shared_bytes_per_sm: int, few: bool = False
) -> DecodeConfig:
    """Knobs for a layout, rows of a pass and a multiprocessor's shared memory, from sweeps on an H200.

    As many CTAs as registers and shared memory allow, two stages (more only lengthen the way to memory), and stages as
    long as fit. See docs/notes/stages-and-rings.md.

    Args:
        few: whether there are so few segments (``FEW_SEGMENTS``) that most CTAs have a part of one. Then larger CTAs
            leave fewer parts.
    """
    bits = layout.pair.nominal_bits
    # Wide rows want long stages; narrow ones want warps, whose arithmetic limits them.
    min_ctas = 2 if bits >= 3 else 3
    long_rows = layout.head_size > 128
    if rows > PASS_ROWS[0] or long_rows:
        min_ctas = 2
    num_stages, stage_tokens, num_warps = 2, 64, 4
    if rows > PASS_ROWS[0] and long_rows:
        stage_tokens = 32  # by registers
    if few or (rows > PASS_ROWS[0] and long_rows and bits >= 4):
        min_ctas, num_warps = 1, 8

    def fits() -> bool:
        config = DecodeConfig(stage_tokens, num_stages, min_ctas, num_warps)
        cta = shared_bytes(layout, rows, config, offset_pairs)
        return min_ctas * (cta + RESERVED_SHARED_BYTES) <= shared_bytes_per_sm

    while not fits() and min_ctas > 2:
        min_ctas -= 1
    while not fits() and stage_tokens > 16:
        stage_tokens //= 2
    while not fits() and min_ctas > 1:
        min_ctas -= 1
    while not fits() and num_warps > 2:  # many offset pairs of a large head, which turn in steps of ANGLE_STEP
        num_warps //= 2
    while layout.block_size % stage_tokens and stage_tokens % layout.block_size:
        stage_tokens //= 2
    return DecodeConfig(stage_tokens, num_stages, min_ctas, num_warps)


def shared_bytes(layout: PageLayout, rows: int, config: DecodeConfig, offset_pairs: int) -> int:
    """Dynamic shared memory of a CTA: at least the size of the kernel's struct."""
    ring = config.num_warps * config.num_stages * config.stage_tokens * layout.content_bytes
    outputs = config.num_warps * rows * layout.head_size * 4
    queries = 2 * rows * layout.head_size * 2 + rows // 4 * 8 * (layout.head_size + 16)
    offset = offset_pairs * (16 + 48 * config.num_warps + 8 * rows)
    if offset_pairs > 8 or rows > PASS_ROWS[0] or config.stage_tokens == 16:  # else registers hold it
        offset += offset_pairs * config.num_warps * rows // 4 * 64
    elif offset_pairs:
        offset += 256
    return ring + outputs + queries + offset + 320 * max(config.num_warps, 2)
