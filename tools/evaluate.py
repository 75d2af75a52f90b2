"""``kvtuner evaluate``: KL divergence from ``auto``, perplexity and task accuracy of KV cache settings, side by side.

Held-out text runs teacher-forced through vLLM itself, once per setting, each in an engine and a process of its own. The
reference's logits go to a temporary file; every other pass is compared with it position by position on the fly. Tasks
are answered in the same engines.
"""

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvtuner_tools.arguments import parse_memory, refuse_old
from kvtuner_tools.cache_setting import AUTO, KVTUNER, CacheSetting, cache_bits, profile_sha256
from kvtuner_tools.data_files import PROMISE_JSON, file_sha256
from kvtuner_tools.engine_arguments import (
    NO_WORDS,
    EngineWords,
    add_engine_arguments,
    check_engine_words,
    check_max_model_len,
    model_source,
)
from kvtuner_tools.engines.evaluate import (
    TASK_MAX_NUM_SEQS,
    EngineJob,
    EngineOptions,
    EngineResult,
    ReferenceLogits,
    max_model_len_for,
    run_engine,
)
from kvtuner_tools.heldout import load_windows
from kvtuner_tools.lm_eval_tasks import LmEvalJob, check_lm_eval, run_lm_eval
from kvtuner_tools.model_files import ModelSource, load_config, load_model_shape, load_tokenizer
from kvtuner_tools.processes import in_own_process
from kvtuner_tools.results import format_table, provenance, stdout_to_stderr, write_json
from kvtuner_tools.simulation.cache import Method
from kvtuner_tools.simulation.rows import (
    STATED_TOKENS,
    SimulationRequest,
    Simulations,
    add_simulation_arguments,
    profile_bits_at,
    row_label,
    simulation_request,
)
from kvtuner_tools.task_accuracy import DEFAULT_MAX_TOKENS, Task, load_task, paired
from vllm_kvtuner.profile.auto import is_auto, resolve_auto
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.problems import ProfileError

SCHEMA = "kvtuner-evaluation/1"
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
SIMULATION_COLUMNS = {f"bits at {STATED_TOKENS:,}": f"stored_bits_{STATED_TOKENS}:.2f"}
"""Beside simulated caches: stored bits of a request of so many tokens, those that are kept exactly included."""
TASK_COLUMNS = {
    "accuracy": "task_accuracy:.3f",
    "± stderr ": "task_stderr:.3f",
    "to auto": "task_difference:+.3f",
    "± paired": "task_difference_stderr:.3f",
    "finished": "task_finished:,",
    "tokens": "task_tokens_mean:.0f",
}


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate.

    Attributes:
        model: folder or model id.
        settings: what to compare with ``auto``, in order.
        data: plain text, or rows of JSON with texts or conversations.
        tokens: text tokens to run, at least.
        context: tokens of a window at most.
        chunk: prompt tokens per engine step; below ``context``, later chunks attend to the earlier ones in the cache.
        kv_memory_bytes: KV cache memory of every engine, on each rank.
        dtype: bfloat16, float16 or float32, of the model and of the ``auto`` cache.
        noise_floor: also compare ``auto`` with itself, prefilled in two chunks so that it rounds differently.
        task: rows of JSON with question and answer, to be answered by every setting and ``auto``.
        task_limit: questions of it, and of each lm-eval task, at most.
        num_fewshot: worked examples before each question: first rows of ``task``, which are not asked (by default
            none), and what lm-eval takes as such (by default as its tasks say).
        task_tokens: tokens an answer may have.
        lm_eval: names of lm-eval tasks, or YAML files of such.
        words: vLLM's engine arguments.
        simulation: caches to simulate beside ``settings``.
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
    num_fewshot: int | None = None
    task_tokens: int = DEFAULT_MAX_TOKENS
    lm_eval: tuple[str, ...] = ()
    words: EngineWords = field(default_factory=dict)
    simulation: SimulationRequest = field(default_factory=SimulationRequest)


def evaluate(request: EvaluationRequest, partial: Path | None = None) -> dict[str, Any]:
    """Run all engines one after the other and return what ``--out`` and ``--json`` write.

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
        with passes.simulations as simulations:
            rows += [
                done.row(row_label(each), None, functools.partial(passes.simulate, simulations, each))
                for each in simulations.methods
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
        windows = load_windows(request.data, tokenizer, tokens=request.tokens, context=request.context)
        self._windows = tuple(map(tuple, windows))
        positions = hf_config.get_text_config().max_position_embeddings
        self._task = _load_task(request, tokenizer, positions)
        longest = max(request.context, 0 if self._task is None else self._task.max_model_len)
        check_max_model_len(request.words, longest + 1)
        self._max_model_len = max_model_len_for(longest, positions)
        self._chunk = request.chunk or request.context
        if request.simulation.methods and self._chunk < request.context:
            raise ValueError(f"--simulate runs a window in one step, but got --chunk {request.chunk}")
        if request.simulation.prompt_tokens and (request.settings or request.noise_floor):
            raise ValueError("--prompt-tokens is for simulated caches alone: leave out other settings")
        self.simulations = Simulations(request.simulation, shape, tokenizer, request.context, request.words)
        self._stated = {
            setting: profile_bits_at(load_profile(setting.profile).resolve(shape), STATED_TOKENS)
            for setting in request.settings
            if setting.profile is not None
        }

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
            "engine": {name: list(words) for name, words in request.words.items()},
            **({"simulation": self.simulations.description()} if self.simulations.methods else {}),
            "task": None if self._task is None else self._task.description(),
            "lm_eval": {
                "tasks": list(request.lm_eval),
                "limit": request.task_limit,
                "num_fewshot": request.num_fewshot,
            },
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
        answers = {} if each.task is None else paired(row, reference)
        return {**row, **answers, "kv_tokens_ratio": row["kv_tokens"] / reference["kv_tokens"]}

    def simulate(self, simulations: Simulations, method: Method) -> dict[str, Any]:
        """The row of a simulated cache."""
        return simulations.measure(method, self._options(method.label, AUTO), self._windows, self._reference)

    def _reference(self) -> ReferenceLogits:
        if isinstance(self._recorded, Path):
            self._record(None)
        assert isinstance(self._recorded, ReferenceLogits)
        return self._recorded

    def _record(self, task: Task | None) -> EngineResult:
        result = self._run(_Pass("auto (reference)", AUTO, self._chunk, task))
        self._recorded = result.reference
        return result

    def _run(self, each: _Pass) -> EngineResult:
        options = replace(
            self._options(each.label, each.setting),
            chunk=each.chunk,
            max_num_seqs=1 if each.task is None else TASK_MAX_NUM_SEQS,
        )
        return in_own_process(run_engine, EngineJob(options, self._windows, self._recorded, each.task))

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
            **result.scores.summary(),
            "kl_windows": result.scores.window_means([len(window) - 1 for window in self._windows]),
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
            num_fewshot=request.num_fewshot,
            model=request.model,
            dtype=request.dtype,
            setting=setting,
            kv_memory_bytes=request.kv_memory_bytes,
            words=request.words,
        )
        return {"lm_eval": in_own_process(run_lm_eval, job)}


def _load_task(request: EvaluationRequest, tokenizer: Any, positions: int) -> Task | None:
    if request.task is None:
        return None
    return load_task(
        request.task,
        tokenizer,
        limit=request.task_limit,
        shots=request.num_fewshot or 0,
        max_tokens=request.task_tokens,
        positions=positions,
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
    rows = [{**evaluation["reference"], "kv_tokens_ratio": 1.0}, *map(dict, evaluation["settings"])]
    if evaluation["task"] is not None:
        columns |= TASK_COLUMNS
    for task, metrics in evaluation["reference"].get("lm_eval", {}).items():
        for metric in metrics:
            columns |= {f"{task} {metric}": f"{task}/{metric}:.3f", f"± {task} {metric}": f"{task}/{metric}/stderr:.3f"}
    if "simulation" in evaluation:
        columns |= SIMULATION_COLUMNS
    for row in rows:
        row |= {f"stored_bits_{tokens}": bits for tokens, bits in row.get("stored_bits_at", {}).items()}
        for task, metrics in row.get("lm_eval", {}).items():
            for metric, (value, stderr) in metrics.items():
                row |= {f"{task}/{metric}": value, f"{task}/{metric}/stderr": stderr}
    return format_table(columns, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner evaluate``."""
    parser.add_argument("model", metavar="MODEL", help="folder or id")
    caches = parser.add_argument_group("what to compare with auto")
    caches.add_argument(
        "--profile",
        action="append",
        default=[],
        help="precision profile to evaluate (path, shipped name, pair or auto); repeat",
    )
    caches.add_argument(
        "--kv-cache-dtype",
        action="append",
        default=[],
        metavar="DTYPE",
        help="cache dtype of vLLM to evaluate, such as fp8; repeat",
    )
    caches.add_argument("--noise-floor", action="store_true", help="also compare auto with a second run of itself")
    add_simulation_arguments(parser)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="held-out text: plain text, or rows of JSON with texts or conversations",
    )
    text.add_argument("--tokens", type=int, default=4096, help="tokens of it to run (default: %(default)s)")
    text.add_argument(
        "--sequence-length", type=int, default=1024, metavar="TOKENS", help="of a window (default: %(default)s)"
    )
    text.add_argument(
        "--chunk", type=int, metavar="TOKENS", help="of a prompt per engine step (default: --sequence-length)"
    )
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        type=lambda words: tuple(filter(None, words.split(","))),
        default=(),
        metavar="TASK,...",
        help="names of lm-eval's tasks or their YAML files, and a file of JSON rows with question and answer, ending "
        "in '#### number'",
    )
    tasks.add_argument("--limit", type=int, metavar="QUESTIONS", help="of each task at most (default: all)")
    tasks.add_argument(
        "--num-fewshot",
        type=int,
        metavar="EXAMPLES",
        help="worked examples before each question (default: as lm-eval's task says; none of a file of questions, "
        "whose first rows they are)",
    )
    tasks.add_argument(
        "--max-tokens",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        help="of an answer to a file of questions (default: %(default)s)",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the model and of the auto cache (default: %(default)s)",
    )
    engine.add_argument(
        "--kv-cache-memory-bytes",
        type=parse_memory,
        default="1GiB",
        metavar="MEMORY",
        help="KV cache memory of every engine, on each rank (default: %(default)s)",
    )
    add_engine_arguments(parser)
    result = parser.add_argument_group("result")
    result.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON file to write; a killed run goes on from FILE.partial when run again",
    )
    result.add_argument("--json", action="store_true", help="print the same JSON instead of a table")
    refuse_old(
        parser,
        {
            "--context": "--sequence-length",
            "--kv-memory": "--kv-cache-memory-bytes, which takes a unit: 1GiB",
            "--task": "--tasks",
            "--lm-eval": "--tasks",
            "--task-limit": "--limit",
            "--task-shots": "--num-fewshot",
            "--task-tokens": "--max-tokens",
        },
    )


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner evaluate``; 0 when every setting was evaluated."""
    words = getattr(args, "engine", NO_WORDS)
    check_engine_words(words)
    source = model_source(words)
    settings = request_settings(args.kv_cache_dtype, [_found(profile, args.model, source) for profile in args.profile])
    if not (settings or args.noise_floor or args.tasks or args.simulate):
        wanted = "a --profile, a --kv-cache-dtype, --simulate, --noise-floor or --tasks"
        raise ValueError(f"evaluate needs {wanted}, but got none")
    files = [task for task in args.tasks if _has_questions(task)]
    if len(files) > 1:
        raise ValueError(f"--tasks must have at most one file of questions, but got {', '.join(files)}")
    request = EvaluationRequest(
        model=args.model,
        settings=settings,
        data=args.data,
        tokens=args.tokens,
        context=args.sequence_length,
        chunk=args.chunk,
        kv_memory_bytes=args.kv_cache_memory_bytes,
        dtype=args.dtype,
        noise_floor=args.noise_floor,
        task=Path(files[0]) if files else None,
        task_limit=args.limit,
        num_fewshot=args.num_fewshot,
        task_tokens=args.max_tokens,
        lm_eval=tuple(task for task in args.tasks if task not in files),
        words=words,
        simulation=simulation_request(args),
    )
    with stdout_to_stderr(args.json):
        evaluation = evaluate(request, args.out and args.out.with_name(f"{args.out.name}.partial"))
    if args.out:
        write_json(args.out, evaluation)
    print(json.dumps(evaluation, indent=2) if args.json else text(evaluation))
    return 0


def text(evaluation: dict[str, Any]) -> str:
    """What ``kvtuner evaluate`` prints."""
    lines = [
        f"{evaluation['model']} ({evaluation['dtype']}), {evaluation['predicted_tokens']} tokens of "
        f"{evaluation['data']['file']}, KL against auto in nats per token"
    ]
    if task := evaluation["task"]:
        lines.append(f"Accuracy on {task['questions']} questions of {task['file']}, {task['shots']} worked examples")
    return "\n".join([*lines, table(evaluation)])


def _has_questions(task: str) -> bool:
    """Whether a task is a file of questions and answers; the others are lm-eval's, by name or as YAML."""
    suffix = Path(task).suffix.lower()
    return suffix in PROMISE_JSON or (suffix not in (".yaml", ".yml") and Path(task).is_file())


def _found(spec: str, model: str, source: ModelSource) -> str:
    """The profile that a spec means for the model, with a line on what auto is."""
    if not is_auto(spec):
        return spec
    files = ModelFiles(model, source.revision, source.download_dir)
    found = resolve_auto(spec, files, load_model_shape(model, source)).chosen
    print(f"{spec} -> {found.spec} ({found.source})", file=sys.stderr)
    return found.spec


def request_settings(dtypes: Sequence[str], profiles: Sequence[str]) -> tuple[CacheSetting, ...]:
    """Settings of the two repeated options, vLLM's dtypes first."""
    return (*map(CacheSetting, dtypes), *(CacheSetting(KVTUNER, profile) for profile in profiles))
