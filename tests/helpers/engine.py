"""vLLM engines, each in a process of its own: plain data in, plain data out.

Processes are forked from a server that has imported vLLM once, so that an engine costs its own set-up alone and leaves
no memory behind.
"""

import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.pictures import stand_in_for_torchvision

VOCABULARY = 512
"""Tokens of the tiny models."""
KV_CACHE_BYTES = 16 << 20
SERVER_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # One thread, not bound to a core: for models this small, threads that wait for each other cost more than they do.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    # On a GPU, FlashInfer's would be compiled by nvcc, which may be missing.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
FULL_LOGPROBS = -1
"""SamplingParams' value for the log-probabilities of the whole vocabulary."""

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="float32 engines with vLLM's CPU build")


@dataclass(frozen=True)
class Call:
    """One ``LLM.generate``.

    Args:
        prompts: token ids of each prompt.
        sampling: keywords of SamplingParams; greedy, without stopping, where left out.
        together: False runs one prompt after the other.
        adapter: folder of a LoRA adapter, or None.
        pictures: of each prompt, [height, width, 3] uint8, in the order of their placeholders; none where left out.
    """

    prompts: Sequence[Sequence[int]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    together: bool = True
    adapter: str | None = None
    pictures: Sequence[Sequence[np.ndarray]] = ()


@dataclass(frozen=True)
class Answer:
    """What one prompt got, or one of its ``n`` samples.

    Args:
        token_ids: generated tokens.
        logprobs: [generated tokens, vocabulary] float32, if all were asked for.
        prompt_logprobs: [prompt tokens - 1, vocabulary] float32, if all were asked for.
        cached_tokens: prompt tokens that the prefix cache held.
    """

    token_ids: tuple[int, ...]
    logprobs: np.ndarray | None
    prompt_logprobs: np.ndarray | None
    cached_tokens: int


@dataclass(frozen=True)
class EngineRun:
    """One engine's life.

    Args:
        answers: per call and prompt; ``n`` samples of one prompt follow each other.
        block_size: tokens per block.
        num_gpu_blocks: blocks of the pool.
        kv_cache_size_tokens: the capacity vLLM reports.
        allocated_bytes: bytes of the KV cache tensors.
        page_bytes: bytes of one page of each decoder layer, in order; a draft model's follow.
        groups: layers and tokens per block of each KV cache group.
        managers: names of the classes that hold the blocks of these groups.
        allocator: module whose function allocates the blocks of a step.
        preemptions: how often a request was preempted.
        drafted: tokens that speculative decoding proposed.
        accepted: those of them that were kept.
        plugin_loaded: whether vLLM loaded the plugin.
        compiled_graphs: graphs that torch.compile made.
        log: what it printed.
    """

    answers: list[list[Answer]] = field(repr=False)
    block_size: int
    num_gpu_blocks: int
    kv_cache_size_tokens: int
    allocated_bytes: int
    page_bytes: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    managers: tuple[str, ...]
    allocator: str
    preemptions: int
    drafted: int
    accepted: int
    plugin_loaded: bool
    compiled_graphs: int
    log: str = field(default="", repr=False)

    @property
    def tokens(self) -> list[list[tuple[int, ...]]]:
        return [[answer.token_ids for answer in call] for call in self.answers]


def run_engine(
    model: Path,
    calls: Sequence[Call] = (),
    *,
    profile: str | Path | None = None,
    attend_cached_prefill: bool | None = None,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> EngineRun:
    """Build an engine, run the calls one after the other, and end it.

    Args:
        model: model folder.
        calls: what to generate.
        profile: profile of the kvtuner cache; None runs vLLM's own (``auto``).
        attend_cached_prefill: overrides the profile's.
        environment: variables of the engine's process.
        options: further keywords of LLM, over float32, eager, prefix caching, and a small cache.

    Raises:
        Exception: whatever the engine raised.
    """
    additional: dict[str, Any] = {} if profile is None else {"kvtuner_profile": str(profile)}
    if attend_cached_prefill is not None:
        additional["kvtuner_attend_cached_prefill"] = attend_cached_prefill
    keywords = {
        "model": str(model),
        "kv_cache_dtype": "auto" if profile is None else "kvtuner",
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_logprobs": -1,
        "enforce_eager": True,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "disable_log_stats": False,
        "additional_config": additional,
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        try:
            with ProcessPoolExecutor(max_workers=1, mp_context=fork_server()) as pool:
                run = pool.submit(_live, keywords, list(calls), dict(environment or {}), log).result()
        finally:
            text = log.read_text(errors="replace")
            print(text)  # pytest shows it beside a failure
    return replace(run, log=text)


def fork_server() -> Any:
    """Context of processes that are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.vllm_preload"])
    with pytest.MonkeyPatch.context() as patch:
        # Kernels' tests set it for this process; no user's engine has it.
        patch.delenv("TRITON_INTERPRET", raising=False)
        for name, value in SERVER_ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _live(keywords: dict[str, Any], calls: list[Call], environment: dict[str, str], log: Path) -> EngineRun:
    # What the engine prints, from whichever library, is its log.
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(environment)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    if any(call.pictures for call in calls):
        stand_in_for_torchvision()
    llm = LLM(**keywords)
    answers = []
    for call in calls:
        sampling = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "detokenize": False, **call.sampling}
        prompts: list[dict[str, Any]] = [{"prompt_token_ids": list(prompt)} for prompt in call.prompts]
        for prompt, pictures in zip(prompts, call.pictures, strict=False):
            if pictures:
                prompt["multi_modal_data"] = {"image": [Image.fromarray(picture) for picture in pictures]}
        batches = [prompts] if call.together else [[prompt] for prompt in prompts]
        lora = LoRARequest("adapter", 1, call.adapter) if call.adapter else None
        outputs = [
            output
            for batch in batches
            for output in llm.generate(batch, SamplingParams(**sampling), use_tqdm=False, lora_request=lora)
        ]
        answers.append([_answer(output, sample) for output in outputs for sample in output.outputs])
    config = llm.llm_engine.vllm_config
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    specs = runner.get_kv_cache_spec()
    storages = [cache.untyped_storage() for cache in runner.kv_caches]
    counters = Counter[str]()
    for metric in llm.get_metrics():
        counters[metric.name] += getattr(metric, "value", 0)
    run = EngineRun(
        answers=answers,
        block_size=config.cache_config.block_size,
        num_gpu_blocks=config.cache_config.num_gpu_blocks,
        kv_cache_size_tokens=config.cache_config.kv_cache_size_tokens,
        allocated_bytes=sum({s.data_ptr(): s.nbytes() for s in storages}.values()),
        page_bytes=tuple(spec.page_size_bytes for spec in specs.values()),
        groups=tuple(
            (len(group.layer_names), group.kv_cache_spec.block_size) for group in runner.kv_cache_config.kv_cache_groups
        ),
        managers=tuple(type(each).__name__ for each in manager.coordinator.single_type_managers),
        allocator=manager.allocate_slots.__module__,
        preemptions=counters["vllm:num_preemptions"],
        drafted=counters["vllm:spec_decode_num_draft_tokens"],
        accepted=counters["vllm:spec_decode_num_accepted_tokens"],
        plugin_loaded="vllm_kvtuner.plugin" in sys.modules,
        compiled_graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"],
    )
    llm.llm_engine.engine_core.shutdown()
    return run


def _answer(output: Any, sample: Any) -> Answer:
    return Answer(
        token_ids=tuple(sample.token_ids),
        logprobs=_matrix(sample.logprobs),
        prompt_logprobs=_matrix(output.prompt_logprobs[1:]) if output.prompt_logprobs else None,
        cached_tokens=output.num_cached_tokens,
    )


def _matrix(rows: Sequence[Mapping[int, Any]] | None) -> np.ndarray | None:
    """Rows of full log-probabilities; None where not all of them were asked for."""
    if not rows or len(rows[0]) < VOCABULARY:
        return None
    matrix = np.empty((len(rows), VOCABULARY), np.float32)
    for index, row in enumerate(rows):
        for token, entry in row.items():
            matrix[index, token] = entry.logprob
    return matrix
