"""Decode speed, prefill speed, KV capacity and throughput of vLLM engines on a model's shapes with dummy weights.

Each point BATCHxCONTEXT prefills BATCH random prompts of CONTEXT tokens (prefill_s), then serves them again from the
prefix cache and gives milliseconds per step over --output-tokens steps in which all of them decode.
--throughput keeps as many requests in flight as fit in the KV cache. With --speculate, a step verifies drafted tokens
of every request, and tokens per second count the accepted ones. Every setting runs in an engine and a process of its
own; a run that was cut short goes on, with the same options and --out, at the setting it was cut short in.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtuner_tools.arguments import parse_memory, refuse_old
from kvtuner_tools.bench.closed_loop import decode_room, throughput_room
from kvtuner_tools.bench.pictures import check_picture, draw
from kvtuner_tools.bench.points import LongPrefill, Point, ThroughputPoint
from kvtuner_tools.bench.presets import Preset, presets
from kvtuner_tools.bench.serve_result import SCHEMA, assemble, new_entry, table
from kvtuner_tools.bench.speculation import MAX_DRAFTED, Speculation, speculated
from kvtuner_tools.cache_setting import CacheSetting, cache_bits, profile_sha256
from kvtuner_tools.engines.flashinfer import FLASHINFER, decode_environment
from kvtuner_tools.engines.serve import ServeJob, measure
from kvtuner_tools.processes import in_own_process
from kvtuner_tools.results import provenance, stdout_to_stderr, write_json

POINT_SEQS, THROUGHPUT_SEQS = 256, 1024
"""Requests that run at once by default, without and with --throughput."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner bench serve``."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("model", metavar="MODEL", nargs="?", type=Path, help="folder with config.json")
    model.add_argument(
        "--shape",
        help=f"instead of MODEL: {', '.join(presets())} (mixtures of experts: bench kernel only), or a rank's share of "
        "one under tensor parallelism such as llama33_70b:tp8",
    )
    measured = parser.add_argument_group("what to measure")
    measured.add_argument(
        "--setting",
        action="append",
        required=True,
        type=CacheSetting.parse,
        help="auto, fp8, or kvtuner:PROFILE; fp8@FLASHINFER names vLLM's attention backend; repeat",
    )
    measured.add_argument(
        "--points", default="64x1024,64x8192,8x32000", help="BATCHxCONTEXT,..., or none (default: %(default)s)"
    )
    measured.add_argument(
        "--output-tokens", type=int, default=64, metavar="STEPS", help="decode steps of a point (default: %(default)s)"
    )
    measured.add_argument(
        "--throughput",
        action="append",
        default=[],
        type=ThroughputPoint.parse,
        metavar="PROMPTxOUTPUT",
        help="closed-loop throughput with as many such requests as fit the KV cache, such as 4096x512; repeat",
    )
    measured.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="of each steady state of a throughput point (default: %(default)s)",
    )
    measured.add_argument(
        "--long-prefill",
        type=LongPrefill.parse,
        metavar="PROMPT:CHUNK",
        help="seconds to prefill one prompt in chunks, such as 32768:8192; no step takes more than CHUNK tokens",
    )
    measured.add_argument(
        "--speculate",
        type=Speculation.parse,
        metavar="DRAFTED:ACCEPTANCE",
        help=f"draft 1 to {MAX_DRAFTED} tokens in each step and accept each, if all before it are, with this "
        "probability, such as 3:0.7; by vLLM's synthetic acceptance, on a GPU alone",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.85,
        metavar="SHARE",
        help="of the card that every engine may take (default: %(default)s)",
    )
    engine.add_argument(
        "--kv-cache-memory-bytes",
        type=parse_memory,
        metavar="MEMORY",
        help="of the KV cache, such as 20GiB (default: what --gpu-memory-utilization leaves)",
    )
    engine.add_argument(
        "--max-model-len", type=int, default=33000, metavar="TOKENS", help="of a request (default: %(default)s)"
    )
    engine.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="REQUESTS",
        help=f"that run at once (default: {POINT_SEQS}, or {THROUGHPUT_SEQS} with --throughput)",
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON file to write; settings that it already holds are kept"
    )
    result.add_argument("--json", action="store_true", help="print the same JSON instead of tables")
    result.add_argument("--picture", type=Path, metavar="FILE", help="draw it, .png or .svg (needs matplotlib)")
    refuse_old(
        parser,
        {
            "--model": "the first argument, MODEL, without an option",
            "--memory": "--gpu-memory-utilization",
            "--kv-memory": "--kv-cache-memory-bytes, which takes a unit: 20GiB",
            "--window": "--seconds",
        },
    )


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner bench serve``; 1 when an engine failed, whose points so far are kept."""
    with stdout_to_stderr(args.json):
        result = _measured(args)
    return _report(result, args.json)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    """The result on the given model or shape."""
    if args.model:
        return _run(args, args.model)
    preset = Preset.parse(args.shape)
    if preset.serve_refusal:
        raise ValueError(preset.serve_refusal)
    with preset.folder() as model:
        return _run(args, model)


def _run(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    points = () if args.points == "none" else tuple(Point.parse(text) for text in args.points.split(","))
    max_num_seqs = args.max_num_seqs or (THROUGHPUT_SEQS if args.throughput else POINT_SEQS)
    _check_lengths(args, points, max_num_seqs)
    _check_device(args)
    if args.picture:
        check_picture(args.picture)
    hf_config = AutoConfig.from_pretrained(model)
    bits = {setting: cache_bits(setting, hf_config, model.name, 16) for setting in args.setting}
    head = {
        **provenance(),
        "model": args.shape or str(model),
        "points": [str(point) for point in points],
        "output_tokens": args.output_tokens,
        "speculate": args.speculate and str(args.speculate),
        "throughput": [str(point) for point in args.throughput],
        "window_s": args.seconds,
        "long_prefill": args.long_prefill and str(args.long_prefill),
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "kv_memory_bytes": args.kv_cache_memory_bytes,
        "max_model_len": args.max_model_len,
        "max_num_seqs": max_num_seqs,
    }
    head, done = _resume(args.out, head)
    result = assemble(head, list(done.values()))
    pending = _pending(args, done)
    environments = _environments(pending)
    with tempfile.TemporaryDirectory(prefix="kvtuner-bench-") as folder:
        for number, setting in enumerate(pending):
            job = ServeJob(
                model=model,
                vocab_size=hf_config.get_text_config().vocab_size,
                setting=setting,
                points=points,
                output_tokens=args.output_tokens,
                throughput=tuple(args.throughput),
                window_s=args.seconds,
                long_prefill=args.long_prefill,
                memory=args.gpu_memory_utilization,
                kv_memory_bytes=args.kv_cache_memory_bytes,
                max_model_len=args.max_model_len,
                max_num_seqs=max_num_seqs,
                lines=Path(folder) / f"{number}.jsonl",
                speculation=args.speculate,
                environment=environments[setting],
            )
            done[setting.label] = _measure_setting(job, bits[setting])
            # Rewritten after every engine, so that a run cut short keeps what it measured.
            result = assemble(head, list(done.values()))
            if args.out:
                write_json(args.out, result)
    if args.picture:
        draw(result, args.picture)
    return result


def _pending(args: argparse.Namespace, done: Mapping[str, Mapping[str, Any]]) -> list[CacheSetting]:
    """Settings that are still to be measured; ``done`` are the entries that --out holds, by label."""
    pending = []
    for setting in args.setting:
        kept = done.get(setting.label)
        if kept and kept["error"] is None and kept["profile_sha256"] == profile_sha256(setting):
            print(f"{setting.label}: kept from {args.out}")
        else:
            pending.append(setting)
    return pending


def _environments(settings: Sequence[CacheSetting]) -> dict[CacheSetting, dict[str, str]]:
    """Variables that each setting's engine needs. What an engine would refuse is refused before the first starts."""
    environments: dict[CacheSetting, dict[str, str]] = {}
    for setting in settings:
        asks = setting.attention_backend == FLASHINFER
        environments[setting] = in_own_process(decode_environment, setting) if asks else {}
        for name, value in environments[setting].items():
            print(f"{setting.label}: its engine runs with {name}={value}")
    return environments


def _measure_setting(job: ServeJob, bits: tuple[float, float] | None) -> dict[str, Any]:
    """The entry of one setting, measured in an engine and a process of its own."""
    error = None
    try:
        in_own_process(measure, job)
    except Exception as failure:  # an engine can fail in any way; the next one must still be measured
        error = f"{type(failure).__name__}: {failure}"
    records = [json.loads(line) for line in job.lines.read_text().splitlines()] if job.lines.exists() else []
    return new_entry(job.setting, bits, job.environment, records, error)


def _report(result: Mapping[str, Any], as_json: bool) -> int:
    """Print the tables or JSON, and what failed on stderr; the exit status."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['model']} on {result['device']}, dummy weights{speculated(result)}")
        print(table(result))
    failed = [entry for entry in result["settings"] if entry["error"]]
    for entry in failed:
        print(f"{entry['label']}: {entry['error']}", file=sys.stderr)
    return 1 if failed else 0


def _check_lengths(args: argparse.Namespace, points: Sequence[Point], max_num_seqs: int) -> None:
    if args.long_prefill and args.long_prefill.chunk < max_num_seqs:
        rule = f"--long-prefill's CHUNK must be at least --max-num-seqs, {max_num_seqs}, as vLLM demands of a step"
        raise ValueError(f"{rule}, but got {args.long_prefill.chunk}")
    # Drafts stand behind a request's last token, and one that does not fit would be left out of its step.
    drafted = args.speculate.drafted if args.speculate else 0
    most = 1 + drafted
    longest = [point.context + decode_room(args.output_tokens, most) + drafted for point in points]
    longest += [point.prompt + throughput_room(point, most) + drafted for point in args.throughput]
    longest += [args.long_prefill.prompt + 1] if args.long_prefill else []
    if not longest:
        raise ValueError("bench serve needs --points, --throughput or --long-prefill, but got none")
    if max(longest) > args.max_model_len:
        rule = f"--max-model-len must be at least {max(longest)} for these points"
        raise ValueError(f"{rule}, but got {args.max_model_len}")


def _check_device(args: argparse.Namespace) -> None:
    """What vLLM on a CPU lacks, or leaves aside without a word."""
    import torch

    if torch.cuda.is_available():
        return
    if args.speculate:
        raise ValueError("--speculate needs a GPU: vLLM's sampler on a CPU has no synthetic acceptance")
    if named := [setting.label for setting in args.setting if setting.attention_backend is not None]:
        rule = "a setting with an attention backend needs a GPU, since vLLM on a CPU has one alone"
        raise ValueError(f"{rule}, but got {', '.join(named)}")


def _resume(out: Path | None, head: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The head of the result, and the entries that ``out`` already holds by label.

    Raises:
        ValueError: ``out`` is another benchmark's, or was measured with other options, versions or another card.
    """
    if out is None or not out.exists():
        return head, {}
    found = json.loads(out.read_text())
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{out}: --out must be a new file or a result of {SCHEMA}, but got {found.get('schema')!r}")
    if other := [key for key, value in head.items() if key != "created" and found.get(key) != value]:
        rule = "--out must be a new file or hold the same run"
        raise ValueError(f"{out}: {rule}, but got another {', '.join(other)}")
    return {key: found[key] for key in head}, {entry["label"]: entry for entry in found["settings"]}
