"""NIXL's agent as vLLM uses it: reads registered memory of another process, and refuses any other.

Bytes come by ``process_vm_readv``, notifications by datagrams. Unlike NIXL it checks on both sides that every
descriptor lies in memory that was registered, so that a wrong address or length is an error and no answer.

``NIXL_STAND_IN_FAULT=truncated`` makes transfers stop in the middle of their last descriptor and fail.
"""

import ctypes
import itertools
import os
import pickle
import socket
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nixl._bindings import nixlXferTelemetry

FAULT = "NIXL_STAND_IN_FAULT"
_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)


class _Span(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class NixlError(RuntimeError):
    """What NIXL would have refused, or should have."""


def nixl_agent_config(*_: Any, **__: Any) -> None:
    """Backends and threads make no difference here."""


class nixl_agent:
    """One agent of this process."""

    def __init__(self, name: str, config: None = None) -> None:
        _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)  # where only parents may read a process
        self.name = name
        self._inbox = Path(tempfile.mkdtemp(prefix="nixl")) / "inbox"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._inbox))
        self._socket.setblocking(False)
        self._registered: list[tuple[int, int]] = []
        self._remotes: dict[str, dict[str, Any]] = {}
        self._lists: dict[int, tuple[str, np.ndarray]] = {}
        self._transfers: dict[int, dict[str, Any]] = {}
        self._numbers = itertools.count(1)

    def create_backend(self, *_: Any) -> None:
        """Any backend does."""

    def get_reg_descs(self, descs: Sequence[tuple[int, int, int, str]], mem_type: str) -> list[tuple[int, int]]:
        assert mem_type == "DRAM"
        return [(start, length) for start, length, *_ in descs]

    def register_memory(self, descs: Iterable[tuple[int, int]], backends: Sequence[str] = ()) -> None:
        self._registered += descs

    def deregister_memory(self, descs: Iterable[tuple[int, int]]) -> None:
        for desc in descs:
            self._registered.remove(desc)

    def get_agent_metadata(self) -> bytes:
        told = {"name": self.name, "pid": os.getpid(), "inbox": str(self._inbox), "registered": self._registered}
        return pickle.dumps(told)

    def add_remote_agent(self, metadata: bytes) -> str:
        remote = pickle.loads(metadata)
        self._remotes[remote["name"]] = remote
        return remote["name"]

    def remove_remote_agent(self, agent: str) -> None:
        del self._remotes[agent]

    def check_remote_metadata(self, agent: str, *_: Any) -> bool:
        return agent in self._remotes

    def get_xfer_descs(self, descs: Any, mem_type: str) -> np.ndarray:
        """[descriptors, (address, bytes)] of rows (address, bytes, device) or those with (stride, count) besides."""
        assert mem_type == "DRAM"
        rows = [[int(number) for number in row] for row in descs]
        return np.array(
            [
                (row[0] + i * stride, row[1])
                for row in rows
                for stride, count in [row[3:] or (0, 1)]
                for i in range(count)
            ],
            dtype=np.int64,
        )

    def prep_xfer_dlist(self, agent: str, descs: np.ndarray) -> int:
        registered = self._registered if agent == "NIXL_INIT_AGENT" else self._remotes[agent]["registered"]
        inside = np.zeros(len(descs), dtype=bool)
        for start, length in registered:
            inside |= (descs[:, 0] >= start) & (descs[:, 0] + descs[:, 1] <= start + length)
        if not inside.all():
            raise NixlError(f"{(~inside).sum()} of {len(descs)} descriptors leave the memory registered by {agent}")
        handle = next(self._numbers)
        self._lists[handle] = (agent, descs)
        return handle

    def release_dlist_handle(self, handle: int) -> None:
        del self._lists[handle]

    def make_prepped_xfer(
        self, way: str, local: int, local_ids: Any, remote: int, remote_ids: Any, notif_msg: bytes = b""
    ) -> int:
        assert way == "READ"
        agent, theirs = self._lists[remote]
        to, source = self._lists[local][1][np.asarray(local_ids)], theirs[np.asarray(remote_ids)]
        if not np.array_equal(to[:, 1], source[:, 1]):
            raise NixlError("descriptors of the two ends have unequal lengths")
        handle = next(self._numbers)
        self._transfers[handle] = {"agent": agent, "to": to, "from": source, "message": notif_msg, "state": "PROC"}
        return handle

    def transfer(self, handle: int) -> str:
        this = self._transfers[handle]
        truncated = os.environ.get(FAULT) == "truncated"
        pid = self._remotes[this["agent"]]["pid"]
        for number, ((to, length), (source, _)) in enumerate(
            zip(this["to"].tolist(), this["from"].tolist(), strict=True)
        ):
            wanted = length // 2 if truncated and number == len(this["to"]) - 1 else length
            here, there = _Span(to, wanted), _Span(source, wanted)
            if _libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) != length:
                this["state"] = "ERR"
                return "ERR"
        this["state"] = "DONE"
        self.send_notif(this["agent"], this["message"])
        return "PROC"

    def check_xfer_state(self, handle: int) -> str:
        return self._transfers[handle]["state"]

    def get_xfer_telemetry(self, handle: int) -> nixlXferTelemetry:
        to = self._transfers[handle]["to"]
        return nixlXferTelemetry(1.0, 1.0, int(to[:, 1].sum()), len(to))

    def release_xfer_handle(self, handle: int) -> None:
        del self._transfers[handle]

    def send_notif(self, agent: str, notif_msg: bytes) -> None:
        self._socket.sendto(pickle.dumps((self.name, notif_msg)), self._remotes[agent]["inbox"])

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        notifs: dict[str, list[bytes]] = {}
        while True:
            try:
                name, message = pickle.loads(self._socket.recv(1 << 16))
            except BlockingIOError:
                return notifs
            notifs.setdefault(name, []).append(message)
