"""A NIXL connector over a link of limited rate, for measurements: a transfer is done when such a link would be.

vLLM imports it by its path (``kv_connector_module_path``). Bytes move as fast as NIXL moves them; the connector hears
that they have come when a link that carries one transfer after the other would have brought them.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector


class Link:
    """What all transfers of this process share.

    Attributes:
        bytes_per_s: its rate; None does not limit it.
        moved: bytes of all transfers so far.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.bytes_per_s: float | None = None
        self.moved = 0
        self._free_at = 0.0

    def send(self, size: int) -> float:
        """Take the link for ``size`` bytes; when, by the clock, the last of them is there."""
        self.moved += size
        now = self.clock()
        if self.bytes_per_s is None:
            return now
        self._free_at = max(now, self._free_at) + size / self.bytes_per_s
        return self._free_at


LINK = Link()
"""The link of this process."""


class LimitedAgent:
    """A NIXL agent whose transfers take the link's time."""

    def __init__(self, agent: Any, link: Link) -> None:
        self._agent, self._link = agent, link
        self._described: list[tuple[Any, np.ndarray]] = []
        self._lengths: dict[Any, np.ndarray] = {}
        self._sizes: dict[Any, int] = {}
        self._due: dict[Any, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def get_xfer_descs(self, descs: Any, mem_type: str) -> Any:
        made = self._agent.get_xfer_descs(descs, mem_type)
        rows = np.asarray(descs)
        # Since 0.33.0 a row is (address, bytes, device, stride, count).
        self._described.append(
            (made, np.repeat(rows[:, 1], rows[:, 4].astype(int)) if rows.shape[1] > 3 else rows[:, 1])
        )
        return made

    def prep_xfer_dlist(self, agent_name: str, descs: Any) -> Any:
        handle = self._agent.prep_xfer_dlist(agent_name, descs)
        self._lengths[handle] = next(lengths for made, lengths in self._described if made is descs)
        self._described = [(made, lengths) for made, lengths in self._described if made is not descs]
        return handle

    def make_prepped_xfer(self, way: str, local: Any, local_ids: Any, *args: Any, **kwargs: Any) -> Any:
        handle = self._agent.make_prepped_xfer(way, local, local_ids, *args, **kwargs)
        self._sizes[handle] = int(self._lengths[local][np.asarray(local_ids)].sum())
        return handle

    def transfer(self, handle: Any, *args: Any) -> Any:
        self._due[handle] = self._link.send(self._sizes.pop(handle))
        return self._agent.transfer(handle, *args)

    def check_xfer_state(self, handle: Any) -> str:
        state = self._agent.check_xfer_state(handle)
        return "PROC" if state == "DONE" and self._link.clock() < self._due[handle] else state

    def release_xfer_handle(self, handle: Any) -> None:
        self._agent.release_xfer_handle(handle)
        self._due.pop(handle, None)


class LimitedNixlConnector(NixlConnector):
    """vLLM's NIXL connector with :data:`LINK` between the ends."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self.connector_worker is not None:
            self.connector_worker.nixl_wrapper = LimitedAgent(self.connector_worker.nixl_wrapper, LINK)
