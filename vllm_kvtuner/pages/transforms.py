"""Key and value transforms: applied at store time, folded into queries and outputs at read time.

With R_t the rotation of position t (the model's own table), m the key offset before RoPE, e one factor per RoPE
pair and W an orthonormal (block) Hadamard matrix, the cache holds, for the key K_t and the value V_t of a KV head,

    K'_t = ((K_t - R_t m) / e) W        V'_t = V_t W

so that a reader needs nothing per cached token but the offset's logit:

    q . K_t = ((q e) W) . K'_t + q . R_t m        sum_t P_t V_t = (sum_t P_t V'_t) W^T

An offset after RoPE would fit only the positions it was calibrated at; this one holds at any position.
"""

import functools
import math
from dataclasses import dataclass

import torch

from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import FEEDBACK_BITS, PrecisionPair
from vllm_kvtuner.pages.positions import TokenPositions

KEY, VALUE = SIDES = ("key", "value")
"""What a token has in the cache, in the order of its page."""
ANGLE_STEP = 32
"""Positions between the rows of :attr:`RotaryTable.coarse_angles`."""


@dataclass(frozen=True)
class RotaryTable:
    """The rotation a model applies to keys.

    Args:
        cos_sin: [max_position, rotary_dim], each row the cosines of the rotary_dim / 2 pairs and then the sines
            (scaling variants and their factors included).
        is_neox: True if pair i is dimensions (i, i + rotary_dim / 2), False if it is (2 i, 2 i + 1). Dimensions from
            rotary_dim on are not rotated.
        frequencies: [rotary_dim / 2] fp64 on the CPU, radians per position, where every angle is that times the
            position; None for other rotations.
        amplitude: factor on all cosines and sines.
        positions: where a token has several positions, which of them turns a pair and where they are kept; None where
            it has one, its place in its request.
    """

    cos_sin: torch.Tensor
    is_neox: bool
    frequencies: torch.Tensor | None = None
    amplitude: float = 1.0
    positions: TokenPositions | None = None

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin.shape[1]

    def pairs(self, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Dimensions of the first and the second number of every pair, each [rotary_dim / 2]."""
        index = torch.arange(self.rotary_dim // 2, device=device)
        if self.is_neox:
            return index, index + self.rotary_dim // 2
        return 2 * index, 2 * index + 1

    def angles_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, [num_tokens, rotary_dim / 2] fp32 each, of positions [num_tokens]; of [num_axes,
        num_tokens] where a token has several."""
        if self.positions is None:
            cos, sin = self.cos_sin[positions].float().chunk(2, dim=-1)
            return cos, sin
        pair = torch.arange(self.rotary_dim // 2, device=self.cos_sin.device)
        row = positions.long()[self.positions.axes.long()].T
        return self.cos_sin[row, pair].float(), self.cos_sin[row, pair + self.rotary_dim // 2].float()

    @functools.cached_property
    def coarse_angles(self) -> torch.Tensor:
        """[rows, rotary_dim / 2, 2] fp32: cosine and sine at every ANGLE_STEP-th position, a few beyond the last."""
        rows = self.cos_sin.shape[0] // ANGLE_STEP + 4 * ANGLE_STEP
        return self._angles(torch.arange(rows, dtype=torch.float64) * ANGLE_STEP, self.amplitude)

    @functools.cached_property
    def fine_angles(self) -> torch.Tensor:
        """[ANGLE_STEP, rotary_dim / 2, 2] fp32: cosine and sine of turning on by 0 to ANGLE_STEP - 1 positions."""
        return self._angles(torch.arange(ANGLE_STEP, dtype=torch.float64), 1.0)

    def _angles(self, positions: torch.Tensor, amplitude: float) -> torch.Tensor:
        assert self.frequencies is not None
        angles = positions[:, None] * self.frequencies
        return (amplitude * torch.stack([angles.cos(), angles.sin()], dim=-1)).float().to(self.cos_sin.device)


LINEAR_TOLERANCE = 0.03
"""By how much a model's table may differ from angles proportional to the position: fp32 angles of 131,072 positions are
off by up to 0.008 radians, and bf16 cosines by 0.004."""


def linear_rotary(table: torch.Tensor, is_neox: bool, device: torch.device | str) -> RotaryTable | None:
    """The rotation by angles proportional to the position that ``table`` rounds, or None if it is no such rotation.

    A key offset only has to be the same rotation wherever it is taken off and given back; how a model rounds its own
    remains in what is stored. Proportional angles let a reader turn it on from token to token.

    Args:
        table: [max_position, rotary_dim] as :class:`RotaryTable` has it, fp32 and on the CPU.
        is_neox: as there.
        device: where the table that is given back lies, in fp32.
    """
    cos, sin = table.double().chunk(2, dim=-1)
    amplitude = cos[0, 0].item()
    if table.shape[0] < 2 or not amplitude:
        return None
    frequencies = torch.atan2(sin[1], cos[1])
    exact = torch.empty_like(table, dtype=torch.float32)
    positions = torch.arange(table.shape[0], dtype=torch.float64)
    for rows in positions.long().split(1 << 14):
        angles = positions[rows, None] * frequencies
        exact[rows] = (amplitude * torch.cat([angles.cos(), angles.sin()], dim=-1)).float()
    if not (exact - table).abs().max().item() <= LINEAR_TOLERANCE * abs(amplitude):
        return None
    return RotaryTable(exact.to(device), is_neox, frequencies, amplitude)


@dataclass(frozen=True)
class OffsetPairs:
    """The rotary pairs in which a layer's key offset is not 0, filled up to a multiple of 8 by pairs that are.

    Args:
        index: [pairs] int32, of the rotary embedding's pairs.
        dims: [pairs] int32, first dimension | second dimension << 16.
        numbers: [num_kv_heads, pairs, 2] fp32, the offset's two numbers before RoPE.
    """

    index: torch.Tensor
    dims: torch.Tensor
    numbers: torch.Tensor


@dataclass(frozen=True)
class LayerTransforms:
    """What one layer does to keys and values between the model and its packed pages.

    Args:
        key_offset: [num_kv_heads, head_size] fp32, mean (or bias) of the keys before RoPE, or None.
        rotary: the layer's rotary table; None if the layer rotates nothing (the offset is then subtracted as it is).
        key_equalization: [num_kv_heads, head_size] fp32, positive, equal within a RoPE pair, or None.
        key_hadamard: rotate keys by the Hadamard matrix of :func:`hadamard`.
        value_hadamard: rotate values by it.
        range_search: choose each row's range by squared error instead of taking [min, max].
        key_feedback: round keys with feedback, in ranges of its own, or None.
        value_feedback: likewise for values.
    """

    key_offset: torch.Tensor | None = None
    rotary: RotaryTable | None = None
    key_equalization: torch.Tensor | None = None
    key_hadamard: bool = False
    value_hadamard: bool = False
    range_search: bool = False
    key_feedback: RoundFeedback | None = None
    value_feedback: RoundFeedback | None = None

    def feedback(self, side: str, bits: int) -> RoundFeedback | None:
        """What rows of a side, one of SIDES, are rounded with as codes of ``bits``; None where those are nearest ones.

        The one place that knows which codes take feedback: all that quantizes asks here.
        """
        known = self.key_feedback if side == KEY else self.value_feedback
        return known if bits in FEEDBACK_BITS else None

    def rounds_with_feedback(self, pair: PrecisionPair) -> bool:
        """Whether rows of a pair are rounded with feedback, on a side at least."""
        bits_of_sides = zip(SIDES, (pair.k_bits, pair.v_bits), strict=True)
        return any(self.feedback(side, bits) is not None for side, bits in bits_of_sides)

    @property
    def positions(self) -> TokenPositions | None:
        """Of a key offset that turns by several positions of a token; None where readers need no table of them."""
        return None if self.key_offset is None or self.rotary is None else self.rotary.positions

    @functools.cached_property
    def offset_partner(self) -> torch.Tensor | None:
        """[num_kv_heads, head_size] fp32: what the sines multiply, so that R_t m = m cos + partner sin.

        Zero where nothing is rotated (the cosine there counts as 1).
        """
        if self.key_offset is None:
            return None
        partner = torch.zeros_like(self.key_offset)
        if self.rotary is not None:
            first, second = self.rotary.pairs(partner.device)
            partner[:, first] = -self.key_offset[:, second]
            partner[:, second] = self.key_offset[:, first]
        return partner

    @functools.cached_property
    def offset_pairs(self) -> OffsetPairs | None:
        """None without a rotated key offset: what is not rotated moves all of a row's logits alike."""
        if self.key_offset is None or self.rotary is None:
            return None
        first, second = self.rotary.pairs(self.key_offset.device)
        numbers = torch.stack([self.key_offset[:, first], self.key_offset[:, second]], dim=-1)
        index = numbers.abs().amax(dim=(0, 2)).nonzero()[:, 0]
        index = torch.nn.functional.pad(index, (0, -len(index) % 8), value=-1)
        kept = numbers[:, index.clamp(min=0)] * (index >= 0)[None, :, None]
        index = index.clamp(min=0)
        return OffsetPairs(index.int(), (first[index] | second[index] << 16).int(), kept.contiguous())


@functools.cache
def hadamard(head_size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[head_size, head_size] orthonormal Hadamard matrix (Sylvester's), symmetric, so its own inverse.

    Where head_size is no power of two it is block diagonal, with blocks of the largest power of two that divides it.
    """
    size = head_size & -head_size
    block = torch.ones(1, 1, dtype=torch.float64)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.block_diag(*[block / math.sqrt(size)] * (head_size // size)).to(device=device, dtype=dtype)


def rotated_offset(transforms: LayerTransforms, positions: torch.Tensor) -> torch.Tensor:
    """R_t m of every token: [num_tokens, num_kv_heads, head_size] fp32.

    Args:
        transforms: with a key offset.
        positions: [num_tokens]; [num_axes, num_tokens] where a token has several.
    """
    offset, partner = transforms.key_offset, transforms.offset_partner
    assert offset is not None and partner is not None
    cos = torch.ones(positions.shape[-1], offset.shape[1], device=offset.device)
    sin = torch.zeros_like(cos)
    if transforms.rotary is not None:
        row_cos, row_sin = transforms.rotary.angles_at(positions)
        for dims in transforms.rotary.pairs(offset.device):
            cos[:, dims] = row_cos
            sin[:, dims] = row_sin
    return offset * cos[:, None] + partner * sin[:, None]


def transform_keys(key: torch.Tensor, positions: torch.Tensor | None, transforms: LayerTransforms) -> torch.Tensor:
    """K'_t in fp32 for ``key`` [num_tokens, num_kv_heads, head_size] at ``positions``, as :func:`rotated_offset`'s."""
    key = key.float()
    if transforms.key_offset is not None:
        assert positions is not None
        key = key - rotated_offset(transforms, positions)
    if transforms.key_equalization is not None:
        key = key / transforms.key_equalization
    if transforms.key_hadamard:
        key = key @ hadamard(key.shape[-1], key.device)
    return key


def restore_keys(key: torch.Tensor, positions: torch.Tensor | None, transforms: LayerTransforms) -> torch.Tensor:
    """Inverse of :func:`transform_keys`, shapes as there."""
    if transforms.key_hadamard:
        key = key @ hadamard(key.shape[-1], key.device)
    if transforms.key_equalization is not None:
        key = key * transforms.key_equalization
    if transforms.key_offset is not None:
        assert positions is not None
        key = key + rotated_offset(transforms, positions)
    return key


def rotate_values(value: torch.Tensor, transforms: LayerTransforms) -> torch.Tensor:
    """V' in fp32 of ``value`` [..., head_size]; also the way back, the matrix being its own inverse."""
    value = value.float()
    return value @ hadamard(value.shape[-1], value.device) if transforms.value_hadamard else value


def fold_query(query: torch.Tensor, transforms: LayerTransforms, num_kv_heads: int) -> torch.Tensor:
    """(q e) W in fp32 for ``query`` [num_tokens, num_heads, head_size], each head with its KV head's factors."""
    num_tokens, num_heads, head_size = query.shape
    query = query.float().view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_size)
    if transforms.key_equalization is not None:
        query = query * transforms.key_equalization[:, None]
    if transforms.key_hadamard:
        query = query @ hadamard(head_size, query.device)
    return query.reshape(num_tokens, num_heads, head_size)
