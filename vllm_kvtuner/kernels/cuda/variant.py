"""Variants of paged_attention.cu: all that a compiled kernel depends on, and what the compiler gets for it."""

from typing import NamedTuple

import torch

from vllm_kvtuner.kernels import arguments
from vllm_kvtuner.kernels.arguments import Arguments, Field
from vllm_kvtuner.kernels.contract import Span
from vllm_kvtuner.kernels.cuda import page_layout
from vllm_kvtuner.kernels.cuda.build import Source
from vllm_kvtuner.kernels.cuda.paged_attention_config import (
    DecodeConfig,
    Multiprocessor,
    Needs,
    decode_config,
    shared_bytes,
)
from vllm_kvtuner.kernels.cuda.rows import NUMBER_TYPES
from vllm_kvtuner.pages.layout import PageLayout
from vllm_kvtuner.pages.transforms import ANGLE_STEP, LayerTransforms

ARGUMENTS = Arguments(
    Field("const u16*", "query", "[tokens][heads][HEAD_SIZE]"),
    Field("u16*", "output", "likewise"),
    Field("const u8*", "kv_cache", "chunks"),
    Field("const int*", "block_table", "[requests][blocks]"),
    Field("const int*", "seq_lens", "[requests]"),
    Field("const int*", "query_start_loc", "[requests + 1]"),
    Field("float*", "partial", "[2 CTAs][PASS_ROWS][HEAD_SIZE], unnormalized"),
    Field("float2*", "partial_state", "[2 CTAs][PASS_ROWS], reference to base 2 and total"),
    Field("int*", "arrivals", "[segments], 0 between launches"),
    Field("const float*", "equalization", "[KV heads][HEAD_SIZE]"),
    Field("const float2*", "offset", "[KV heads][OFFSET_PAIRS], the offset's numbers before RoPE"),
    Field("const int*", "offset_dims", "[OFFSET_PAIRS], dimensions of a pair: first | second << 16"),
    Field("const int*", "offset_index", "[OFFSET_PAIRS], of the rotary embedding's pairs"),
    Field(
        "const float2*", "coarse_angles",
        "[positions / ANGLE_STEP][rotary_pairs], cosine and sine at every ANGLE_STEP-th position",
    ),
    Field(
        "const uint4*", "fine_angles",
        "[OFFSET_PAIRS / 8][ANGLE_STEP / 16][2 terms][32 lanes], A operands of 16 positions",
    ),
    Field("u64", "query_stride", "numbers from token to token"),
    Field("u64", "output_stride", "numbers from token to token"),
    Field("u64", "block_stride", "bytes"),
    Field("u64", "head_stride", "bytes"),
    Field("u64", "table_stride", "numbers"),
    Field("int", "num_reqs", "padding included"),
    Field("int", "num_tokens", "rows of query and output"),
    Field("int", "num_kv_heads", "of the layer"),
    Field("int", "max_segments", "of a request"),
    Field("int", "rotary_pairs", "of the rotary embedding"),
    Field("int", "min_query_len", "requests of fewer query tokens are another launch's"),
    Field("int", "max_query_len", "requests of more query tokens are another launch's"),
    Field("float", "scale_log2", "logits to base 2 per unit of q . k"),
    Field("float", "soft_cap_log2", "the cap to base 2"),
    Field("float*", "output_lse", "[heads][tokens], if WRITE_LSE"),
    Field("const u8*", "sinks", "[heads] of type SINK_NUMBERS, if SINKS"),
    Field("float*", "aside", "[CTAs][NUM_WARPS][PASS_ROWS][HEAD_SIZE / TEAM_WARPS + 16] sums, if FP16_PRODUCTS"),
)  # fmt: skip


class Variant(NamedTuple):
    """What a compiled kernel depends on besides the layer's transforms; made at every call, so it hashes fast.

    Args:
        layout: of the pages.
        group: query heads per KV head.
        pass_rows: query rows of a pass, one of ``PASS_ROWS``.
        dtype: of queries and outputs.
        span: tokens that are served.
        soft_cap: whether logits are capped.
        write_lse: whether log-sum-exps are wanted.
        few: whether the batch has few segments, see ``FEW_SEGMENTS``.
        config: knobs, or None for :func:`decode_config`'s.
        sinks: dtype of attention sinks, None for none.
    """

    layout: PageLayout
    group: int
    pass_rows: int
    dtype: torch.dtype
    span: Span = Span()
    soft_cap: bool = False
    write_lse: bool = False
    few: bool = False
    config: DecodeConfig | None = None
    sinks: torch.dtype | None = None

    def settle(self, transforms: LayerTransforms, card: Multiprocessor) -> "CompiledVariant":
        """With the layer's transforms, and knobs for a card."""
        needs = needs_of(self.layout, transforms, self.few)
        config = self.config or decode_config(self.pass_rows, needs, card)
        assert config is not None, "pass_rows() has chosen rows that fit"
        return CompiledVariant(self, transforms, needs, config)


def needs_of(layout: PageLayout, transforms: LayerTransforms, few: bool = False) -> Needs:
    """What knobs depend on of a layer."""
    offset = transforms.offset_pairs
    folded = transforms.key_hadamard or transforms.key_equalization is not None
    return Needs(layout, 0 if offset is None else len(offset.index), 2 if folded else 1, few)


class CompiledVariant(NamedTuple):
    """All that a compiled kernel depends on.

    Args:
        variant: of the call.
        transforms: of the layer.
        needs: what its knobs depend on.
        config: knobs.
    """

    variant: Variant
    transforms: LayerTransforms
    needs: Needs
    config: DecodeConfig

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return 32 * self.config.num_warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA."""
        return shared_bytes(self.variant.pass_rows, self.needs, self.config)

    def macros(self) -> dict[str, int]:
        variant, transforms, config = self.variant, self.transforms, self.config
        layout, span = variant.layout, variant.span
        return {
            "SHARED_BYTES": self.shared_bytes,
            "HEAD_SIZE": layout.head_size,
            "K_BITS": layout.k_bits,
            "V_BITS": layout.v_bits,
            "GROUP": variant.group,
            "PASS_ROWS": variant.pass_rows,
            "FP16_PRODUCTS": int(config.fp16),
            "TEAM_WARPS": config.team_warps,
            "QUERY_REGISTERS": config.query_registers,
            "MAX_PART_GROUPS": config.part_groups,
            "NUM_WARPS": config.num_warps,
            "STAGE_TOKENS": config.stage_tokens,
            "NUM_STAGES": config.num_stages,
            "MIN_CTAS": config.min_ctas,
            "QUERY_BF16": int(variant.dtype == torch.bfloat16),
            "KEY_HADAMARD": int(transforms.key_hadamard),
            "VALUE_HADAMARD": int(transforms.value_hadamard),
            "KEY_EQUALIZATION": int(transforms.key_equalization is not None),
            "OFFSET_PAIRS": self.needs.offset_pairs,
            "ANGLE_STEP": ANGLE_STEP,
            "WINDOW": span.sliding_window - span.skip_newest if span.sliding_window else 0,
            "SKIP_NEWEST": span.skip_newest,
            "SKIP_FIRST": span.skip_first,
            "WRITE_LSE": int(variant.write_lse),
            "SOFT_CAP": int(variant.soft_cap),
            "SINKS": int(variant.sinks is not None),
            "SINK_NUMBERS": 0 if variant.sinks is None else NUMBER_TYPES[variant.sinks],
        }

    def headers(self) -> dict[str, str]:
        chunk = self.variant.layout
        # What a stage holds of a chunk stands there as a chunk of fewer tokens.
        piece = PageLayout(chunk.pair, chunk.head_size, min(chunk.block_size, self.config.stage_tokens))
        return {
            page_layout.HEADER: page_layout.page_layout(Chunk=chunk, Piece=piece),
            arguments.HEADER: ARGUMENTS.declaration,
        }

    def source(self) -> Source:
        """What the compiler gets."""
        return Source(
            "paged_attention", tuple(self.macros().items()), tuple(self.headers().items()), self.config.team_warps > 1
        )
