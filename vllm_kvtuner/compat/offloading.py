"""The sink tokens of recent windows, in vLLM's offloading connector."""

import dataclasses
from typing import Any

import numpy as np

from vllm_kvtuner.blocks.window_manager import RecentSpec


def loads_sink_tokens(original: type[Any]) -> type[Any]:
    """Bring back the block of the sink tokens with the newest of a recent window.

    Symptom: a prompt that is brought back goes on with whatever lies in its sink tokens' block. Cause: of a sliding
    window, vLLM's offloading loads the last chunks before the point where a hit ends. That block is stored, as
    RecentManager says what a hit can need. So a hit has to find it, and its copy is added to the request's others. Can
    go when a cache can name the blocks that a hit needs.

    Args:
        original: the scheduler's side of the connector (OffloadingConnectorScheduler).
    """
    # Imported once the connector is, which imports the module that has its word for a lookup's result.
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.kv_offload.base import BlockIDsLoadStoreSpec, GPULoadStoreSpec, LookupResult

    class LoadsSinkTokens(original):
        def _lookup_complete_chunks(self, req_status: Any, *args: Any, **kwargs: Any) -> int | None:
            found = super()._lookup_complete_chunks(req_status, *args, **kwargs)
            if not found:
                return found
            total = req_status.num_locally_computed_tokens + found
            keys = [key for _, keys in self._sinks_before_window(req_status, total) for key in keys]
            results = [self.manager.lookup(key, req_status.req_context) for key in keys]
            if LookupResult.MISS in results:
                return 0
            loading = self._chunks_being_loaded or ()
            if any(result is not LookupResult.HIT for result in results) or any(key in loading for key in keys):
                return None
            return found

        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
            if not num_external_tokens:
                super().update_state_after_alloc(request, blocks, num_external_tokens)
                return
            req_status = self._req_status[request.request_id]
            total = req_status.num_locally_computed_tokens + num_external_tokens
            sinks = self._sinks_before_window(req_status, total)
            # vLLM's own takes what is to be loaded for one run of blocks.
            rest, ahead = list(blocks.blocks), {}
            for place, keys in sinks:
                group = self.config.kv_group_configs[place].group_idx
                ahead[place] = keys, [block.block_id for block in rest[group][: len(keys)]]
                rest[group] = [KVCacheBlock(0, is_null=True)] * len(keys) + list(rest[group][len(keys) :])
            super().update_state_after_alloc(request, KVCacheBlocks(tuple(rest)), num_external_tokens)
            if ahead:
                self._load_ahead(req_status, ahead)

        def _sinks_before_window(self, req_status: Any, total: int) -> list[tuple[int, list[Any]]]:
            """Places of the groups whose sink tokens lie before the window of a hit of ``total`` tokens, and are not
            in the prefix cache; with the keys of their blocks."""
            if req_status.num_locally_computed_tokens:  # a hit there has found them
                return []
            found = []
            for place, (config, state) in enumerate(
                zip(self.config.kv_group_configs, req_status.group_states, strict=True)
            ):
                spec = config.kv_cache_spec
                if not isinstance(spec, RecentSpec) or not spec.sink_tokens:
                    continue
                if (total - spec.tokens_before_step) // config.tokens_per_block >= spec.sink_blocks:
                    found.append((place, state.offload_keys[: spec.sink_blocks]))
            return found

        def _load_ahead(self, req_status: Any, ahead: dict[int, tuple[list[Any], list[int]]]) -> None:
            """Add blocks to the load that has just been made, in front of those of their groups."""
            (job_id,) = req_status.transfer_jobs
            job, status = self._current_batch_load_jobs[job_id], self._jobs[job_id]
            assert isinstance(job.src_spec, BlockIDsLoadStoreSpec) and isinstance(job.dst_spec, GPULoadStoreSpec)
            sources, targets, first = [], [], 0
            sizes, starts = list(job.dst_spec.group_sizes), list(job.dst_spec.block_indices)
            for place, size in enumerate(job.dst_spec.group_sizes):
                if place in ahead:
                    keys, block_ids = ahead[place]
                    sources.append(self.manager.prepare_load(keys, req_status.req_context).block_ids)
                    targets.append(np.array(block_ids))
                    sizes[place] += len(keys)
                    starts[place] = 0
                    status.keys.update(keys)
                    self._current_batch_allocated_block_ids.update(block_ids)
                    if self._chunks_being_loaded is not None:
                        self._chunks_being_loaded.update(keys)
                sources.append(job.src_spec.block_ids[first : first + size])
                targets.append(job.dst_spec.block_ids[first : first + size])
                first += size
            self._current_batch_load_jobs[job_id] = dataclasses.replace(
                job,
                src_spec=type(job.src_spec)(np.concatenate(sources).tolist()),
                dst_spec=GPULoadStoreSpec(np.concatenate(targets).tolist(), sizes, starts),
            )

    return LoadsSinkTokens
