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


@dataclass(frozen=True)
class RotaryTable:
    """The rotation a model applies to keys, as the model itself computed it.

    Args:
        cos_sin: [max_position, rotary_dim], each row the cosines of the rotary_dim / 2 pairs and then the sines
            (scaling variants and their factors included).
        is_neox: True if pair i is dimensions (i, i + rotary_dim / 2), False if it is (2 i, 2 i + 1). Dimensions from
            rotary_dim on are not rotated.
    """

    cos_sin: torch.Tensor
    is_neox: bool

    @property
    def rotary_dim(self) -> int:
        return self.cos_sin.shape[1]

    def pairs(self, device: torch.device | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Dimensions of the first and the second number of every pair, each [rotary_dim / 2]."""
        index = torch.arange(self.rotary_dim // 2, device=device)
        if self.is_neox:
            return index, index + self.rotary_dim // 2
        return 2 * index, 2 * index + 1


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
    """

    key_offset: torch.Tensor | None = None
    rotary: RotaryTable | None = None
    key_equalization: torch.Tensor | None = None
    key_hadamard: bool = False
    value_hadamard: bool = False
    range_search: bool = False

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
    """R_t m of every position: [num_tokens, num_kv_heads, head_size] fp32, for positions [num_tokens]."""
    offset, partner = transforms.key_offset, transforms.offset_partner
    assert offset is not None and partner is not None
    cos = torch.ones(positions.shape[0], offset.shape[1], device=offset.device)
    sin = torch.zeros_like(cos)
    if transforms.rotary is not None:
        row_cos, row_sin = transforms.rotary.cos_sin[positions].float().chunk(2, dim=-1)
        for dims in transforms.rotary.pairs(offset.device):
            cos[:, dims] = row_cos
            sin[:, dims] = row_sin
    return offset * cos[:, None] + partner * sin[:, None]


def transform_keys(key: torch.Tensor, positions: torch.Tensor | None, transforms: LayerTransforms) -> torch.Tensor:
    """K'_t in fp32 for ``key`` [num_tokens, num_kv_heads, head_size] at ``positions`` [num_tokens]."""
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
