"""An engine that measurements run: teacher-forced passes that see the full logits of prompt positions, and answers.

In a pass, prompts run one at a time with ``prompt_logprobs``, for which both model runners compute the logits of every
prompt position. While they do, ``compute_logits`` is tapped in the worker of the rank that gives logits. With one
request, its rows come in prompt order however prefill is chunked, so the next row caught is always the next position.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtuner_tools.cache_setting import AUTO, CacheSetting, unquantized_keywords
from kvtuner_tools.divergence import TokenScores, compare
from kvtuner_tools.engine_arguments import EngineWords, engine_keywords, model_source
from kvtuner_tools.engines.ranks import gives_logits, make_room_for_stage_before
from kvtuner_tools.model_files import load_config, max_positions
from kvtuner_tools.progress import track
from kvtuner_tools.task_accuracy import Completion
from vllm_kvtuner.profile.profile import ResolvedProfile

_LEN_MULTIPLE = 256
"""max_model_len is rounded up to this many tokens, whole blocks of any block size in use, so that the capacity vLLM
derives from it loses nothing to a part-filled last block."""
_ROWS_AT_ONCE = 1024
"""Rows of a reference that are copied to a device at a time."""
TASK_MAX_NUM_SEQS = 256
"""Questions of a task that run together, as far as the KV cache holds them: a step without CUDA graphs takes a GPU as
long for a few as for many."""


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

    @property
    def num_bytes(self) -> int:
        return self.rows * self.vocab_size * self._torch_dtype.itemsize

    @property
    def _torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop as a [stop - start, vocab_size] tensor."""
        row_bytes = self.vocab_size * self._torch_dtype.itemsize
        mapped = np.memmap(self.path, np.uint8, "r", start * row_bytes, (stop - start, row_bytes))
        return torch.from_numpy(np.array(mapped)).view(self._torch_dtype)

    def load(self, device: torch.device) -> torch.Tensor:
        """All rows, [rows, vocab_size], on a device."""
        rows = torch.empty(self.rows, self.vocab_size, dtype=self._torch_dtype, device=device)
        for start in range(0, self.rows, _ROWS_AT_ONCE):
            part = slice(start, min(start + _ROWS_AT_ONCE, self.rows))
            rows[part] = self.read(part.start, part.stop)
        return rows


@dataclass(frozen=True)
class EngineOptions:
    """How to build an engine.

    Attributes:
        label: what progress bars call it.
        max_model_len: tokens the longest prompt and its answer need.
        chunk: most prompt tokens per step (``max_num_batched_tokens``).
        kv_memory_bytes: memory of the KV cache on each rank.
        max_num_seqs: questions that are answered together.
        switchable: calibration mode (``kvtuner`` settings only).
        prefix_caching: whether prompts read what others that begin alike have stored.
        words: vLLM's engine arguments.
    """

    label: str
    model: str
    dtype: str
    setting: CacheSetting
    max_model_len: int
    chunk: int
    kv_memory_bytes: int
    max_num_seqs: int = 1
    switchable: bool = False
    prefix_caching: bool = True
    words: EngineWords = field(default_factory=dict)


@dataclass(frozen=True)
class Window:
    """Token ids to run teacher-forced.

    Attributes:
        start: the first that is predicted; those before it are given.
    """

    ids: tuple[int, ...]
    start: int = 1

    @property
    def positions(self) -> int:
        """Predicted tokens."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Asked:
    """Questions to answer.

    Attributes:
        prompts: token ids of each.
        max_tokens: tokens an answer may have.
        temperature: of sampling; 0 takes the most likely token.
        is_followed: whether answers become windows where the job asks for it.
    """

    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    temperature: float = 0.0
    is_followed: bool = False


@dataclass(frozen=True)
class EngineJob:
    """One engine to build and what to run in it.

    Attributes:
        windows: what to run teacher-forced.
        reference: logits to compare with, or a path to record this engine's own to.
        asked: sets of questions to answer before that.
        follow: tokens of this engine's own answers, together, that become windows behind the others: whole answers of
            the sets that are followed, the first ones; None where windows are complete.
    """

    options: EngineOptions
    windows: tuple["Window", ...]
    reference: ReferenceLogits | Path
    asked: tuple["Asked", ...] = ()
    follow: int | None = None


@dataclass(frozen=True)
class EngineResult:
    """What one job gave; where it recorded the reference, ``scores`` compare that with itself.

    Attributes:
        reference: None where there was no window.
        scores: of all windows one after the other; None where there was none.
        windows: the job's, and those that the answers became.
        answers: of each set, in the order of its questions.
    """

    reference: ReferenceLogits | None
    scores: TokenScores | None
    windows: tuple[Window, ...]
    answers: tuple[tuple[Completion, ...], ...]
    kv_tokens: int
    block_size: int
    seconds: float


@dataclass
class _Tap:
    """Receives logits in the worker: appends them to a file, or compares them with the file's."""

    reference: ReferenceLogits | Path
    loaded: torch.Tensor | None = None
    targets: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    given: int = 0
    start: int = 0
    position: int = 0
    scores: list[TokenScores] = field(default_factory=list)
    dtype: str = ""
    vocab_size: int = 0

    def begin(self, start: int, window: Window) -> None:
        """Expect a window whose first prediction is row ``start`` of the reference."""
        self.start, self.position = start, 0
        self.given = window.start - 1
        self.targets = torch.tensor(window.ids[window.start :])

    def take(self, logits: torch.Tensor) -> None:
        """The next rows of the window, [n, vocabulary].

        Rows that predict tokens that are given are dropped, and the last, which predicts nothing known.
        """
        given = min(self.given, len(logits))
        self.given -= given
        logits = logits[given:][: len(self.targets) - self.position]
        if not len(logits):
            return
        first, self.position = self.position, self.position + len(logits)
        if isinstance(self.reference, Path):
            self.dtype, self.vocab_size = str(logits.dtype).removeprefix("torch."), logits.shape[1]
            with open(self.reference, "ab") as file:
                file.write(logits.contiguous().cpu().view(torch.uint8).numpy().data)
            reference = logits
        else:
            rows = slice(self.start + first, self.start + self.position)
            reference = self.reference.read(rows.start, rows.stop) if self.loaded is None else self.loaded[rows]
            reference = reference.to(logits.device)
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
    make_room_for_stage_before(runner)
    runner.kvtuner_tap = None
    if not gives_logits():
        return
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


def _load_reference(worker: Any) -> None:
    """Keep the reference on the worker's GPU, if it takes no more than half of what is free there: passes that repeat
    would wait for the file longer than for the model."""
    tap = worker.model_runner.kvtuner_tap
    if tap is None:
        return
    device = next(worker.model_runner.get_model().parameters()).device
    if device.type == "cuda" and 2 * tap.reference.num_bytes <= torch.cuda.mem_get_info(device)[0]:
        tap.loaded = tap.reference.load(device)


def _begin(worker: Any, start: int, window: Window) -> None:
    if (tap := worker.model_runner.kvtuner_tap) is not None:
        tap.begin(start, window)


def _end(worker: Any) -> None:
    if (tap := worker.model_runner.kvtuner_tap) is not None:
        tap.end()


def _collect(worker: Any) -> tuple[list[TokenScores], str, int] | None:
    """What the tap has; None in the workers that have none."""
    if (tap := worker.model_runner.kvtuner_tap) is None:
        return None
    scores, tap.scores = tap.scores, []
    return scores, tap.dtype, tap.vocab_size


class MeasuringEngine:
    """An engine in this process, which should be one of its own; ``close`` ends the engine.

    Args:
        options: how to build it.
        reference: logits that passes are compared with, or a path to record this engine's own to.
    """

    def __init__(self, options: EngineOptions, reference: ReferenceLogits | Path) -> None:
        # In-process: the memory of an engine of one rank is this process's. Read when vLLM is imported.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        self._options, self._reference = options, reference
        source = model_source(options.words)
        plain = {}
        if options.setting == AUTO:
            plain = unquantized_keywords(load_config(options.model, source), options.dtype)
        own = {
            "model": options.model,
            "dtype": options.dtype,
            "kv_cache_dtype": options.setting.kv_cache_dtype,
            "additional_config": options.setting.additional_config(
                attend_cached_prefill=True,
                switchable=options.switchable,
                # What a server of the model's own length stores, however short the texts are.
                request_tokens=max_positions(options.model, source),
            ),
            # Rounding the logits to bf16 alone is a KL of 0.0002 and 1.6% of top-1 (SmolLM2): as much as an 8-bit
            # cache.
            "hf_overrides": {"head_dtype": "float32", **plain.pop("hf_overrides", {})},
            "max_model_len": options.max_model_len,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": max(options.chunk, options.max_num_seqs),
            **cache_memory(options.kv_memory_bytes),
            "enable_prefix_caching": options.prefix_caching,
            # Settings must differ in the cache alone, not in what the compiler fuses around it.
            "enforce_eager": True,
            **plain,
        }
        self._llm = LLM(**engine_keywords(options.words, own))
        self._llm.collective_rpc(_install, args=(reference,))
        if options.switchable:
            self._llm.collective_rpc(_load_reference)

    @property
    def kv_tokens(self) -> int:
        return self._llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens

    @property
    def block_size(self) -> int:
        return self._llm.llm_engine.vllm_config.cache_config.block_size

    def run_windows(self, windows: Sequence[Window], *, progress: bool) -> tuple[TokenScores, ReferenceLogits]:
        """Run the windows and compare their logits with the reference's, or record them; the reference either way."""
        from vllm import SamplingParams

        # The least for which both runners compute the logits of every prompt position.
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        start = 0
        shown = track(windows, self._options.label, "window", total=len(windows)) if progress else windows
        for window in shown:
            self._llm.collective_rpc(_begin, args=(start, window))
            self.before_window(len(window.ids))
            self._llm.generate([{"prompt_token_ids": list(window.ids)}], params, use_tqdm=False)
            self._llm.collective_rpc(_end)
            self.after_window()
            start += window.positions
        ((scores, dtype, vocab_size),) = filter(None, self._llm.collective_rpc(_collect))
        reference = self._reference
        if isinstance(reference, Path):
            reference = ReferenceLogits(reference, dtype, vocab_size, start)
        return TokenScores.join(scores), reference

    def before_window(self, num_tokens: int) -> None:
        """For engines that do more: a window is about to run."""

    def after_window(self) -> None:
        """Likewise: a window has run."""

    def prefill(self, ids: Sequence[int]) -> None:
        """Run a prompt, whose logits nobody wants."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._llm.generate([{"prompt_token_ids": list(ids)}], params, use_tqdm=False)

    def in_workers(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """``function(worker, *arguments)`` in every worker."""
        return self._llm.collective_rpc(function, args=arguments)

    def answer(self, asked: Asked, *, progress: bool) -> tuple[Completion, ...]:
        """Answers to all questions, in their order."""
        from vllm import SamplingParams

        # Without a seed of its own, which the CPU build does not take for prompts in several steps, a request draws
        # from the engine's, which is the same for every setting.
        params = SamplingParams(max_tokens=asked.max_tokens, temperature=asked.temperature)
        prompts = [{"prompt_token_ids": list(prompt)} for prompt in asked.prompts]
        outputs = [output.outputs[0] for output in self._llm.generate(prompts, params, use_tqdm=progress)]
        return tuple(
            Completion(each.text, each.finish_reason == "stop", len(each.token_ids), tuple(each.token_ids))
            for each in outputs
        )

    def switch(self, resolved: ResolvedProfile) -> None:
        """Store what ``resolved`` says from now on (calibration mode), and forget what is stored.

        Raises:
            ValueError: the pages have no room for it (see vllm_kvtuner.attention.switchable.switch).
        """
        from vllm_kvtuner.attention.switchable import switch  # imports vLLM, as which see __init__

        self._llm.collective_rpc(switch, args=(resolved,))
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache must be empty after a switch, but blocks are still in use")

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


def cache_memory(num_bytes: int) -> dict[str, float]:
    """vLLM's keywords for a KV cache of this size, in an engine that may start beside others on one GPU.

    Even where the cache's size is given, vLLM refuses to start unless the share of the GPU named by
    ``gpu_memory_utilization`` is free; the share has no other use then, so it is as good as none.
    """
    return {"kv_cache_memory_bytes": num_bytes, "gpu_memory_utilization": 0.01}


def run_engine(job: EngineJob) -> EngineResult:
    """Build the engine in this process, run the job, and return what it gave. Meant for a process of its own."""
    started = time.monotonic()
    engine = MeasuringEngine(job.options, job.reference)
    try:
        answers = tuple(engine.answer(asked, progress=True) for asked in job.asked)
        windows = job.windows
        if job.follow is not None:
            windows += answer_windows(job.asked, answers, job.follow)
        scores, reference = engine.run_windows(windows, progress=True) if windows else (None, None)
        return EngineResult(
            reference=reference,
            scores=scores,
            windows=windows,
            answers=answers,
            kv_tokens=engine.kv_tokens,
            block_size=engine.block_size,
            seconds=time.monotonic() - started,
        )
    finally:
        engine.close()


def answer_windows(asked: Sequence[Asked], answers: Sequence[Sequence[Completion]], tokens: int) -> tuple[Window, ...]:
    """The first answers of each set that is followed, prompts before them.

    Sets get equal shares of the tokens; what one leaves, the later ones have. Each gives at least one answer, and whole
    answers alone.
    """
    followed = [index for index, each in enumerate(asked) if each.is_followed]
    windows: list[Window] = []
    left = tokens
    for place, index in enumerate(followed):
        room = left // (len(followed) - place)
        for number, (prompt, answer) in enumerate(zip(asked[index].prompts, answers[index], strict=True)):
            count = len(answer.token_ids)
            if number and count > room:
                break
            windows.append(Window((*prompt, *answer.token_ids), len(prompt)))
            room -= count
            left -= count
    return tuple(windows)


def max_model_len_for(context: int, model_limit: int) -> int:
    """max_model_len for windows of ``context`` tokens and one generated one, in whole blocks where the model allows.

    Raises:
        ValueError: the model cannot hold them.
    """
    if context + 1 > model_limit:
        raise ValueError(f"context must be below the model's {model_limit} positions, but got {context}")
    return min(-(-(context + 1) // _LEN_MULTIPLE) * _LEN_MULTIPLE, model_limit)
