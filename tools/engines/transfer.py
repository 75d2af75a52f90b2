"""The engines of ``kvtuner bench transfer``, which stay up in processes of their own between what they are asked."""

import importlib
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engines.serve import token_range

LINK_MODULE = "kvtuner_tools.engines.limited_link"
LAST_TOKENS = 16
"""Tokens that an engine adds to a prompt where they are compared with another's."""

_engines: dict[str, Any] = {}
"""The engine of this process."""


@dataclass(frozen=True)
class TransferJob:
    """One engine.

    Attributes:
        model: folder with config.json; weights are random.
        dtype: of the model.
        connector: vLLM's ``kv_transfer_config``; None for an engine without one.
        max_model_len: tokens of a request.
        kv_memory_bytes: of its KV cache.
        memory: share of a card's memory that it may use.
        environment: variables of its process, set before vLLM is imported.
    """

    model: Path
    setting: CacheSetting
    dtype: str
    connector: Mapping[str, Any] | None
    max_model_len: int
    kv_memory_bytes: int
    memory: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What one request got.

    Attributes:
        seconds: from the request to its last token.
        token_ids: generated.
        params: for the engine that goes on, of a prefill.
        cached_tokens: of the prompt, that this engine did not compute; without those over a link.
        moved_bytes: that came over the link.
    """

    seconds: float
    token_ids: tuple[int, ...]
    params: dict[str, Any] | None
    cached_tokens: int
    moved_bytes: int


def start(job: TransferJob) -> dict[str, float]:
    """Build the engine in this process.

    Returns:
        Bytes that a token takes in the pages of all layers (``page_bytes``), and tokens of a block (``block_size``).
    """
    # In the process itself, so that the link can be set from here.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **job.environment}
    from vllm import LLM

    # Prefill reads back what it stored: a token does not depend on where the pages before it were computed.
    additional = job.setting.additional_config(attend_cached_prefill=job.setting.profile is not None)
    llm = LLM(
        model=str(job.model),
        dtype=job.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=job.setting.kv_cache_dtype,
        attention_backend=job.setting.attention_backend,
        max_model_len=job.max_model_len,
        max_num_seqs=4,
        gpu_memory_utilization=job.memory,
        kv_cache_memory_bytes=job.kv_memory_bytes,
        enable_prefix_caching=True,
        enforce_eager=True,
        disable_log_stats=False,
        kv_transfer_config=None if job.connector is None else dict(job.connector),
        additional_config=additional,
    )
    _engines["engine"] = llm
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    specs = runner.get_kv_cache_spec().values()
    return {
        "page_bytes": sum(spec.page_size_bytes / spec.block_size for spec in specs),
        "block_size": llm.llm_engine.vllm_config.cache_config.block_size,
    }


def prompt(tokens: int, seed: int) -> list[int]:
    """A random prompt, the same in every engine of a model."""
    low, high = token_range(_engines["engine"].llm_engine.model_config.get_vocab_size())
    numbers = random.Random(seed)
    return [numbers.randrange(low, high) for _ in range(tokens)]


def ask(
    tokens: int,
    seed: int,
    *,
    output_tokens: int = 1,
    params: Mapping[str, Any] | None = None,
    bytes_per_s: float | None = None,
) -> Answer:
    """Serve one request.

    Args:
        tokens: of its prompt, see :func:`prompt`.
        params: ``kv_transfer_params``.
        bytes_per_s: of the link; None for no limit.
    """
    from vllm import SamplingParams

    llm = _engines["engine"]
    link = importlib.import_module(LINK_MODULE).LINK if params is not None else None
    if link is not None:
        link.bytes_per_s = bytes_per_s
    before = 0 if link is None else link.moved
    sampling = SamplingParams(
        max_tokens=output_tokens,
        ignore_eos=True,
        temperature=0.0,
        detokenize=False,
        extra_args=None if params is None else {"kv_transfer_params": dict(params)},
    )
    inputs: list[Any] = [{"prompt_token_ids": prompt(tokens, seed)}]
    begin = time.perf_counter()
    (output,) = llm.generate(inputs, sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    if output.outputs[0].finish_reason == "error":
        raise RuntimeError("the pages did not come; the engine's log says why")
    moved = 0 if link is None else link.moved - before
    return Answer(
        seconds, tuple(output.outputs[0].token_ids), output.kv_transfer_params, output.num_cached_tokens, moved
    )


def forget() -> None:
    """Forget the cache of the device, so that a prompt's pages come from where a connector has put them."""
    llm = _engines["engine"]
    ask(1, 0)  # what a connector stores may go out one step later
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be emptied")


def metric(name: str) -> float:
    """A counter of vLLM's, over all its labels."""
    return sum(getattr(each, "value", 0) for each in _engines["engine"].get_metrics() if each.name == name)


def stop() -> None:
    """End the engine, whose children a process would wait for."""
    if engine := _engines.pop("engine", None):
        engine.llm_engine.engine_core.shutdown()
