"""One end of a transfer: a vLLM engine in a process of its own, which is asked in turns and may be killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.engine import KV_CACHE_BYTES, fork_server

STAND_IN = Path(__file__).parent / "nixl_stand_in"
"""Folder of a package ``nixl`` for machines that have none."""
_engines: dict[str, Any] = {}
"""The engine of this process."""


@dataclass(frozen=True)
class Said:
    """What an end answered.

    Args:
        token_ids: generated tokens.
        params: ``kv_transfer_params`` for the other end, of a prefill; else None.
        cached_tokens: prompt tokens that were not computed here.
        finish_reason: as the client sees it; ``error`` where the pages did not come and the policy is to fail.
    """

    token_ids: tuple[int, ...]
    params: dict[str, Any] | None
    cached_tokens: int
    finish_reason: str | None


class TransferEnd:
    """An engine with a NIXL connector.

    Args:
        model: model folder.
        folder: where its log goes.
        role: ``kv_producer`` or ``kv_consumer``.
        transfer: further keys of the transfer configuration.
        environment: variables of its process.
        options: keywords of LLM, over those of a small float32 engine.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        role: str,
        *,
        transfer: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.port = free_port()
        self.log = folder / f"{role}_{self.port}.log"
        connector = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu", **(transfer or {})}
        keywords = {
            "model": str(model),
            "kv_cache_dtype": "kvtuner",
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "kv_transfer_config": connector,
            "disable_log_stats": False,
            **options,
        }
        # As the guide says. On some CPUs vLLM sets another layout, which processes that start later inherit.
        environment = {"VLLM_SSM_CONV_STATE_LAYOUT": "DS", **(environment or {})}
        self._pool = ProcessPoolExecutor(1, fork_server())
        self.pid = self._pool.submit(_start, keywords, self.port, self.log, environment).result()

    def prefill(self, prompt: Sequence[int]) -> Said:
        """Compute a prompt and keep its pages for the other end."""
        params = {"do_remote_decode": True, "do_remote_prefill": False}
        return self._pool.submit(_ask, [list(prompt)], 1, [params]).result()[0]

    def decode(self, prompt: Sequence[int], params: dict[str, Any] | None, tokens: int = 8) -> Said:
        """Take a prompt's pages from the other end and go on; without ``params`` compute it here."""
        return self._pool.submit(_ask, [list(prompt)], tokens, [params]).result()[0]

    def prompt_tokens_moved(self) -> int:
        """Tokens whose pages came from another end."""
        return self._pool.submit(_moved).result()

    def kill(self) -> None:
        """End the process as a crash would."""
        os.kill(self.pid, signal.SIGKILL)
        self._pool.shutdown(wait=True)

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._pool.submit(_stop).result()
        self._pool.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(keywords: dict[str, Any], port: int, log: Path, environment: dict[str, str]) -> int:
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ |= {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(port), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", **environment}
    if importlib.util.find_spec("nixl") is None:
        sys.path.insert(0, str(STAND_IN))
    from vllm import LLM

    _engines["engine"] = LLM(**keywords)
    return os.getpid()


def _ask(prompts: list[list[int]], tokens: int, params: list[dict[str, Any] | None]) -> list[Said]:
    from vllm import SamplingParams

    sampling = [
        SamplingParams(
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if each is None else {"kv_transfer_params": each},
        )
        for each in params
    ]
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = _engines["engine"].generate(inputs, sampling, use_tqdm=False)
    return [
        Said(
            tuple(output.outputs[0].token_ids),
            output.kv_transfer_params,
            output.num_cached_tokens,
            output.outputs[0].finish_reason,
        )
        for output in outputs
    ]


def _moved() -> int:
    hits = [each.value for each in _engines["engine"].get_metrics() if each.name == "vllm:external_prefix_cache_hits"]
    return int(sum(hits))


def _stop() -> None:
    _engines.pop("engine").llm_engine.engine_core.shutdown()
