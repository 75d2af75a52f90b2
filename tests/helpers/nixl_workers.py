"""Workers of vLLM's NIXL connector in this process, on packed pages, with the stand-in for NIXL between them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    UniformTypeKVCacheSpecs,
)

from tests.helpers.transfer_end import STAND_IN
from vllm_kvtuner.attention.backend import backend_for
from vllm_kvtuner.pages.layout import PrecisionPair

BLOCK_SIZE, NUM_BLOCKS, HEAD_SIZE, NUM_HEADS = 32, 6, 64, 4


@dataclass(frozen=True)
class Rank:
    """One rank of an engine.

    Args:
        worker: of the connector.
        caches: [blocks, KV heads of the rank, tokens, content bytes] uint8 of each layer; of states
            [blocks, 1, 1, page bytes].
    """

    worker: Any
    caches: dict[str, torch.Tensor]


def spec_of(pair: PrecisionPair, num_heads: int, block_size: int = BLOCK_SIZE) -> AttentionSpec:
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=num_heads, head_size=HEAD_SIZE, head_size_v=HEAD_SIZE, dtype=torch.bfloat16
    )
    return backend_for(pair).customize_spec(spec)


def make_rank(
    patch: pytest.MonkeyPatch,
    config: Any,
    groups: Sequence[Sequence[PrecisionPair | MambaSpec]],
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    block_size: int = BLOCK_SIZE,
) -> Rank:
    """A rank whose caches hold random bytes.

    Args:
        config: VllmConfig as far as a worker reads it, with its ``transfer`` settings.
        groups: pairs of each cache group's layers, or states' specs. One group has tensors of its own per layer;
            several share blocks, in which the layers of each begin anew.
    """
    base = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker")
    pull = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker")
    patch.syspath_prepend(str(STAND_IN))
    agent = importlib.import_module("nixl._api")
    patch.setattr(base, "NixlWrapper", agent.nixl_agent)
    patch.setattr(base, "nixl_agent_config", None)
    patch.setattr(base, "get_tensor_model_parallel_rank", lambda: tp_rank)
    patch.setattr(base, "get_tensor_model_parallel_world_size", lambda: tp_size)
    patch.setattr(base, "get_current_attn_backends", lambda _: [backend_for(groups[0][0])])
    patch.setattr(base.current_platform, "discover_numa_topology", list)
    heads = NUM_HEADS // tp_size
    numbers = iter(range(100))
    specs: list[dict[str, KVCacheSpec]] = [
        {
            f"model.layers.{next(numbers)}.attn": each
            if isinstance(each, MambaSpec)
            else spec_of(each, heads, block_size)
            for each in group
        }
        for group in groups
    ]
    caches = _caches(specs)
    cache_config = KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(list(each), _group_spec(each, block_size)) for each in specs],
    )
    worker = pull.NixlPullConnectorWorker(config, f"engine {id(caches)}", cache_config)
    worker.register_kv_caches(caches)
    return Rank(worker, caches)


def _group_spec(specs: dict[str, KVCacheSpec], block_size: int) -> KVCacheSpec:
    """States' specs are not wrapped (blocks/state_groups.py)."""
    first = next(iter(specs.values()))
    return first if isinstance(first, MambaSpec) else UniformTypeKVCacheSpecs(block_size, specs)


def _shape(spec: KVCacheSpec) -> tuple[int, int, int, int]:
    if not isinstance(spec, AttentionSpec):
        return NUM_BLOCKS, 1, 1, spec.page_size_bytes
    content = spec.page_size_bytes // spec.num_kv_heads // spec.block_size
    return NUM_BLOCKS, spec.num_kv_heads, spec.block_size, content


def _caches(specs: Sequence[dict[str, KVCacheSpec]]) -> dict[str, torch.Tensor]:
    shapes = {name: _shape(spec) for group in specs for name, spec in group.items()}
    if len(specs) == 1:
        return {name: torch.randint(256, shape, dtype=torch.uint8) for name, shape in shapes.items()}
    block = max(sum(spec.page_size_bytes for spec in group.values()) for group in specs)
    pool = torch.randint(256, (NUM_BLOCKS * block,), dtype=torch.uint8)
    caches = {}
    for group in specs:
        offset = 0
        for name, spec in group.items():
            _, heads, tokens, content = shapes[name]
            strides = (block, tokens * content, content, 1)
            caches[name] = pool.as_strided((NUM_BLOCKS, heads, tokens, content), strides, offset)
            offset += spec.page_size_bytes
    return caches


def read(reader: Rank, owners: Sequence[Rank], pages: Sequence[tuple[list[int], list[int]]]) -> None:
    """One request's read, as the worker does it: handshake with the ranks it needs, descriptors, transfers.

    Args:
        reader: one rank of the decoding engine.
        owners: all ranks of the prefilling one.
        pages: of each group, blocks here and there.

    Raises:
        Exception: what the handshake refuses.
    """
    base = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker")
    worker = reader.worker
    engine = owners[0].worker.engine_id
    for owner in owners:  # ranks of one engine have one name
        owner.worker.xfer_handshake_metadata.agent_metadata_bytes = _named(base, owner, engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "zmq_ctx", lambda *_: _Channel(owners))
        agents, _ = worker._nixl_handshake("localhost", 1, len(owners), engine)
    worker._remote_agents[engine] = agents
    here, there = [list(group) for group, _ in pages], [list(group) for _, group in pages]
    remote = SimpleNamespace(
        engine_id=engine,
        host="localhost",
        port=1,
        block_ids=there,
        request_id="r",
        num_tokens=None,
        blocks_expiry_time=None,
    )
    meta = SimpleNamespace(
        local_block_ids=here,
        local_physical_block_ids=here,
        local_num_computed_blocks=(),
        remote=remote,
        awaiting_kvs=True,
        region_blocks_to_zero=None,
    )
    worker._recving_metadata["r"] = meta
    worker._read_blocks_for_req("r", meta)
    handles = worker._recving_transfers["r"]
    assert handles
    assert {worker.nixl_wrapper.check_xfer_state(handle) for handle in handles} == {"DONE"}


def _named(base: Any, owner: Rank, engine: str) -> bytes:
    payload = owner.worker.xfer_handshake_metadata.agent_metadata_bytes
    metadata = msgspec.msgpack.decode(payload, type=base.NixlAgentMetadata)
    metadata.engine_id = engine
    return msgspec.msgpack.encode(metadata)


class _Channel:
    """The side channel: answers who asks for a rank's metadata."""

    def __init__(self, owners: Sequence[Rank]) -> None:
        self.owners = owners

    def __enter__(self) -> _Channel:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def setsockopt(self, *_: Any) -> None:
        pass

    def send(self, message: bytes) -> None:
        _, _, self.rank = msgspec.msgpack.decode(message)

    def recv_multipart(self) -> list[bytes]:
        payload = self.owners[self.rank].worker.xfer_handshake_metadata
        return [msgspec.msgpack.encode(payload), msgspec.msgpack.encode(0.0)]
