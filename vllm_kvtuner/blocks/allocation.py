"""Blocks of running requests: a step that needs none is not asked for any.

A scheduler allocates for every request of every step, and tells the prefix cache of what was computed, though a decode
needs something only where a block begins or ends. With 1,024 requests that was a fifth of what an engine's core does in
a step, and steps of few bits wait for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.request import Request

from vllm_kvtuner.blocks.window_manager import RecentManager, tell_managers

LAST_STEP = "_kvtuner_last_step"
"""Attribute of a request: what its last allocation asked for, see :meth:`Steps.of`."""
LAST_CACHED = "_kvtuner_last_cached"
"""Attribute of a request: units of computed tokens that the prefix cache was told of last."""
LOOKAHEAD = "num_lookahead_tokens"
"""The only argument besides request and new tokens of one that runs already; any other may bring blocks."""


class Steps(NamedTuple):
    """What the managers of a cache go by.

    Args:
        unit: tokens of which all groups' blocks, and what the prefix cache hashes, are multiples.
        windows: one manager of each kind of sliding and recent windows.
        max_model_len: tokens of a request, at most.
    """

    unit: int
    windows: tuple[SlidingWindowManager, ...]
    max_model_len: int

    def of(self, request: Request, num_new_tokens: int, num_lookahead_tokens: int) -> tuple[int, ...]:
        """What a running request's next allocation asks for. If its last one asked for that, it changes nothing.

        New blocks are taken where the last slot lies in another block than before, blocks are found by the prefix cache
        once their last token is known, both in units of the smallest blocks, and those before a window are freed.

        Args:
            request: whose computed tokens are those before this step.
            num_new_tokens: tokens that are computed.
            num_lookahead_tokens: further tokens that need slots.
        """
        before = request.num_computed_tokens
        after = before + num_new_tokens
        blocks = -(-min(after + num_lookahead_tokens, self.max_model_len) // self.unit)
        known = min(after, request.num_tokens) // self.unit
        if not self.windows:
            return blocks, known
        seen = max(0, before - request.num_in_flight_tokens)
        return blocks, known, *(each.get_num_skipped_tokens(seen) // each.block_size for each in self.windows)


def steps_of(manager: KVCacheManager) -> Steps | None:
    """None where some manager does something in every step, as those of linear attention's states do."""
    coordinator = manager.coordinator
    managers: Sequence[SingleTypeKVCacheManager] = coordinator.single_type_managers
    if any(type(each) not in (FullAttentionManager, SlidingWindowManager, RecentManager) for each in managers):
        return None
    if getattr(coordinator, "num_reprefillable_tokens", 0):  # blocks are found that many tokens later
        return None
    sliding = [each for each in managers if isinstance(each, SlidingWindowManager)]
    kinds = {(each.sliding_window, each.block_size, type(each)): each for each in sliding}
    unit = math.gcd(manager.block_pool.hash_block_size, *(each.block_size for each in managers))
    return Steps(unit, tuple(kinds.values()), manager.max_model_len)


def methods_where_needed(manager: KVCacheManager) -> dict[str, Callable[..., Any]]:
    """Methods to put in place of the manager's own, by name; none where every step needs something.

    They skip what changes nothing, and tell managers of recent windows what is known of a request before its blocks are
    allocated.
    """
    recent = any(isinstance(each, RecentManager) for each in manager.coordinator.single_type_managers)
    steps, allocate, cache = steps_of(manager), manager.allocate_slots, manager.cache_blocks
    nothing = manager.empty_kv_cache_blocks
    if steps is None and not recent:
        return {}

    def allocate_slots(request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        step = None
        if steps is not None and not args and (not kwargs or (len(kwargs) == 1 and LOOKAHEAD in kwargs)):
            step = steps.of(request, num_new_tokens, kwargs.get(LOOKAHEAD, 0))
            if step == getattr(request, LAST_STEP, None):
                return nothing
        else:  # it begins, or comes back
            setattr(request, LAST_CACHED, None)
        if recent:
            tell_managers(manager.coordinator, request)
        blocks = allocate(request, num_new_tokens, *args, **kwargs)
        setattr(request, LAST_STEP, None if blocks is None else step)
        return blocks

    if steps is None:
        return {"allocate_slots": allocate_slots}
    unit = steps.unit

    def cache_blocks(request: Request, num_computed_tokens: int) -> None:
        units = num_computed_tokens // unit
        if units != getattr(request, LAST_CACHED, None):
            cache(request, num_computed_tokens)
            setattr(request, LAST_CACHED, units)

    return {"allocate_slots": allocate_slots, "cache_blocks": cache_blocks}
