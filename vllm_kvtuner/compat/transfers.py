"""NIXL, which moves pages from one engine to another: what its ends tell each other, and what it takes for a page."""

import functools
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec

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
    """Move as many bytes of a place in a block as the largest page there has.

    Symptom: the other end reads pages whose last bytes never came. Cause: layers of several groups begin at the same
    place of a block, and NIXL takes the first one's page for the size of all. Can go when it takes the largest.
    """

    def change(module: ModuleType) -> None:
        worker: Any = module.NixlBaseConnectorWorker
        original = worker.register_local_xfer_handler

        @functools.wraps(original)
        def register(worker: Any, *args: Any, **kwargs: Any) -> Any:
            if uses_kvtuner(worker.vllm_config):
                _take_largest_pages(worker)
            return original(worker, *args, **kwargs)

        worker.register_local_xfer_handler = register

    when_connectors_import(_NIXL + "base_worker", change)


def _take_largest_pages(worker: Any) -> None:
    """Called with every layer registered, and before the other end is told of the sizes."""
    bases = worker.kv_caches_base_addr[worker.engine_id][worker.tp_rank]
    for name, cache in (worker.host_xfer_buffers or worker.device_kv_caches).items():
        spec = worker._layer_specs.get(name)
        if not isinstance(spec, AttentionSpec) or cache.data_ptr() not in bases:
            continue
        region = bases.index(cache.data_ptr())
        page = spec.page_size_bytes // worker._physical_blocks_per_logical_kv_block
        worker.block_len_per_layer[region] = max(worker.block_len_per_layer[region], page)
