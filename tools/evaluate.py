"""``kvtuner evaluate``: KL divergence from ``auto``, perplexity and task accuracy of KV cache settings, side by side.

Held-out text runs teacher-forced through vLLM itself, once per setting, each in an engine and a process of its own. The
reference's logits go to a temporary file; every other pass is compared with it position by position on the fly. Tasks
are answered in the same engines.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtuner_tools.cache_setting import KVTUNER, CacheSetting, cache_bits, profile_sha256
from kvtuner_tools.engines.evaluate import (
    TASK_MAX_NUM_SEQS,
    EngineJob,
    EngineOptions,
    EngineResult,
    ReferenceLogits,
    max_model_len_for,
    run_engine,
)
from kvtuner_tools.heldout import file_sha256, load_windows
from kvtuner_tools.lm_eval_tasks import LmEvalJob, check_lm_eval, run_lm_eval
from kvtuner_tools.model_files import load_model_shape
from kvtuner_tools.processes import in_own_process
from kvtuner_tools.results import format_table, provenance, write_json
from kvtuner_tools.task_accuracy import DEFAULT_MAX_TOKENS, Task, load_task
from vllm_kvtuner.profile.auto import is_auto, resolve_auto

SCHEMA = "kvtuner-evaluation/1"
AUTO = CacheSetting("auto")
COLUMNS = {
    "setting": "label:",
    "nominal bits": "nominal_bits:.2f",
    "stored bits": "stored_bits:.2f",
    "KL mean": "kl_mean:.5f",
    "± stderr": "kl_stderr:.5f",
    "KL p99": "kl_p99:.4f",
    "top-1": "top1_agreement:.4f",
    "perplexity": "perplexity:.3f",
    "KV tokens": "kv_tokens:,",
    "x auto": "kv_tokens_ratio:.3f",
}
TASK_COLUMNS = {"accuracy": "task_accuracy:.3f", "± stderr ": "task_stderr:.3f", "finished": "task_finished:,"}


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        model: folder or model id.
        settings: what to compare with ``auto``, in order.
        data: plain text, or .jsonl with question and answer per line.
        tokens: text tokens to run, at least.
        context: tokens of a window at most.
        chunk: prompt tokens per engine step; below ``context``, later chunks attend to the earlier ones in the cache.
        kv_memory_bytes: KV cache memory of every engine.
        dtype: bfloat16, float16 or float32, of the model and of the ``auto`` cache.
        noise_floor: also compare ``auto`` with itself, prefilled in two chunks so that it rounds differently.
        task: .jsonl with question and answer per line, to be answered by every setting and ``auto``.
        task_limit: questions of it, and of each lm-eval task, at most.
        task_shots: its first lines, given as worked examples and not asked.
        task_tokens: tokens an answer may have.
        lm_eval: names of lm-eval tasks, or YAML files of such.
    """

    model: str
    settings: tuple[CacheSetting, ...]
    data: Path
    tokens: int = 4096
    context: int = 1024
    chunk: int | None = None
    kv_memory_bytes: int = 1 << 30
    dtype: str = "bfloat16"
    noise_floor: bool = False
    task: Path | None = None
    task_limit: int | None = None
    task_shots: int = 0
    task_tokens: int = DEFAULT_MAX_TOKENS
    lm_eval: tuple[str, ...] = ()


def evaluate(request: EvaluationRequest, partial: Path | None = None) -> dict[str, Any]:
    """Run all engines one after the other and return what ``--json`` writes.

    KL is in nats per token, natural logarithm; ``perplexity`` is exp of the mean negative log-likelihood over the same
    positions; ``kv_tokens`` is what vLLM reports to fit in ``kv_memory_bytes``.

    Args:
        request: what to evaluate.
        partial: file that keeps what is done while the rest runs, and is deleted at the end. Found at the start, its
            settings are not run again if it is of the same request, files, versions and device.

    Raises:
        ValueError: too little data, a context or a task beyond the model, a profile that does not fit it, or lm-eval
            tasks without lm-eval.
    """
    if request.lm_eval:
        check_lm_eval()
    with tempfile.TemporaryDirectory(prefix="kvtuner-evaluate-") as folder:
        passes = _Passes(request, Path(folder) / "logits")
        head = passes.head()
        done = _Done(partial, head)
        reference = done.row(AUTO.label, None, passes.measure_auto)
        rows = [
            done.row(each.label, profile_sha256(each.setting), functools.partial(passes.measure, each, reference))
            for each in passes.planned()
        ]
    done.delete()
    return {**head, "reference": reference, "settings": rows}


@dataclass(frozen=True)
class _Pass:
    """One engine to run.

    Args:
        label: of its row.
        setting: what it stores the cache as.
        chunk: prompt tokens per engine step.
        task: questions to answer, if any.
    """

    label: str
    setting: CacheSetting
    chunk: int
    task: Task | None


class _Passes:
    """The engines of one evaluation.

    Args:
        request: what to evaluate.
        logits: file for those of the reference, which the first pass of ``auto`` records.

    Raises:
        ValueError: as :func:`evaluate`.
    """

    def __init__(self, request: EvaluationRequest, logits: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self._request = request
        self._recorded: ReferenceLogits | Path = logits
        hf_config = AutoConfig.from_pretrained(request.model)
        width = 32 if request.dtype == "float32" else 16
        settings = (AUTO, *request.settings)
        self._bits = {setting: cache_bits(setting, hf_config, request.model, width) for setting in settings}
        tokenizer = AutoTokenizer.from_pretrained(request.model)
        windows = load_windows(request.data, tokenizer, tokens=request.tokens, context=request.context)
        self._windows = tuple(map(tuple, windows))
        self._task = _load_task(request, tokenizer)
        longest = max(request.context, 0 if self._task is None else self._task.max_model_len)
        self._max_model_len = max_model_len_for(longest, hf_config.get_text_config().max_position_embeddings)
        self._chunk = request.chunk or request.context

    def head(self) -> dict[str, Any]:
        """What all rows rest on, as JSON."""
        request = self._request
        return {
            "schema": SCHEMA,
            **provenance(),
            "model": request.model,
            "dtype": request.dtype,
            "data": {"file": request.data.name, "sha256": file_sha256(request.data)},
            "context": request.context,
            "chunk": self._chunk,
            "windows": len(self._windows),
            "predicted_tokens": sum(len(window) - 1 for window in self._windows),
            "kv_memory_bytes": request.kv_memory_bytes,
            "task": None if self._task is None else self._task.description(),
            "lm_eval": {"tasks": list(request.lm_eval), "limit": request.task_limit},
        }

    def planned(self) -> list[_Pass]:
        """All but that of the reference, in order."""
        passes = [_Pass(setting.label, setting, self._chunk, self._task) for setting in self._request.settings]
        if self._request.noise_floor:
            half = -(-min(self._chunk, self._request.context) // 2)
            passes.insert(0, _Pass("auto (noise floor)", AUTO, half, None))
        return passes

    def measure_auto(self) -> dict[str, Any]:
        """The reference's row; its logits are what later passes are compared with."""
        result = self._record(self._task)
        return {**self._row(AUTO.label, AUTO, result), "logits_dtype": result.reference.dtype}

    def measure(self, each: _Pass, reference: Mapping[str, Any]) -> dict[str, Any]:
        """The row of a pass, beside the reference's."""
        if isinstance(self._recorded, Path):  # auto's row was done before, its logits are gone
            self._record(None)
        row = self._row(each.label, each.setting, self._run(each))
        return {**row, "kv_tokens_ratio": row["kv_tokens"] / reference["kv_tokens"]}

    def _record(self, task: Task | None) -> EngineResult:
        result = self._run(_Pass("auto (reference)", AUTO, self._chunk, task))
        self._recorded = result.reference
        return result

    def _run(self, each: _Pass) -> EngineResult:
        options = EngineOptions(
            label=each.label,
            model=self._request.model,
            dtype=self._request.dtype,
            setting=each.setting,
            max_model_len=self._max_model_len,
            chunk=each.chunk,
            kv_memory_bytes=self._request.kv_memory_bytes,
            max_num_seqs=1 if each.task is None else TASK_MAX_NUM_SEQS,
        )
        return in_own_process(run_engine, EngineJob(options, self._windows, self._recorded, each.task))

    def _row(self, label: str, setting: CacheSetting, result: EngineResult) -> dict[str, Any]:
        nominal, stored = self._bits[setting] or (None, None)
        return {
            "label": label,
            "kv_cache_dtype": setting.kv_cache_dtype,
            "profile": setting.profile,
            "profile_sha256": profile_sha256(setting),
            "nominal_bits": nominal,
            "stored_bits": stored,
            **result.scores.summary(),
            "kv_tokens": result.kv_tokens,
            "block_size": result.block_size,
            **({} if result.task is None else result.task.summary()),
            **self._lm_eval(setting),
            "seconds": round(result.seconds, 1),
        }

    def _lm_eval(self, setting: CacheSetting) -> dict[str, Any]:
        """Scores of the lm-eval tasks, run in another process; {} without any."""
        request = self._request
        if not request.lm_eval:
            return {}
        job = LmEvalJob(
            tasks=request.lm_eval,
            limit=request.task_limit,
            model=request.model,
            dtype=request.dtype,
            setting=setting,
            kv_memory_bytes=request.kv_memory_bytes,
        )
        return {"lm_eval": in_own_process(run_lm_eval, job)}


def _load_task(request: EvaluationRequest, tokenizer: Any) -> Task | None:
    if request.task is None:
        return None
    return load_task(
        request.task,
        tokenizer,
        limit=request.task_limit,
        shots=request.task_shots,
        max_tokens=request.task_tokens,
    )


class _Done:
    """The rows that are done, in a file if there is one, so that a killed run can go on.

    Args:
        path: the file, or None.
        head: what the rows rest on; rows of a file with another head do not count.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path = path
        self._head = {key: value for key, value in head.items() if key != "created"}
        self._rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["head"] == self._head:
                self._rows = found["rows"]

    def row(self, label: str, sha256: str | None, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of a setting, from the file or measured now."""
        for row in self._rows:
            if row["label"] == label and row["profile_sha256"] == sha256:
                return row
        self._rows.append(measure())
        if self._path is not None:
            write_json(self._path, {"head": self._head, "rows": self._rows})
        return self._rows[-1]

    def delete(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def table(evaluation: dict[str, Any]) -> str:
    """``auto`` and the evaluation's settings as a Markdown table."""
    columns = dict(COLUMNS)
    rows = [{**evaluation["reference"], "kv_tokens_ratio": 1.0}, *evaluation["settings"]]
    if evaluation["task"] is not None:
        columns |= TASK_COLUMNS
    for task, metrics in evaluation["reference"].get("lm_eval", {}).items():
        for metric in metrics:
            columns |= {f"{task} {metric}": f"{task}/{metric}:.3f", f"± {task} {metric}": f"{task}/{metric}/stderr:.3f"}
    for row in rows:
        for task, metrics in row.get("lm_eval", {}).items():
            for metric, (value, stderr) in metrics.items():
                row |= {f"{task}/{metric}": value, f"{task}/{metric}/stderr": stderr}
    return format_table(columns, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner evaluate``."""
    parser.add_argument("model", help="model folder or id")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        help="precision profile to evaluate (path, shipped name, pair or auto); repeat",
    )
    parser.add_argument(
        "--kv-cache-dtype", action="append", default=[], help="cache dtype of vLLM to evaluate, such as fp8; repeat"
    )
    parser.add_argument("--data", type=Path, required=True, help="held-out text, or .jsonl with question and answer")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of it to run (default %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window (default %(default)s)")
    parser.add_argument("--chunk", type=int, help="prompt tokens per engine step (default: --context)")
    parser.add_argument("--kv-memory", type=float, default=1.0, help="GiB of KV cache per engine (default %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--noise-floor", action="store_true", help="also compare auto with a second run of itself")
    parser.add_argument("--task", type=Path, help=".jsonl with question and answer, ending in '#### number': accuracy")
    parser.add_argument("--task-limit", type=int, help="questions of it, and of each lm-eval task, at most")
    parser.add_argument(
        "--task-shots", type=int, default=0, help="its first lines are worked examples (default %(default)s)"
    )
    parser.add_argument(
        "--task-tokens", type=int, default=DEFAULT_MAX_TOKENS, help="tokens an answer may have (default %(default)s)"
    )
    parser.add_argument(
        "--lm-eval", action="append", default=[], metavar="TASK", help="lm-eval task, or its YAML file; repeat"
    )
    parser.add_argument(
        "--json", type=Path, help="write the result here; a killed run goes on from FILE.partial when run again"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner evaluate``; 0 when every setting was evaluated."""
    settings = request_settings(args.kv_cache_dtype, [_found(profile, args.model) for profile in args.profile])
    if not (settings or args.noise_floor or args.task or args.lm_eval):
        raise ValueError(
            "evaluate needs a --profile, a --kv-cache-dtype, --noise-floor, a --task or --lm-eval, but got none"
        )
    evaluation = evaluate(
        EvaluationRequest(
            model=args.model,
            settings=settings,
            data=args.data,
            tokens=args.tokens,
            context=args.context,
            chunk=args.chunk,
            kv_memory_bytes=int(args.kv_memory * (1 << 30)),
            dtype=args.dtype,
            noise_floor=args.noise_floor,
            task=args.task,
            task_limit=args.task_limit,
            task_shots=args.task_shots,
            task_tokens=args.task_tokens,
            lm_eval=tuple(args.lm_eval),
        ),
        args.json and args.json.with_name(f"{args.json.name}.partial"),
    )
    if args.json:
        write_json(args.json, evaluation)
    print(
        f"{evaluation['model']} ({evaluation['dtype']}), {evaluation['predicted_tokens']} tokens of "
        f"{evaluation['data']['file']}, KL against auto in nats per token"
    )
    if task := evaluation["task"]:
        print(f"Accuracy on {task['questions']} questions of {task['file']}, {task['shots']} worked examples")
    print(table(evaluation))
    return 0


def _found(spec: str, model: str) -> str:
    """The profile that a spec means for the model, with a line on what auto is."""
    if not is_auto(spec):
        return spec
    found = resolve_auto(spec, model, load_model_shape(model)).chosen
    print(f"{spec} -> {found.spec} ({found.source})")
    return found.spec


def request_settings(dtypes: Sequence[str], profiles: Sequence[str]) -> tuple[CacheSetting, ...]:
    """Settings of the two repeated options, vLLM's dtypes first."""
    return (*map(CacheSetting, dtypes), *(CacheSetting(KVTUNER, profile) for profile in profiles))
