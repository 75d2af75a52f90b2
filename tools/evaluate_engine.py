"""One teacher-forced pass inside vLLM: catches the full logits at every prompt position and compares them.

Prompts run one at a time with ``prompt_logprobs``, for which both model runners compute the logits of every prompt
position. While they do, ``compute_logits`` is tapped in the worker. With one request, its rows come in prompt order
however prefill is chunked, so the next row caught is always the next position.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .divergence import TokenScores, compare
from .settings import Setting

_LEN_MULTIPLE = 256
"""max_model_len is rounded up to this many tokens, whole blocks of any block size in use, so that the capacity vLLM
derives from it loses nothing to a part-filled last block."""


@dataclass(frozen=True)
class ReferenceLogits:
    """A file of raw logits, row after row in the order of the predicted positions.

    The rows are kept in the dtype in which the engine gave them, so reading them back adds no rounding, and float32
    log-softmax of them is what the reference engine itself would compute.

    Attributes:
        dtype: name of a torch dtype.
        rows: predicted positions.
    """

    path: Path
    dtype: str
    vocab_size: int
    rows: int

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop as a [stop - start, vocab_size] tensor."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        row_bytes = self.vocab_size * dtype.itemsize
        mapped = np.memmap(self.path, np.uint8, "r", start * row_bytes, (stop - start, row_bytes))
        return torch.from_numpy(np.array(mapped)).view(dtype)


@dataclass(frozen=True)
class EngineJob:
    """One engine to build and one pass to run.

    Attributes:
        windows: token ids; each window gives one prediction fewer than it has tokens.
        max_model_len: tokens the longest window and one generated token need.
        chunk: most prompt tokens per step (``max_num_batched_tokens``).
        kv_memory_bytes: memory of the KV cache.
        reference: logits to compare with, or a path to record this engine's own to.
    """

    label: str
    model: str
    dtype: str
    setting: Setting
    windows: tuple[tuple[int, ...], ...]
    max_model_len: int
    chunk: int
    kv_memory_bytes: int
    reference: ReferenceLogits | Path


@dataclass(frozen=True)
class EngineResult:
    """What one pass gave; ``scores`` is None where logits were recorded instead."""

    reference: ReferenceLogits
    scores: TokenScores | None
    kv_tokens: int
    block_size: int
    seconds: float


@dataclass
class _Tap:
    """Receives logits in the worker: appends them to a file, or compares them with the file's."""

    reference: ReferenceLogits | Path
    targets: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    start: int = 0
    position: int = 0
    scores: list[TokenScores] = field(default_factory=list)
    dtype: str = ""
    vocab_size: int = 0

    def begin(self, start: int, window: tuple[int, ...]) -> None:
        """Expect a window whose first prediction is row ``start`` of the reference."""
        self.start, self.position = start, 0
        self.targets = torch.tensor(window[1:])

    def take(self, logits: torch.Tensor) -> None:
        """The next rows of the window, [n, vocabulary]; the last position predicts nothing known and is dropped."""
        logits = logits[: len(self.targets) - self.position]
        if not len(logits):
            return
        first, self.position = self.position, self.position + len(logits)
        if isinstance(self.reference, Path):
            self.dtype, self.vocab_size = str(logits.dtype).removeprefix("torch."), logits.shape[1]
            with open(self.reference, "ab") as file:
                file.write(logits.contiguous().cpu().view(torch.uint8).numpy().data)
            return
        reference = self.reference.read(self.start + first, self.start + self.position).to(logits.device)
        self.scores.append(compare(reference, logits, self.targets[first : self.position].to(logits.device)))

    def end(self) -> None:
        if self.position != len(self.targets):
            raise RuntimeError(
                f"the model runner must give logits at all {len(self.targets)} predicted positions of a prompt, "
                f"but gave {self.position}"
            )


def _install(worker: Any, reference: ReferenceLogits | Path) -> None:
    """Tap the worker's prompt logits. Runs in the worker.

    The V1 runner computes them in ``_get_prompt_logprobs_dict``, the V2 runner in its prompt_logprobs_worker; outside
    of these calls compute_logits serves sampling, whose rows are not wanted.
    """
    runner = worker.model_runner
    tap = runner.kvtuner_tap = _Tap(reference)
    owner, name = (
        (runner.prompt_logprobs_worker, "compute_prompt_logprobs")
        if hasattr(runner, "prompt_logprobs_worker")
        else (runner, "_get_prompt_logprobs_dict")
    )
    compute_prompt_logprobs: Callable[..., Any] = getattr(owner, name)
    model = runner.get_model()
    compute_logits: Callable[..., torch.Tensor] = model.compute_logits
    active = False

    def tapped_compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = compute_logits(*args, **kwargs)
        if active:
            tap.take(logits)
        return logits

    def tapped_compute_prompt_logprobs(*args: Any, **kwargs: Any) -> Any:
        nonlocal active
        active = True
        try:
            return compute_prompt_logprobs(*args, **kwargs)
        finally:
            active = False

    model.compute_logits = tapped_compute_logits
    setattr(owner, name, tapped_compute_prompt_logprobs)


def _begin(worker: Any, start: int, window: tuple[int, ...]) -> None:
    worker.model_runner.kvtuner_tap.begin(start, window)


def _end(worker: Any) -> None:
    worker.model_runner.kvtuner_tap.end()


def _collect(worker: Any) -> tuple[list[TokenScores], str, int]:
    tap = worker.model_runner.kvtuner_tap
    return tap.scores, tap.dtype, tap.vocab_size


def run_engine(job: EngineJob) -> EngineResult:
    """Build the engine in this process, run all windows, and return the scores. Meant for a process of its own."""
    # In-process, so that the tap needs no pickling and the memory is this process's; read when vLLM is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    llm = LLM(
        model=job.model,
        dtype=job.dtype,
        kv_cache_dtype=job.setting.kv_cache_dtype,
        additional_config=job.setting.additional_config(attend_cached_prefill=True),
        # Rounding the logits to bf16 alone is a KL of 0.0002 and 1.6% of top-1 (SmolLM2): as much as an 8-bit cache.
        hf_overrides={"head_dtype": "float32"},
        max_model_len=job.max_model_len,
        max_num_seqs=1,
        max_num_batched_tokens=job.chunk,
        kv_cache_memory_bytes=job.kv_memory_bytes,
        enable_prefix_caching=False,
        # Settings must differ in the cache alone, not in what the compiler fuses around it.
        enforce_eager=True,
    )
    try:
        llm.collective_rpc(_install, args=(job.reference,))
        # The least for which both runners compute the logits of every prompt position.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        start = 0
        for window in tqdm(job.windows, desc=job.label, unit="window"):
            llm.collective_rpc(_begin, args=(start, window))
            llm.generate([{"prompt_token_ids": list(window)}], params, use_tqdm=False)
            llm.collective_rpc(_end)
            start += len(window) - 1
        scores, dtype, vocab_size = llm.collective_rpc(_collect)[0]
    finally:
        llm.llm_engine.engine_core.shutdown()
    cache = llm.llm_engine.vllm_config.cache_config
    reference = job.reference
    if isinstance(reference, Path):
        reference = ReferenceLogits(reference, dtype, vocab_size, start)
    return EngineResult(
        reference=reference,
        scores=TokenScores.join(scores) if scores else None,
        kv_tokens=cache.kv_cache_size_tokens,
        block_size=cache.block_size,
        seconds=time.monotonic() - started,
    )


def max_model_len_for(context: int, model_limit: int) -> int:
    """max_model_len for windows of ``context`` tokens and one generated one, in whole blocks where the model allows.

    Raises:
        ValueError: the model cannot hold them.
    """
    if context + 1 > model_limit:
        raise ValueError(f"context must be below the model's {model_limit} positions, but got {context}")
    return min(-(-(context + 1) // _LEN_MULTIPLE) * _LEN_MULTIPLE, model_limit)
