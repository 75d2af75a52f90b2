"""The engines of one evaluation, one after the other, and the row of each."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_tools.cache_setting import AUTO, CacheSetting, cache_bits, profile_sha256
from kvtuner_tools.engine_arguments import check_max_model_len, model_source
from kvtuner_tools.engines.evaluate import (
    TASK_MAX_NUM_SEQS,
    EngineJob,
    EngineOptions,
    EngineResult,
    ReferenceLogits,
    Window,
    max_model_len_for,
    run_engine,
)
from kvtuner_tools.evaluation.question_sets import answered, asked, followed, paired_rows, question_sets
from kvtuner_tools.evaluation.request import SCHEMA, EvaluationRequest
from kvtuner_tools.heldout import identity, load_windows
from kvtuner_tools.lm_eval_tasks import LmEvalJob, run_lm_eval
from kvtuner_tools.model_files import load_config, load_model_shape, load_tokenizer
from kvtuner_tools.processes import in_own_process
from kvtuner_tools.results import provenance
from kvtuner_tools.simulation.cache import Method
from kvtuner_tools.simulation.rows import STATED_TOKENS, Simulations, profile_bits_at
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.problems import ProfileError

NOISE_FLOOR = "auto (noise floor)"
FOLLOWED = "followed"
"""Of the reference's row while the evaluation runs: its answers that the others are measured along."""


@dataclass(frozen=True)
class Pass:
    """One engine to run.

    Args:
        label: of its row.
        setting: what it stores the cache as.
        chunk: prompt tokens per engine step.
        answers: whether it answers the questions.
    """

    label: str
    setting: CacheSetting
    chunk: int
    answers: bool = True


class Passes:
    """The engines of one evaluation.

    Args:
        request: what to evaluate.
        logits: file for those of the reference, which the first pass of ``auto`` records.

    Raises:
        ValueError: as ``kvtuner_tools.evaluate.evaluate``.
    """

    def __init__(self, request: EvaluationRequest, logits: Path) -> None:
        self._request = request
        self._recorded: ReferenceLogits | Path = logits
        source = model_source(request.words)
        shape = load_model_shape(request.model, source)
        if shape.unsupported:
            raise ProfileError(shape.refusals)
        hf_config = load_config(request.model, source)
        width = 32 if request.dtype == "float32" else 16
        settings = (AUTO, *request.settings)
        self._bits = {setting: cache_bits(setting, shape, request.model, width) for setting in settings}
        tokenizer = load_tokenizer(request.model, source)
        windows = []
        if request.tokens:
            windows = load_windows(request.data, tokenizer, tokens=request.tokens, context=request.context)
        start = 1 + request.simulation.prompt_tokens
        self._text = tuple(Window(tuple(window), start) for window in windows)
        positions = hf_config.get_text_config().max_position_embeddings
        self._sets = question_sets(request, tokenizer, positions)
        self._followed: tuple[Window, ...] | None = None
        self._check_disk(logits.parent, hf_config.get_text_config().vocab_size)
        longest = max(request.context if windows else 0, *(each.max_model_len for each in self._sets), 1)
        check_max_model_len(request.words, longest + 1)
        self._max_model_len = max_model_len_for(longest, positions)
        self._chunk = request.chunk or request.context
        if request.simulation.methods:
            _check_simulation(request, self._chunk)
        self.simulations = Simulations(request.simulation, shape, tokenizer, request.context, request.words)
        self._stated = {
            setting: profile_bits_at(load_profile(setting.profile).resolve(shape), STATED_TOKENS)
            for setting in request.settings
            if setting.profile is not None
        }

    def _check_disk(self, folder: Path, vocab_size: int) -> None:
        """The reference's logits, fp32 of every predicted token, must fit in the folder.

        Raises:
            ValueError: they do not.
        """
        answers = sum(len(each.prompts) * each.max_tokens for each in self._sets if each.is_followed)
        tokens = sum(window.positions for window in self._text) + min(answers, self._request.answer_tokens)
        needed, free = 4 * vocab_size * tokens, shutil.disk_usage(folder).free
        if needed > free:
            rule = f"must be few enough for their logits, {needed:,} bytes, to fit in {folder} (TMPDIR)"
            raise ValueError(f"--tokens and --answer-tokens {rule}, which has {free:,}, but got {tokens:,} together")

    @property
    def _follows(self) -> bool:
        return any(each.is_followed for each in self._sets)

    @property
    def _is_forced(self) -> bool:
        """Whether anything runs teacher-forced."""
        return bool(self._text) or self._follows

    def head(self) -> dict[str, Any]:
        """What all rows rest on, as JSON."""
        request = self._request
        tasks = [each.task for each in self._sets if each.task is not None]
        return {
            "schema": SCHEMA,
            **provenance(),
            "model": request.model,
            "dtype": request.dtype,
            "data": identity(request.data) if request.tokens else None,
            "context": request.context,
            "chunk": self._chunk,
            "windows": len(self._text),
            "predicted_tokens": sum(window.positions for window in self._text),
            "kv_memory_bytes": request.kv_memory_bytes,
            "engine": {name: list(words) for name, words in request.words.items()},
            **({"simulation": self.simulations.description()} if self.simulations.methods else {}),
            "task": tasks[0].description() if tasks else None,
            "questions": {each.name: each.description() for each in self._sets},
            "sampling": {"temperature": request.temperature},
            "answer_tokens": request.answer_tokens if self._follows else None,
            "lm_eval": {
                "tasks": list(request.lm_eval),
                "limit": request.task_limit,
                "num_fewshot": request.num_fewshot,
            },
        }

    def planned(self) -> list[Pass]:
        """All but that of the reference, in order."""
        passes = [Pass(setting.label, setting, self._chunk) for setting in self._request.settings]
        if self._request.noise_floor:
            half = -(-min(self._chunk, self._request.context) // 2)
            passes.insert(0, Pass(NOISE_FLOOR, AUTO, half, answers=False))
        return passes

    def measure_auto(self) -> dict[str, Any]:
        """The reference's row; its logits and answers are what later passes are compared with."""
        result = self._record(answers=True)
        row = self._row(AUTO.label, AUTO, result)
        if result.reference is not None:
            row["logits_dtype"] = result.reference.dtype
        assert self._followed is not None
        return {**row, FOLLOWED: [[list(window.ids), window.start] for window in self._followed]}

    def measure(self, each: Pass, reference: Mapping[str, Any]) -> dict[str, Any]:
        """The row of a pass, beside the reference's."""
        self._recall(reference)
        if self._is_forced and isinstance(self._recorded, Path):  # whose logits are gone
            self._record(answers=False)
        row = self._row(each.label, each.setting, self._run(each))
        return {**row, **paired_rows(row, reference), "kv_tokens_ratio": row["kv_tokens"] / reference["kv_tokens"]}

    def simulate(self, simulations: Simulations, reference: Mapping[str, Any], method: Method) -> dict[str, Any]:
        """The row of a simulated cache: text, and along the reference's answers."""
        self._recall(reference)
        assert self._followed is not None
        options = replace(self._options(method.label, AUTO), chunk=self._max_model_len)  # a window in one step
        row, kl = simulations.measure(method, options, self._text, self._followed, self._reference)
        return row | (followed(self._sets, self._followed, kl) if len(kl) else {})

    def _recall(self, reference: Mapping[str, Any]) -> None:
        """The answers to run along, where auto's row was done before."""
        if self._followed is None:
            self._followed = tuple(Window(tuple(ids), start) for ids, start in reference[FOLLOWED])

    def _reference(self) -> ReferenceLogits:
        if isinstance(self._recorded, Path):
            self._record(answers=False)
        assert isinstance(self._recorded, ReferenceLogits)
        return self._recorded

    def _record(self, *, answers: bool) -> EngineResult:
        result = self._run(Pass("auto (reference)", AUTO, self._chunk, answers))
        if result.reference is not None:
            self._recorded = result.reference
        self._followed = result.windows[len(self._text) :]
        return result

    def _run(self, each: Pass) -> EngineResult:
        questions = asked(self._sets, self._request.temperature) if each.answers else ()
        options = replace(
            self._options(each.label, each.setting),
            chunk=each.chunk,
            max_num_seqs=TASK_MAX_NUM_SEQS if questions else 1,
        )
        follow = self._request.answer_tokens if self._followed is None and self._follows else None
        windows = self._text + (self._followed or ())
        return in_own_process(run_engine, EngineJob(options, windows, self._recorded, questions, follow))

    def _options(self, label: str, setting: CacheSetting) -> EngineOptions:
        return EngineOptions(
            label=label,
            model=self._request.model,
            dtype=self._request.dtype,
            setting=setting,
            max_model_len=self._max_model_len,
            chunk=self._chunk,
            kv_memory_bytes=self._request.kv_memory_bytes,
            words=self._request.words,
        )

    def _row(self, label: str, setting: CacheSetting, result: EngineResult) -> dict[str, Any]:
        nominal, stored = self._bits[setting] or (None, None)
        return {
            "label": label,
            "kv_cache_dtype": setting.kv_cache_dtype,
            "profile": setting.profile,
            "profile_sha256": profile_sha256(setting),
            "nominal_bits": nominal,
            "stored_bits": stored,
            **({"stored_bits_at": {str(STATED_TOKENS): self._stated[setting]}} if setting in self._stated else {}),
            **self._forced(result),
            "kv_tokens": result.kv_tokens,
            "block_size": result.block_size,
            **(answered(self._sets, result.answers) if result.answers else {}),
            **self._lm_eval(setting),
            "seconds": round(result.seconds, 1),
        }

    def _forced(self, result: EngineResult) -> dict[str, Any]:
        """Scores of the text, and along the unquantized model's answers."""
        if result.scores is None:
            return {}
        positions = sum(window.positions for window in self._text)
        found: dict[str, Any] = {}
        if self._text:
            text = result.scores.part(0, positions)
            found = {**text.summary(), "kl_windows": text.window_means([each.positions for each in self._text])}
        kl: np.ndarray = result.scores.kl[positions:]
        return found | (followed(self._sets, result.windows[len(self._text) :], kl) if len(kl) else {})

    def _lm_eval(self, setting: CacheSetting) -> dict[str, Any]:
        """Scores of the lm-eval tasks, run in another process; {} without any."""
        request = self._request
        if not request.lm_eval:
            return {}
        job = LmEvalJob(
            tasks=request.lm_eval,
            limit=request.task_limit,
            num_fewshot=request.num_fewshot,
            model=request.model,
            dtype=request.dtype,
            setting=setting,
            kv_memory_bytes=request.kv_memory_bytes,
            words=request.words,
        )
        return {"lm_eval": in_own_process(run_lm_eval, job)}


def _check_simulation(request: EvaluationRequest, chunk: int) -> None:
    problems = []
    if not request.tokens:
        problems.append("--simulate runs text: give --tokens or --data beside questions, needles and quotes")
    if chunk < request.context:
        problems.append(f"--simulate runs a window in one step, but got --chunk {request.chunk}")
    if request.simulation.prompt_tokens and (request.settings or request.noise_floor):
        problems.append("--prompt-tokens is for simulated caches alone: leave out other settings")
    if problems:
        raise ValueError("\n".join(problems))
