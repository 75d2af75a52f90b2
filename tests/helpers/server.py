"""A ``vllm serve`` of the environment that runs the tests."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 400
STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        url: without a path.
        log_path: what it prints goes there.
    """

    url: str
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        return sum(float(line.rpartition(" ")[2]) for line in self._metric_lines(name))

    def metric_label(self, name: str, label: str) -> str:
        """A label's value of a Prometheus metric that has one line."""
        (line,) = self._metric_lines(name)
        match = re.search(f'{label}="([^"]*)"', line)
        assert match, f"no label {label} in {line}"
        return match[1]

    def metrics(self) -> list[str]:
        """Lines of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            return response.read().decode().splitlines()

    def _metric_lines(self, name: str) -> list[str]:
        lines = [line for line in self.metrics() if line.startswith(f"{name}{{")]
        assert lines, f"no metric {name}"
        return lines


@contextlib.contextmanager
def serving(model: Path, log_path: Path, arguments: Sequence[str]) -> Iterator[Server]:
    """Run ``vllm serve MODEL`` on a free loopback port until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*_vllm(), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    # Threads bound to cores stall each other wherever anything else runs beside them.
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)  # kernels' tests set it for their own process
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", log_path)
    try:
        _wait(process, server)
        yield server
        process.terminate()
        process.wait(STOP_TIMEOUT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(server.log)  # pytest shows it beside a failure


def _vllm() -> list[str]:
    """The command, or its module where vLLM lies in a folder without one."""
    command = Path(sys.executable).parent / "vllm"
    return [str(command)] if command.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def _wait(process: subprocess.Popen, server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended with status {process.returncode}"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise TimeoutError(f"the server was not up after {START_TIMEOUT_S} s")
