"""Decode speed, prefill speed and KV capacity of vLLM engines on a model's shapes with dummy weights.

Each point BATCHxCONTEXT prefills BATCH random prompts of CONTEXT tokens (prefill_s), then decodes --output-tokens
tokens for all of them with the prompts served from the prefix cache, and gives milliseconds per decode step. Every
setting runs in an engine and a process of its own.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..processes import in_own_process
from ..results import format_table, provenance, write_json
from ..settings import Setting, cache_bits

SCHEMA = "kvtuner-bench-serve/1"
SHAPES = Path(__file__).parent / "shapes"
CUDAGRAPH_CAPTURE_SIZES = (1, 8, 32, 64, 128, 256)
WARM_RUNS = 2
"""Runs with the prompts cached and one token out, of which the quickest is taken off the decode time."""
COLUMNS = {
    "setting": "label:",
    "nominal bits": "nominal_bits:.2f",
    "stored bits": "stored_bits:.2f",
    "KV tokens": "kv_tokens:,",
    "x auto": "kv_tokens_ratio:.3f",
    "point": "point:",
    "decode ms": "decode_ms:.2f",
    "decode tok/s": "decode_tok_s:,.0f",
    "prefill s": "prefill_s:.2f",
}


@dataclass(frozen=True)
class Point:
    """``batch`` requests of ``context`` prompt tokens each, written BATCHxCONTEXT."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"

    @classmethod
    def parse(cls, text: str) -> "Point":
        """Read ``64x8192``.

        Raises:
            ValueError: not two positive integers.
        """
        batch, _, context = text.strip().partition("x")
        if not (batch.isdecimal() and context.isdecimal() and int(batch) and int(context)):
            raise ValueError(f"a point is written BATCHxCONTEXT, such as 64x8192, but got {text!r}")
        return cls(int(batch), int(context))


@dataclass(frozen=True)
class ServeJob:
    """One engine and the points to measure in it.

    Attributes:
        model: folder with config.json.
        vocab_size: of that model; prompt tokens are drawn from it.
        output_tokens: decode steps per point.
        memory: share of the device's memory that vLLM may use.
        kv_memory_bytes: KV cache memory; None takes what ``memory`` leaves.
        lines: file that takes one JSON line when the engine is up and one per point.
    """

    model: Path
    vocab_size: int
    setting: Setting
    points: tuple[Point, ...]
    output_tokens: int
    memory: float
    kv_memory_bytes: int | None
    max_model_len: int
    lines: Path


def measure(job: ServeJob) -> None:
    """Build the engine, measure every point, and write a JSON line as each is known. Meant for a process of its own.

    A step is (time of all output tokens - time of one) / (output tokens), both with the prompts in the prefix cache.
    """
    from vllm import LLM

    def emit(record: dict[str, Any]) -> None:
        with open(job.lines, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(job.setting.label, json.dumps(record), flush=True)

    start = time.time()
    llm = LLM(
        model=str(job.model),
        load_format="dummy",
        skip_tokenizer_init=True,
        kv_cache_dtype=job.setting.kv_cache_dtype,
        max_model_len=job.max_model_len,
        gpu_memory_utilization=job.memory,
        kv_cache_memory_bytes=job.kv_memory_bytes,
        enable_prefix_caching=True,
        max_num_seqs=256,
        max_num_batched_tokens=16384,
        compilation_config={"cudagraph_capture_sizes": list(CUDAGRAPH_CAPTURE_SIZES)},
        additional_config=job.setting.additional_config(),
    )
    cache = llm.llm_engine.vllm_config.cache_config
    emit(
        {
            "startup_s": round(time.time() - start, 1),
            "kv_tokens": cache.kv_cache_size_tokens,
            "block_size": cache.block_size,
        }
    )
    try:
        low, high = token_range(job.vocab_size)
        _generate(llm, [list(range(low, low + 128))] * 2, 4)
        for point in job.points:
            random.seed(point.batch * point.context)
            prompts = [[random.randrange(low, high) for _ in range(point.context)] for _ in range(point.batch)]
            cold = _generate(llm, prompts, 1)
            warm = min(_generate(llm, prompts, 1) for _ in range(WARM_RUNS))
            full = _generate(llm, prompts, job.output_tokens + 1)
            step = (full - warm) / job.output_tokens
            emit(
                {
                    "batch": point.batch,
                    "context": point.context,
                    "prefill_s": round(cold, 2),
                    "warm_s": round(warm, 3),
                    "decode_ms": round(step * 1e3, 3),
                    "decode_tok_s": round(point.batch / step, 1),
                }
            )
    finally:
        # A process waits for its children before it ends, and the engine's ends only when told to.
        llm.llm_engine.engine_core.shutdown()


def _generate(llm: Any, prompts: list[list[int]], output_tokens: int) -> float:
    """Seconds to generate ``output_tokens`` tokens for every prompt."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.time()
    llm.generate(inputs, params, use_tqdm=False)
    return time.time() - begin


def token_range(vocab_size: int) -> tuple[int, int]:
    """First and one past the last prompt token: 1000 to 100,000 where the vocabulary holds them."""
    return min(1000, vocab_size // 2), min(100_000, vocab_size)


def assemble(
    head: dict[str, Any],
    settings: Sequence[tuple[Setting, tuple[float, float] | None, list[dict[str, Any]], str | None]],
) -> dict[str, Any]:
    """One result of all engines.

    Args:
        head: provenance and the options of the run.
        settings: per setting its bits (nominal, stored), the JSON lines of its engine, and its error, if any.
    """
    entries = []
    for setting, bits, lines, error in settings:
        nominal, stored = bits or (None, None)
        entries.append(
            {
                "label": setting.label,
                "kv_cache_dtype": setting.kv_cache_dtype,
                "profile": setting.profile,
                "nominal_bits": nominal,
                "stored_bits": stored,
                **(lines[0] if lines else {}),
                "points": lines[1:],
                "error": error,
            }
        )
    auto = next((entry.get("kv_tokens") for entry in entries if entry["label"] == "auto"), None)
    for entry in entries:
        if auto and "kv_tokens" in entry:
            entry["kv_tokens_ratio"] = entry["kv_tokens"] / auto
    return {"schema": SCHEMA, **head, "settings": entries}


def table(result: dict[str, Any]) -> str:
    """All points of all settings as a Markdown table; a setting without points keeps one line."""
    rows = []
    for entry in result["settings"]:
        for point in entry["points"] or [{}]:
            rows.append({**entry, **point, "point": f"{point['batch']}x{point['context']}" if point else None})
    return format_table(COLUMNS, rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner bench serve``."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--shape", choices=sorted(path.name for path in SHAPES.iterdir() if path.is_dir()))
    model.add_argument("--model", type=Path, help="folder with config.json")
    parser.add_argument(
        "--setting", action="append", required=True, type=Setting.parse, help="auto, fp8, or kvtuner:PROFILE; repeat"
    )
    parser.add_argument("--points", default="64x1024,64x8192,8x32000", help="BATCHxCONTEXT,... (default %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=64, help="decode steps of a point (default %(default)s)")
    parser.add_argument(
        "--memory", type=float, default=0.85, help="gpu_memory_utilization of every engine (default %(default)s)"
    )
    parser.add_argument("--kv-memory", type=float, help="GiB of KV cache (default: what --memory leaves)")
    parser.add_argument("--max-model-len", type=int, default=33000, help="default %(default)s")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner bench serve``; 1 when an engine failed, whose points so far are kept."""
    from transformers import AutoConfig

    model: Path = args.model or SHAPES / args.shape
    points = tuple(Point.parse(text) for text in args.points.split(","))
    longest = max(point.context for point in points) + args.output_tokens + 1
    if longest > args.max_model_len:
        raise ValueError(f"--max-model-len must be at least {longest} for these points, but got {args.max_model_len}")
    kv_memory_bytes = None if args.kv_memory is None else int(args.kv_memory * (1 << 30))
    hf_config = AutoConfig.from_pretrained(model)
    bits = [cache_bits(setting, hf_config, model.name, 16) for setting in args.setting]
    head = {
        **provenance(),
        "model": args.shape or str(model),
        "points": [str(point) for point in points],
        "output_tokens": args.output_tokens,
        "gpu_memory_utilization": args.memory,
        "kv_memory_bytes": kv_memory_bytes,
        "max_model_len": args.max_model_len,
    }
    measured = []
    with tempfile.TemporaryDirectory(prefix="kvtuner-bench-") as folder:
        for number, setting in enumerate(args.setting):
            lines = Path(folder) / f"{number}.jsonl"
            job = ServeJob(
                model=model,
                vocab_size=hf_config.get_text_config().vocab_size,
                setting=setting,
                points=points,
                output_tokens=args.output_tokens,
                memory=args.memory,
                kv_memory_bytes=kv_memory_bytes,
                max_model_len=args.max_model_len,
                lines=lines,
            )
            error = None
            try:
                in_own_process(measure, job)
            except Exception as failure:  # an engine can fail in any way; the next one must still be measured
                error = f"{type(failure).__name__}: {failure}"
            records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
            measured.append((setting, bits[number], records, error))
            # Rewritten after every engine, so that a run cut short keeps what it measured.
            result = assemble(head, measured)
            if args.out:
                write_json(args.out, result)
    print(f"{head['model']} on {head['device']}, dummy weights")
    print(table(result))
    failed = [entry for entry in result["settings"] if entry["error"]]
    for entry in failed:
        print(f"{entry['label']}: {entry['error']}", file=sys.stderr)
    return 1 if failed else 0
