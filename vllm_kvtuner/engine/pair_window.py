"""Which recent window a pair alone has in an engine: the best that is served there and takes little memory.

A window's tokens cost several times what packed ones do, and whole blocks of them. A request of a few hundred thousand
tokens does not notice, one of a thousand would hold more window than pages. So where requests are short, windows are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vllm_kvtuner.engine.config import REQUEST_TOKENS_KEY, window_bytes, with_pair_window
from vllm_kvtuner.pages.layout import recent_block_size, recent_blocks
from vllm_kvtuner.profile.model_shape import ModelShape, num_loops
from vllm_kvtuner.profile.pair import RECENT_WINDOW, SINK_TOKENS
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import Profile, RecentWindow, ResolvedProfile

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WINDOWS = (
    RecentWindow(RECENT_WINDOW, 16, SINK_TOKENS),
    RecentWindow(RECENT_WINDOW, 8, SINK_TOKENS),
    RecentWindow(32, 16, SINK_TOKENS),
    RecentWindow(32, 8, SINK_TOKENS),
    RecentWindow(RECENT_WINDOW, 16),
    RecentWindow(RECENT_WINDOW, 8),
    RecentWindow(32, 16),
    RecentWindow(32, 8),
    RecentWindow(16, 16),
    RecentWindow(16, 8),
)
"""Windows of a pair, the one with the least error first."""
SHORT_REQUEST, LONG_REQUEST = (1024, 0.10), (8192, 0.03)
"""Tokens of a request, and the largest share of its packed pages that its window's blocks may take besides."""
CPU_BLOCK_SIZE = 32
"""Tokens of a block on a CPU where nobody gives them: of vLLM's 128 there, a window would fill few."""

Choice = tuple[int, int, int, str]
"""Tokens, bits and sink tokens of a window, 0 for none, and why it is no better one, "" for the best."""


def choose_window(
    config: VllmConfig, profile: Profile, shape: ModelShape, problems: Callable[[ResolvedProfile], Sequence[str]]
) -> Choice:
    """The best window for a pair that the engine serves at a small share of memory.

    Args:
        config: of the engine, whose profile the pair is.
        profile: the pair's.
        shape: the model.
        problems: why an engine does not serve windows of a profile.
    """
    if not profile.recent_window:
        return 0, 16, 0, ""
    refused: list[str] = []
    for window in WINDOWS:
        choice = window.tokens, window.bits, window.sink_tokens
        try:
            resolved = with_pair_window(profile, (*choice, "")).resolve(shape)
        except ProfileError as error:
            refused += error.problems
            continue
        reasons = [*problems(resolved), *_too_long(config, window), *_too_large(config, resolved, window)]
        if not reasons:
            return *choice, _said(refused[:1], window)
        refused += reasons
    return 0, 16, 0, _said(refused[-1:], None)


def _said(refused: Sequence[str], window: RecentWindow | None) -> str:
    """Why a window is not the best one, or is none, in words that follow "without"."""
    if not refused:
        return ""
    what = "a recent window" if window is None else f"a recent window of {WINDOWS[0]}"
    return f"{what}, since {refused[0]}"


def _too_long(config: VllmConfig, window: RecentWindow) -> list[str]:
    """A window must be shorter than the sliding window of layers that have one."""
    text = config.model_config.hf_text_config
    sliding = getattr(text, "loop_window_size", 64) if num_loops(text) > 1 else getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    if not sliding or sliding > window.tokens or (kinds and "sliding_attention" not in kinds):
        return []
    return [f"layers have a sliding window of {sliding} tokens"]


def _too_large(config: VllmConfig, resolved: ResolvedProfile, window: RecentWindow) -> list[str]:
    """Blocks of a window may take a small share of what a request of max_model_len takes besides."""
    if config.model_config.is_hybrid:
        return ["blocks of a model with linear-attention layers are as large as a state"]
    length = config.additional_config.get(REQUEST_TOKENS_KEY) or config.model_config.max_model_len
    share, largest = window_tokens(config, resolved, window) / length, largest_share(length)
    if share <= largest:
        return []
    return [f"it would take {share:.1%} more memory in a request of {length:,} tokens, where {largest:.1%} is the most"]


def window_tokens(config: VllmConfig, resolved: ResolvedProfile, window: RecentWindow) -> int:
    """Tokens of packed pages that would fit in the blocks that a request's window takes while it decodes."""
    block_size = config.cache_config.block_size
    pool, windows = window_bytes(config, resolved, window)
    size = recent_block_size(block_size, pool * block_size, windows)
    step_tokens = 1 + 2 * config.num_speculative_tokens
    blocks = recent_blocks(window.tokens, size, step_tokens) + math.ceil(window.sink_tokens / size)
    # Where a block of the pool does not hold the pages of all layers, vLLM gives them several.
    return blocks * math.ceil(size * windows / (pool * block_size)) * block_size


def largest_share(tokens: int) -> float:
    """Of a request's packed pages that its window may take besides: in logarithms, a straight line between the two."""
    (short, most), (long, least) = SHORT_REQUEST, LONG_REQUEST
    place = min(1.0, max(0.0, math.log(tokens / short) / math.log(long / short)))
    return float(most ** (1 - place) * least**place)
