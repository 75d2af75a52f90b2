"""NIXL, which moves pages from one engine to another: what its ends tell each other, and what it takes for a page."""

import functools
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_kvtuner.blocks.window_manager import RecentSpec
from vllm_kvtuner.compat.patching import when_connectors_import
from vllm_kvtuner.engine.config import needs_packed_blocks, resolved_profile, uses_kvtuner
from vllm_kvtuner.engine.page_facts import differences, with_facts

_NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl."
_MISMATCH = re.compile(r"compatibility hash mismatch.*Remote: (.*)\. Prefill and decode instances", re.DOTALL)
"""In vLLM's refusal of another end: what that one has said of itself."""


def refuse_other_pages() -> None:
    """Refuse another end whose pages mean something else, and say what differs.

    Symptom: an engine loads pages that another profile, other statics or another block size wrote, and answers
    nonsense. Cause: NIXL's handshake names the model and the cache's dtype, which is ``kvtuner`` for every profile,
    takes blocks of other sizes apart by token, and gives its reasons as two digests. Can go when a dtype can add to
    what is compared, by name.
    """

    def change(module: ModuleType) -> None:
        module.compute_nixl_compatibility_hash = _say_facts(module.compute_nixl_compatibility_hash)  # type: ignore[attr-defined]
        worker: Any = module.NixlBaseConnectorWorker
        worker._nixl_handshake = _say_what_differs(worker._nixl_handshake)

    when_connectors_import(_NIXL + "base_worker", change)


def _say_facts(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def compute(vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> str:
        found = original(vllm_config, *args, **kwargs)
        return with_facts(found, vllm_config) if uses_kvtuner(vllm_config) else found

    return compute


def _say_what_differs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handshake(worker: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(worker, *args, **kwargs)
        except RuntimeError as error:
            found = _MISMATCH.search(str(error))
            if found is None or not uses_kvtuner(worker.vllm_config):
                raise
            raise RuntimeError(f"NIXL handshake refused: {differences(worker.compat_hash, found[1])}") from None

    return handshake


def pack_pages_for_transfers() -> None:
    """Leave pages that cannot share one group packed, as they are without NIXL.

    Symptom: with NIXL, a model of sliding-window and full layers, or with recent windows, pads all pages to the
    largest, so its pool holds less than bf16's. Cause: NIXL asks for the layout LBHNC in which such pages alias each
    other. Can go when it asks for any layout whose pages are contiguous.
    """

    def change(module: ModuleType) -> None:
        connector: Any = module.NixlBaseConnector
        original = connector.get_required_kvcache_layout.__func__

        @functools.wraps(original)
        def get_required_kvcache_layout(cls: type, vllm_config: VllmConfig) -> str | None:
            if uses_kvtuner(vllm_config) and needs_packed_blocks(vllm_config, resolved_profile(vllm_config)):
                return "BLHNC"
            return original(cls, vllm_config)

        connector.get_required_kvcache_layout = classmethod(get_required_kvcache_layout)

    when_connectors_import(_NIXL + "connector", change)


def transfer_whole_pages() -> None:
    """Move as many bytes of a place in a block as the largest page there has, and find states where blocks hold more.

    Symptom: the other end reads pages whose last bytes never came, and states of linear attention that were another
    request's. Cause: layers of several groups begin at the same place of a block, and NIXL takes the first one's page
    for the size of all; from one block's state to the next it takes the page of one state, though blocks that hold
    other layers' pages are larger. Can go when it takes the largest page, and a state's own stride.
    """

    def change(module: ModuleType) -> None:
        worker: Any = module.NixlBaseConnectorWorker
        original = worker.register_local_xfer_handler

        @functools.wraps(original)
        def register(worker: Any, *args: Any, **kwargs: Any) -> Any:
            if uses_kvtuner(worker.vllm_config):
                _measure_regions(worker)
            return original(worker, *args, **kwargs)

        worker.register_local_xfer_handler = register

    when_connectors_import(_NIXL + "base_worker", change)


def leave_last_token_to_reader() -> None:
    """Where layers have a sliding or a recent window, move what precedes the prompt's last token.

    Symptom: for one in as many prompts as a block has tokens, the first answer's token misses the oldest token of the
    windows, and reads another's in its place. Cause: the decoding engine gets the window of the token that follows the
    prompt, and then computes the prompt's last token again, whose window begins one token earlier. Can go when vLLM
    does so too; it does for states and for windows that it replays.
    """

    def change(module: ModuleType) -> None:
        scheduler: Any = module.NixlBaseConnectorScheduler
        original = scheduler._prefill_backoff

        @functools.wraps(original)
        def prefill_backoff(scheduler: Any) -> int:
            tokens = original(scheduler)
            windows = uses_kvtuner(scheduler.vllm_config) and any(
                isinstance(spec, SlidingWindowSpec) for spec in _specs(scheduler)
            )
            return max(1, tokens) if windows else tokens

        scheduler._prefill_backoff = prefill_backoff

    when_connectors_import(_NIXL + "base_scheduler", change)


def bring_sink_tokens() -> None:
    """Move the block of the sink tokens with the newest of a recent window.

    Symptom: the decoding engine goes on with whatever lies in its sink tokens' block. Cause: of a sliding window, NIXL
    names the last blocks alone, and pairs those of both ends from the last one on. Can go when a cache can name the
    blocks that a request needs.
    """

    def clip(module: ModuleType) -> None:
        scheduler: Any = module.NixlBaseConnectorScheduler
        scheduler.get_exchange_clipped_blocks = _with_sinks(scheduler.get_exchange_clipped_blocks)

    def pair(module: ModuleType) -> None:
        scheduler: Any = module.NixlPullConnectorScheduler
        scheduler.update_state_after_alloc = _paired_with_sinks(scheduler.update_state_after_alloc)

    when_connectors_import(_NIXL + "base_scheduler", clip)
    when_connectors_import(_NIXL + "pull_scheduler", pair)


def _specs(scheduler: Any) -> list[KVCacheSpec]:
    """A layer's spec of each cache group that NIXL moves."""
    specs = [group.kv_cache_spec for group in scheduler.kv_cache_config.transfer_groups]
    return [
        next(iter(spec.kv_cache_specs.values())) if isinstance(spec, UniformTypeKVCacheSpecs) else spec
        for spec in specs
    ]


def _sink_blocks(scheduler: Any) -> list[int]:
    """Blocks of the sink tokens of each cache group that NIXL moves."""
    return [spec.sink_blocks if isinstance(spec, RecentSpec) else 0 for spec in _specs(scheduler)]


def _with_sinks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of each group, a request's blocks that are moved: those of its sink tokens, then the last ones."""

    @functools.wraps(original)
    def clipped(scheduler: Any, block_ids: Any, *args: Any, **kwargs: Any) -> Any:
        last = original(scheduler, block_ids, *args, **kwargs)
        sinks = _sink_blocks(scheduler)
        if not any(sinks) or not block_ids:
            return last
        whole = scheduler.kv_cache_config.select_transfer_block_ids(block_ids)
        return tuple(
            [*all_ids[: min(count, len(all_ids) - len(ids))], *ids] if count else ids
            for all_ids, ids, count in zip(whole, last, sinks, strict=True)
        )

    return clipped


def _paired_with_sinks(original: Callable[..., None]) -> Callable[..., None]:
    """Take out of the other end's blocks those between its sink tokens and what of the window is read here."""

    @functools.wraps(original)
    def update(scheduler: Any, request: Any, blocks: Any, num_external_tokens: int) -> None:
        original(scheduler, request, blocks, num_external_tokens)
        sinks = _sink_blocks(scheduler)
        taken = scheduler._reqs_need_recv.get(request.request_id)
        if not any(sinks) or taken is None or not any(taken[1]):
            return
        groups = scheduler.kv_cache_config.select_transfer_block_ids(blocks.blocks)
        remote = list(request.kv_transfer_params["remote_block_ids"])
        for place, (here, group, count) in enumerate(zip(taken[1], groups, sinks, strict=True)):
            if not count:
                continue
            there = remote[place]
            assert len(there) >= len(here)
            # A hit in this end's prefix cache has its sink tokens.
            wanted = sum(block.block_hash is None and not block.is_null for block in group[:count])
            remote[place] = [*there[:wanted], *there[len(there) - len(here) + wanted :]]
        request.kv_transfer_params["remote_block_ids"] = tuple(remote)

    return update


def _measure_regions(worker: Any) -> None:
    """Called with every layer registered, and before the other end is told of the sizes."""
    bases = worker.kv_caches_base_addr[worker.engine_id][worker.tp_rank]
    split = worker._physical_blocks_per_logical_kv_block
    for name, cache in (worker.host_xfer_buffers or worker.device_kv_caches).items():
        spec = worker._layer_specs.get(name)
        if cache.data_ptr() not in bases:
            continue
        region = bases.index(cache.data_ptr())
        if isinstance(spec, AttentionSpec):
            page = spec.page_size_bytes // split
            worker.block_len_per_layer[region] = max(worker.block_len_per_layer[region], page)
        elif isinstance(spec, MambaSpec):
            worker.block_stride_per_layer[region] = cache.stride(0) * cache.element_size() // split
