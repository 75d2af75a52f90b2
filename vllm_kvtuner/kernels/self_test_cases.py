"""Kinds of layers that kernels are tested on, with random statics."""

import math
from typing import NamedTuple

import torch

from vllm_kvtuner.kernels.contract import AttentionShape, BatchLimits, Span
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, FEEDBACK_BITS, PageLayout
from vllm_kvtuner.pages.transforms import LayerTransforms, RotaryTable, linear_rotary

SEQ_LENS = (300, 129, 70, 64, 31, 17, 16, 1)
"""Tokens of the requests, as many as there are; the first has those besides that a span leaves out."""
MAX_WINDOW = 4096
"""Tokens of a sliding window that the first request is longer by, at most."""
FEW_TOKENS = 17
"""Tokens that are stored first, by the store's variant for few rows; the others take that for many."""
MANY_ROWS = 1 << 15
"""(token, KV head) rows of that second store, most of them without a slot."""
OFFSET_PAIRS = 8
"""Rotary pairs with a key offset, as many as kernels keep in registers."""
FEEDBACK = 0.5
"""Of random round feedback, see :func:`_random_feedback`."""


class Case(NamedTuple):
    """What decides which variants of the kernels serve a layer.

    Args:
        layout: of the pages.
        shape: of the layer's attention.
        limits: of batches.
        span: cached tokens that decoding serves.
        transforms: names of those that are on (:func:`transform_names`); statics are random here.
        dtype: of queries, keys and values in model space.
        write_lse: decoding gives the log-sum-exp too.
        window_block_size: tokens per block of a recent window that the store keeps new tokens in too, 0 for none.
    """

    layout: PageLayout
    shape: AttentionShape
    limits: BatchLimits
    span: Span = Span()
    transforms: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    write_lse: bool = False
    window_block_size: int = 0

    @property
    def kind(self) -> "Case":
        """Without what vLLM settles only when it makes the cache."""
        layout = PageLayout(self.layout.pair, self.layout.head_size, BLOCK_SIZE_MULTIPLE)
        return self._replace(layout=layout, window_block_size=0)

    @property
    def seq_lens(self) -> tuple[int, ...]:
        span = self.span
        beyond = span.skip_newest + span.skip_first + min(span.sliding_window or 0, MAX_WINDOW)
        return (SEQ_LENS[0] + beyond, *SEQ_LENS[1:])

    @property
    def portions(self) -> tuple[tuple[int, int, int], ...]:
        """The first token, the end, and how many without a slot come on top, of what is stored at a time."""
        tokens = sum(self.seq_lens)
        rest = max(math.ceil(MANY_ROWS / self.shape.num_kv_heads) - (tokens - FEW_TOKENS), 0)
        return (0, FEW_TOKENS, 0), (FEW_TOKENS, tokens, rest)

    def __str__(self) -> str:
        parts = [*self.transforms, *(["attention sinks"] if self.shape.sinks is not None else [])]
        names = f" with {', '.join(parts)}" if parts else ""
        return f"{self.layout.pair} of head size {self.layout.head_size}{names}"


def transform_names(transforms: LayerTransforms) -> tuple[str, ...]:
    """Names of the transforms that are on, in the order they are applied."""
    states = {
        "key_offset": transforms.key_offset is not None,
        "key_equalization": transforms.key_equalization is not None,
        "key_hadamard": transforms.key_hadamard,
        "value_hadamard": transforms.value_hadamard,
        "range_search": transforms.range_search,
        "key_round_feedback": transforms.key_feedback is not None,
        "value_round_feedback": transforms.value_feedback is not None,
    }
    return tuple(name for name, on in states.items() if on)


def random_transforms(names: tuple[str, ...], case: Case, device: torch.device) -> LayerTransforms:
    """The transforms of a case with random statics, in half-split (neox) RoPE over the whole head."""
    random = torch.Generator(device).manual_seed(1)
    heads, size = case.shape.num_kv_heads, case.layout.head_size
    factors = 0.5 + torch.rand(heads, size // 2, generator=random, device=device, dtype=torch.float32)
    offset = torch.zeros(heads, size, dtype=torch.float32, device=device)
    rotary = None
    if "key_offset" in names:
        rotary = _rotary(size, max(case.seq_lens), device)
        first, second = rotary.pairs(device)
        pairs = torch.randperm(size // 2, generator=random, device=device)[:OFFSET_PAIRS]
        for dims in (first[pairs], second[pairs]):
            offset[:, dims] = 4 * torch.randn(heads, len(pairs), generator=random, device=device, dtype=torch.float32)
    return LayerTransforms(
        key_offset=None if rotary is None else offset,
        rotary=rotary,
        key_equalization=torch.cat([factors, factors], dim=1) if "key_equalization" in names else None,
        key_hadamard="key_hadamard" in names,
        value_hadamard="value_hadamard" in names,
        range_search="range_search" in names,
        key_feedback=_random_feedback(heads, size, random) if "key_round_feedback" in names else None,
        value_feedback=_random_feedback(heads, size, random) if "value_round_feedback" in names else None,
    )


def _random_feedback(heads: int, size: int, random: torch.Generator) -> RoundFeedback:
    """What a number takes up of others' errors has FEEDBACK of an error's mean square: so much do nearest codes lose.

    It stays below 1, so that errors do not grow from channel to channel.
    """
    coefficients = torch.randn(heads, size, size, generator=random, device=random.device, dtype=torch.float32).triu(1)
    coefficients *= FEEDBACK**0.5 / coefficients.norm(dim=-1, keepdim=True).clamp(min=1.0)
    diagonal = 0.5 + torch.rand(heads, size, generator=random, device=random.device, dtype=torch.float32)
    factors = (coefficients + torch.diag_embed(diagonal)).half()
    return RoundFeedback(factors, dict.fromkeys(FEEDBACK_BITS, (1.0, 1.1)))


def _rotary(head_size: int, num_positions: int, device: torch.device) -> RotaryTable:
    frequency = 10000.0 ** (-torch.arange(head_size // 2, dtype=torch.float64) / (head_size // 2))
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    table = linear_rotary(torch.cat([angle.cos(), angle.sin()], dim=-1).float(), True, device)
    assert table is not None
    return table
