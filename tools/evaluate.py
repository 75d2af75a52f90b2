"""``kvtuner evaluate``: KL divergence from ``auto``, generation, needles, quotes and tasks of KV cache settings.

Text runs teacher-forced through vLLM itself, once per setting, each in an engine and a process of its own. The
reference's logits go to a temporary file; every other pass is compared with it position by position on the fly.
Questions are answered in the same engines, and the reference's answers are text too, which others run along.
"""

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvtuner_tools.arguments import parse_memory, refuse_old
from kvtuner_tools.cache_setting import AUTO, KVTUNER, CacheSetting, profile_sha256
from kvtuner_tools.data_files import PROMISE_JSON
from kvtuner_tools.engine_arguments import (
    NO_WORDS,
    add_engine_arguments,
    check_cache_dtypes,
    check_engine_words,
    model_source,
)
from kvtuner_tools.evaluation.needles import DEFAULT_DEPTHS, DEFAULT_TEXTS, LONGEST, MAX_TOKENS, NeedleRequest
from kvtuner_tools.evaluation.partial import Done
from kvtuner_tools.evaluation.passes import FOLLOWED, Passes
from kvtuner_tools.evaluation.question_sets import paired_settings
from kvtuner_tools.evaluation.quotes import DEFAULT_DISTANCE, DEFAULT_QUOTES, QuoteRequest
from kvtuner_tools.evaluation.request import DEFAULT_ANSWER_TOKENS, DEFAULT_TOKENS, EvaluationRequest
from kvtuner_tools.evaluation.tables import text
from kvtuner_tools.lm_eval_tasks import check_lm_eval
from kvtuner_tools.model_files import ModelSource, load_model_shape, max_positions
from kvtuner_tools.results import stdout_to_stderr, write_json
from kvtuner_tools.simulation.rows import add_simulation_arguments, row_label, simulation_request
from kvtuner_tools.task_accuracy import DEFAULT_MAX_TOKENS
from vllm_kvtuner.profile.auto import is_auto, resolve_auto
from vllm_kvtuner.profile.model_files import ModelFiles


def evaluate(request: EvaluationRequest, partial: Path | None = None) -> dict[str, Any]:
    """Run all engines one after the other and return what ``--out`` and ``--json`` write.

    KL is in nats per token, natural logarithm; ``perplexity`` is exp of the mean negative log-likelihood over the same
    positions; ``kv_tokens`` is what vLLM reports to fit in ``kv_memory_bytes``.

    Args:
        request: what to evaluate.
        partial: file that keeps what is done while the rest runs, and is deleted at the end. Found at the start, its
            settings are not run again if it is of the same request, files, versions and device.

    Raises:
        ValueError: too little data, a context or questions beyond the model, a profile that does not fit it, or lm-eval
            tasks without lm-eval.
    """
    if request.lm_eval:
        check_lm_eval()
    with tempfile.TemporaryDirectory(prefix="kvtuner-evaluate-") as folder:
        passes = Passes(request, Path(folder) / "logits")
        head = passes.head()
        done = Done(partial, head)
        reference = done.row(AUTO.label, None, passes.measure_auto)
        rows = [
            done.row(each.label, profile_sha256(each.setting), functools.partial(passes.measure, each, reference))
            for each in passes.planned()
        ]
        with passes.simulations as simulations:
            rows += [
                done.row(row_label(each), None, functools.partial(passes.simulate, simulations, reference, each))
                for each in simulations.methods
            ]
    done.delete()
    kept = {name: value for name, value in reference.items() if name != FOLLOWED}
    return {**head, "reference": kept, "settings": rows, "paired": paired_settings([kept, *rows])}


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
        metavar="FILE",
        help="held-out text: plain text, or rows of JSON with texts or conversations (default: a bundled set, of "
        "which calibration draws nothing)",
    )
    text.add_argument(
        "--tokens",
        type=int,
        help=f"tokens of it to run (default: {DEFAULT_TOKENS}; beside questions, needles or quotes "
        "none without --data)",
    )
    text.add_argument(
        "--sequence-length", type=int, default=1024, metavar="TOKENS", help="of a window (default: %(default)s)"
    )
    text.add_argument(
        "--chunk", type=int, metavar="TOKENS", help="of a prompt per engine step (default: --sequence-length)"
    )
    generation = parser.add_argument_group("generation")
    generation.add_argument(
        "--generate",
        action="store_true",
        help="answer bundled questions: KL along auto's answers to them and to a file of --tasks, lengths of each "
        "setting's own answers, how many end, and how many are right",
    )
    generation.add_argument(
        "--answer-tokens",
        type=int,
        default=DEFAULT_ANSWER_TOKENS,
        metavar="TOKENS",
        help="of auto's answers that KL is measured along, at most; whole answers alone (default: %(default)s)",
    )
    generation.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="of answers to bundled questions and those of a file; 0 takes the most likely token (default: 0)",
    )
    probes = parser.add_argument_group("needles and quotes")
    probes.add_argument(
        "--needles",
        type=lambda words: tuple(filter(None, words.split(","))),
        default=(),
        metavar="TOKENS,...",
        help="find one of several facts in texts of so many tokens; 'max' is what the model has positions for",
    )
    probes.add_argument(
        "--needle-depths",
        type=lambda words: tuple(float(word) for word in words.split(",")),
        default=DEFAULT_DEPTHS,
        metavar="SHARE,...",
        help="where the facts of each text stand, from 0 to 1; each is asked once "
        f"(default: {','.join(f'{depth:g}' for depth in DEFAULT_DEPTHS)})",
    )
    probes.add_argument(
        "--needle-texts", type=int, default=DEFAULT_TEXTS, metavar="TEXTS", help="of each length (default: %(default)s)"
    )
    probes.add_argument(
        "--quotes",
        type=int,
        nargs="?",
        const=DEFAULT_QUOTES,
        metavar="SENTENCES",
        help=f"repeat sentences from some hundred words back, word for word (default: {DEFAULT_QUOTES} of them)",
    )
    probes.add_argument(
        "--quote-distance",
        type=int,
        default=DEFAULT_DISTANCE,
        metavar="WORDS",
        help="between a sentence and its question (default: %(default)s)",
    )
    probes.add_argument("--seed", type=int, default=0, help="of texts, facts and sentences (default: %(default)s)")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument(
        "--tasks",
        type=lambda words: tuple(filter(None, words.split(","))),
        default=(),
        metavar="TASK,...",
        help="names of lm-eval's tasks or their YAML files, and a file of JSON rows with question and answer, ending "
        "in '#### number'",
    )
    tasks.add_argument(
        "--limit", type=int, metavar="QUESTIONS", help="of each task and the bundled ones at most (default: all)"
    )
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
        help="of an answer to bundled questions and those of a file (default: %(default)s)",
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
    check_cache_dtypes([dtype for dtype in args.kv_cache_dtype if dtype != KVTUNER])  # which needs a --profile
    source = model_source(words)
    settings = request_settings(args.kv_cache_dtype, [_found(profile, args.model, source) for profile in args.profile])
    asks = bool(args.tasks or args.generate or args.needles or args.quotes is not None)
    if not (settings or args.noise_floor or args.simulate or asks):
        raise ValueError(
            "evaluate needs a --profile, a --kv-cache-dtype, --simulate, --noise-floor, --generate, --needles, "
            "--quotes or --tasks, but got none"
        )
    files = [task for task in args.tasks if _has_questions(task)]
    if len(files) > 1:
        raise ValueError(f"--tasks must have at most one file of questions, but got {', '.join(files)}")
    request = EvaluationRequest(
        model=args.model,
        settings=settings,
        data=args.data,
        tokens=_text_tokens(args, asks),
        context=args.sequence_length,
        chunk=args.chunk,
        kv_memory_bytes=args.kv_cache_memory_bytes,
        dtype=args.dtype,
        noise_floor=args.noise_floor,
        generate=args.generate,
        answer_tokens=args.answer_tokens,
        temperature=args.temperature,
        needles=_needles(args, source),
        quotes=None if args.quotes is None else QuoteRequest(args.quotes, args.quote_distance, args.seed),
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


def _text_tokens(args: argparse.Namespace, asks: bool) -> int:
    """Who asks for answers alone need not wait for text."""
    if args.tokens is not None:
        return int(args.tokens)
    return 0 if asks and args.data is None and not args.simulate else DEFAULT_TOKENS


def _needles(args: argparse.Namespace, source: ModelSource) -> NeedleRequest | None:
    """The needles of ``--needles``; None without."""
    if not args.needles:
        return None
    unknown = [word for word in args.needles if word != LONGEST and not word.isdecimal()]
    if unknown:
        raise ValueError(f"--needles must be numbers of tokens, or {LONGEST}, but got {', '.join(unknown)}")
    # One position less, since an engine generates one token more than a prompt and its answer have.
    longest = max_positions(args.model, source) - MAX_TOKENS - 1 if LONGEST in args.needles else 0
    lengths = tuple(longest if word == LONGEST else int(word) for word in args.needles)
    return NeedleRequest(tuple(dict.fromkeys(lengths)), args.needle_depths, args.needle_texts, args.seed)


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
