"""Which blocks a recent window takes from vLLM's pool.

A sliding-window cache of vLLM's holds every token of a step while it is computed, which for a chunk of a prompt is many
times the window. A recent window does not need them: the queries of a chunk find the chunk's own keys and values in
the batch, so that only what later steps or other requests read has to be stored:

- the newest tokens of the chunk, as many as the next step's window has;
- the block of the sink tokens, if the window has some: every later query reads them, so that it is held as long as the
  request, and a hit needs it too;
- before each *boundary* where a later request's prefix cache hit can end, as many as a hit needs. vLLM resumes a prompt
  that it sees again at the last boundary before its end, and one that shares a prefix where the prefix ends, once it
  has seen two of them (``Request.shared_prefix_boundary``, which it keeps for caches that store sparsely). Hits end
  where window and packed pages both have what they need, as for every sliding-window cache.

Places of a request's block table between those hold the null block; tokens that lie there are not stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator, replay_boundaries
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.request import Request

from vllm_kvtuner.pages.layout import recent_blocks


@dataclass(frozen=True, kw_only=True)
class RecentSpec(SlidingWindowSpec):
    """Cache of a recent window.

    Args:
        step_tokens: tokens that a decode step computes, or has blocks for, at most.
        num_steps: steps that are scheduled before the first of them is done.
        sink_tokens: tokens at the head of a request that are held with the newest.
    """

    step_tokens: int
    num_steps: int
    sink_tokens: int = 0

    @property
    def sink_blocks(self) -> int:
        return cdiv(self.sink_tokens, self.block_size)

    @property
    def num_retained_tokens(self) -> int:
        # Model runner V2 of 0.33.0 takes blocks that lie further back out of its block tables, that of the sink tokens
        # included, unless this is 0.
        return 0 if self.sink_tokens else self.tokens_before_step

    @property
    def tokens_before_step(self) -> int:
        """The newest tokens before a step that are held while it is computed."""
        return self.sliding_window - 1 + self.extra_retained_tokens

    @property
    def kept_tokens(self) -> int:
        """The newest tokens of a step that are stored: what the next step sees, however many drafts are rejected."""
        return self.tokens_before_step + self.step_tokens

    @property
    def decode_blocks(self) -> int:
        """Blocks that a request holds at most while it decodes."""
        return self.sink_blocks + self._newest_blocks

    @property
    def _newest_blocks(self) -> int:
        return recent_blocks(self.sliding_window + self.extra_retained_tokens, self.block_size, self.step_tokens)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Blocks that a request holds at most at any time: while its prompt is computed, the newest tokens of every
        step in flight and of the one before them, what precedes two boundaries (with drafts, two of each kind), and the
        sink tokens."""
        drafts = self.step_tokens > 1
        hit = RecentManager._contiguous_blocks_for_hit(self.sliding_window, self.block_size, drafts)
        newest = (1 + self.num_steps) * self._newest_blocks
        return self.sink_blocks + min(
            super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len),
            newest + (4 if drafts else 2) * hit,
        )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Of a request that decodes, which is what capacity is made of. That one request fits with its whole prompt
        in flight, :func:`vllm_kvtuner.blocks.capacity.check_capacity` asserts."""
        return self.decode_blocks * self.page_size_bytes


class RecentManager(SlidingWindowManager):
    """Allocates and frees the blocks of a recent window."""

    def __init__(self, kv_cache_spec: RecentSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.kept_tokens = kv_cache_spec.kept_tokens
        self.sink_blocks = kv_cache_spec.sink_blocks
        self._boundaries: dict[str, tuple[int, ...]] = {}
        # Blocks at the head of each request's table that have been freed, or were never taken, sink tokens' aside.
        self._passed: dict[str, int] = {}

    def expect(self, request: Request, boundaries: tuple[int, ...]) -> None:
        """Store what hits need that end at ``boundaries`` (tokens; rounded down to where hits can end)."""
        self._boundaries[request.request_id] = boundaries

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: RecentSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, drop_eagle_block, alignment_tokens,
            *args, **kwargs,
        )  # fmt: skip
        if length == 0 or not kv_cache_spec.sink_tokens:
            return found, length
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        for index in range(kv_cache_spec.sink_blocks):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if cached is None:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(found, cached, strict=True):
                blocks[index] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, alignment_tokens: int | None, kv_cache_spec: RecentSpec, *args: Any,
        **kwargs: Any,
    ) -> list[bool] | None:  # fmt: skip
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs)
        if mask is not None:
            for block in range(start_block, min(kv_cache_spec.sink_blocks, end_block)):
                mask[block - start_block] = True
        return mask

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        needed = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )
        if not needed and not new_computed_blocks:  # as in nearly all steps that decode
            return 0
        # vLLM's own leaves out what it finds before the window.
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        before_window = min(self.sink_blocks, skipped)
        if new_computed_blocks:
            needed += self._get_num_evictable_blocks(new_computed_blocks[:before_window])
        elif request_id not in self.num_cached_block:  # all that is computed, a connector loads
            needed += before_window
        if apply_admission_cap:
            return needed
        # Tokens that a connector loads have blocks wherever the window reaches.
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        first = max(held, cdiv(total_computed_tokens, self.block_size))
        return needed - self._stored(request_id, first, num_tokens).count(False)

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kwargs: Any
    ) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        blocks = self.req_to_blocks[request_id]
        for index, block in enumerate(new_computed_blocks[: self.sink_blocks]):
            if blocks[index].is_null:  # since it lies before the window
                self.block_pool.touch([block])
                blocks[index] = block

    def allocate_external_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        super().allocate_external_computed_blocks(request_id, *args, **kwargs)
        blocks = self.req_to_blocks[request_id]
        if blocks and blocks[0].is_null and self.sink_blocks:
            # A connector that loads sink tokens writes all of these blocks; others are refused beside them.
            blocks[: self.sink_blocks] = self.block_pool.get_new_blocks(self.sink_blocks)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        blocks = self.req_to_blocks.get(request.request_id, ())
        loaded = min(self.num_cached_block.get(request.request_id, 0), num_tokens // self.block_size, self.sink_blocks)
        # vLLM's own takes what lies before the window for cached already.
        if loaded and blocks and not blocks[0].is_null and blocks[0].block_hash is None:
            group = self.kv_cache_group_id
            self.block_pool.cache_full_blocks(request, list(blocks), 0, loaded, self.block_size, group)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        if len(blocks) * self.block_size >= num_tokens:
            return []
        stored = self._stored(request_id, len(blocks), num_tokens)
        taken = self.block_pool.get_new_blocks(sum(stored))
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in taken)
        rest = iter(taken)
        new_blocks = [next(rest) if is_stored else self._null_block for is_stored in stored]
        blocks.extend(new_blocks)
        return new_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        # vLLM's own stops at the first null block behind the window.
        blocks = self.req_to_blocks.get(request_id, [])
        first = self._passed.get(request_id, self.sink_blocks)
        last = min(self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size, len(blocks))
        if last <= first:
            return
        self.block_pool.free_blocks([block for block in reversed(blocks[first:last]) if not block.is_null])
        blocks[first:last] = [self._null_block] * (last - first)
        self._passed[request_id] = last

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._passed.pop(request_id, None)
        self._boundaries.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _stored(self, request_id: str, first: int, num_tokens: int) -> list[bool]:
        """For each block from ``first`` to that of the last of ``num_tokens``, whether its tokens are stored."""
        last = cdiv(num_tokens, self.block_size)
        newest = max(0, num_tokens - self.kept_tokens) // self.block_size
        stored = [block >= newest or block < self.sink_blocks for block in range(first, last)]
        need = self._contiguous_blocks_for_hit(self.sliding_window, self.block_size, self.use_eagle)
        for boundary in self._boundaries.get(request_id, ()) if self.enable_caching else ():
            aligned = boundary // self.cache_hit_alignment_tokens * self.cache_hit_alignment_tokens
            end = aligned // self.block_size + self.use_eagle
            for block in range(max(first, end - need), min(last, end)):
                stored[block - first] = True
        return stored


def tell_managers(coordinator: KVCacheCoordinator, request: Request) -> None:
    """Tell the managers of recent windows where hits on a request's tokens can end, before its blocks are allocated."""
    if request.num_computed_tokens >= request.num_prompt_tokens:  # they were told when its prompt was computed
        return
    managers = [manager for manager in coordinator.single_type_managers if isinstance(manager, RecentManager)]
    if not managers:
        return
    block_size = coordinator.scheduler_block_size
    drops = any(manager.use_eagle for manager in coordinator.single_type_managers)
    boundaries = replay_boundaries(request.num_prompt_tokens, block_size, drops)
    if junction := request.shared_prefix_boundary:
        boundaries += (junction, junction - block_size) if drops else (junction,)
    for manager in managers:
        manager.expect(request, boundaries)
