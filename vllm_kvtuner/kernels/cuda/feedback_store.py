"""Launch feedback_store.cu: store of a layer whose keys, values or both are rounded with feedback, in one kernel."""

import math
from typing import NamedTuple

import torch

from vllm_kvtuner.kernels import arguments
from vllm_kvtuner.kernels.arguments import Arguments, Field
from vllm_kvtuner.kernels.cuda.build import BuiltKernel, Source, build, kept_with_transforms
from vllm_kvtuner.kernels.cuda.rows import NUM_WARPS, STORE_FIELDS, StoreVariant, wide_lanes
from vllm_kvtuner.pages.feedback import BLOCK, RoundFeedback
from vllm_kvtuner.pages.transforms import SIDES, LayerTransforms

MIN_CTAS = {1: 4, 2: 3, 3: 3}
"""Of a multiprocessor, by ranges, with registers enough not to spill; fewer where shared memory has no room."""
MOST_SHARED_BYTES, OTHER_SHARED_BYTES = 228 << 10, 2 << 10
"""Of the multiprocessor that has most, and what a CTA takes besides its dynamic shared memory."""
NEAREST_SHARE = 8
"""Of a card's CTAs, one in as many stores a side without feedback, whose rows take about a tenth of the work."""
ARGUMENTS = Arguments(
    *STORE_FIELDS,
    *(
        field
        for side in SIDES
        for field in (
            Field("const float*", f"{side}_ranges", "[ranges][2], factors on maximum - minimum"),
            Field("const float*", f"{side}_triangles", "coefficients within blocks of 16 channels, and weights"),
            Field(
                "const u8*", f"{side}_fragments", "coefficients of blocks on others, as matrix instructions take them"
            ),
        )
    ),
    Field("u32", "feedback_ctas", "CTAs that round with feedback, before those that do not"),
)


class FeedbackTables(NamedTuple):
    """What the kernel reads of a side's round feedback.

    Args:
        ranges: [ranges, 2] fp32, as RoundFeedback has them.
        triangles: [num_kv_heads, blocks, floats] fp32, the coefficients within each block of 16 channels, those of
            channel 15 on 0 to 14 first, each channel's filled up to 4; then the 16 weights.
        fragments: [num_kv_heads, pairs of blocks, 32, 8] fp16, coefficients of a later block's channels on an earlier
            one's, as the 32 lanes of m16n8k16 take two operands B; number later (later - 1) / 2 + earlier of pairs.
    """

    ranges: torch.Tensor
    triangles: torch.Tensor
    fragments: torch.Tensor

    @classmethod
    def of(cls, feedback: RoundFeedback, bits: int) -> "FeedbackTables":
        """Those for codes of ``bits``."""
        factors = feedback.factors
        heads, size, _ = factors.shape
        blocks = size // BLOCK
        pairs = [(earlier, later) for later in range(blocks) for earlier in range(later)]
        earlier, later = torch.tensor(pairs, device=factors.device).view(-1, 2).unbind(1)
        # Channel: block, half j, g; channel behind: block, half h, t, one of two. A lane is (g, t), its words (j, h).
        whole = factors.view(heads, blocks, 2, 8, blocks, 2, 4, 2).permute(0, 1, 4, 3, 6, 2, 5, 7)
        fragments = whole[:, earlier, later].reshape(heads, len(pairs), 32, 8)
        inside = factors.float().view(heads, blocks, BLOCK, blocks, BLOCK).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        triangles = torch.cat([inside[..., _TRIANGLE[0], _TRIANGLE[1]] * _TRIANGLE[2].to(factors.device),
                               inside.diagonal(dim1=2, dim2=3).square()], dim=-1)  # fmt: skip
        return cls(feedback.range_factors[bits], triangles.contiguous(), fragments.contiguous())


def _triangle() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows and columns within a block of what stands in a triangle, and 1, or 0 for what fills it up."""
    places = [
        (min(row, column), column, float(row < column))
        for column in reversed(range(1, BLOCK))
        for row in range(math.ceil(column / 4) * 4)
    ]
    rows, columns, present = zip(*places, strict=True)
    return torch.tensor(rows), torch.tensor(columns), torch.tensor(present)


_TRIANGLE = _triangle()


class FeedbackVariant(NamedTuple):
    """What a compiled store with round feedback depends on besides the layer's transforms.

    Args:
        store: as without.
        ranges: that are tried for a key and for a value, 0 for nearest codes.
    """

    store: StoreVariant
    ranges: tuple[int, int]

    @property
    def group_rows(self) -> int:
        """Tokens that a CTA rounds at a time.

        Fewer of larger heads, so that any card's shared memory holds them, and where there are few, each of which
        then waits for fewer.
        """
        rows = self.store.rows
        many = rows.most_lanes == wide_lanes(rows.layout.head_size)
        return 32 if many and rows.layout.head_size <= 128 else 16

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA, as FeedbackMemory of store/feedback.cuh has it."""
        size, rows = self.store.rows.layout.head_size, self.group_rows
        blocks = size // BLOCK
        tables = blocks * 160 * 4 + (blocks * (blocks - 1) // 2 * 512 if size <= 128 else 0)
        copy = (2 * size + 16) + (size + 16) + (BLOCK + 4) * 4 + 4
        return tables + rows * ((size + 4) * 4 + 8 + 4) + max(self.ranges) * rows * copy

    def macros(self, transforms: LayerTransforms) -> dict[str, int]:
        k_ranges, v_ranges = self.ranges
        return {
            **self.store.macros(transforms),
            "MIN_CTAS": min(MIN_CTAS[max(self.ranges)], MOST_SHARED_BYTES // (self.shared_bytes + OTHER_SHARED_BYTES)),
            "K_RANGES": k_ranges,
            "V_RANGES": v_ranges,
            "FEEDBACK_ROWS": self.group_rows,
            "SHARED_BYTES": self.shared_bytes,
        }


def rounded_ranges(transforms: LayerTransforms, bits: tuple[int, int]) -> tuple[int, int]:
    """Ranges that are tried for keys and values of as many bits, 0 for sides that take nearest codes."""
    keys, values = (
        0 if (feedback := transforms.feedback(side, of_side)) is None else len(feedback.ranges[of_side])
        for side, of_side in zip(SIDES, bits, strict=True)
    )
    return keys, values


def source(transforms: LayerTransforms, variant: FeedbackVariant) -> Source:
    """What is compiled for a variant of a layer with the transforms."""
    headers = {**variant.store.rows.headers(), arguments.HEADER: ARGUMENTS.declaration}
    return Source("feedback_store", tuple(variant.macros(transforms).items()), tuple(headers.items()))


@kept_with_transforms
def _build(transforms: LayerTransforms, variant: FeedbackVariant, device: torch.device) -> BuiltKernel:
    return build(source(transforms, variant), 32 * NUM_WARPS, variant.shared_bytes, device)


@kept_with_transforms
def _tables(transforms: LayerTransforms, side: str, bits: int) -> FeedbackTables:
    feedback = transforms.feedback(side, bits)
    assert feedback is not None
    return FeedbackTables.of(feedback, bits)


def table_addresses(transforms: LayerTransforms, bits: tuple[int, int]) -> dict[str, int]:
    """Arguments that are a layer's round feedback, of the sides that have it; the tables live as its transforms do."""
    given = {}
    for side, of_side, ranges in zip(SIDES, bits, rounded_ranges(transforms, bits), strict=True):
        if ranges:
            for name, table in _tables(transforms, side, of_side)._asdict().items():
                given[f"{side}_{name}"] = table.data_ptr()
    return given


def share_ctas(variant: FeedbackVariant, num_slots: int, max_ctas: int) -> tuple[int, int]:
    """How many CTAs of ``max_ctas`` round tokens with feedback, and how many store the other side."""
    rows = variant.store.rows
    groups = nearest = 0
    for lanes, ranges in zip(rows.lanes, variant.ranges, strict=True):
        if ranges:
            groups += math.ceil(num_slots / variant.group_rows) * rows.num_kv_heads
        else:
            nearest = math.ceil(math.ceil(num_slots * lanes / 32) * rows.num_kv_heads / NUM_WARPS)
    nearest = min(nearest, math.ceil(max_ctas / NEAREST_SHARE))
    return min(groups, max(max_ctas - nearest, 1)), nearest


def launch(
    transforms: LayerTransforms, store: StoreVariant, device: torch.device, num_slots: int, given: dict[str, int]
) -> None:
    """Store tokens of a layer that has round feedback on a side at least.

    Args:
        transforms: of the layer.
        store: as without round feedback.
        device: the pages'.
        num_slots: tokens that have a slot or -1.
        given: all arguments of a store without round feedback, by name.
    """
    bits = store.rows.layout.k_bits, store.rows.layout.v_bits
    variant = FeedbackVariant(store, rounded_ranges(transforms, bits))
    kernel = _build(transforms, variant, device)
    feedback_ctas, nearest = share_ctas(variant, num_slots, kernel.max_ctas)
    given.update(table_addresses(transforms, bits), feedback_ctas=feedback_ctas)
    kernel.launch(feedback_ctas + nearest, ARGUMENTS.structure(**given))
