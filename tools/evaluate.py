"""``kvtuner evaluate``: KL divergence, perplexity and top-1 agreement of KV cache settings against ``auto``.

Held-out text runs teacher-forced through vLLM itself, once per setting, each in an engine and a process of its own. The
reference's logits go to a temporary file; every other pass is compared with it position by position on the fly.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evaluate_engine import EngineJob, EngineResult, ReferenceLogits, max_model_len_for, run_engine
from .heldout import file_sha256, load_windows
from .processes import in_own_process
from .results import format_table, provenance, write_json
from .settings import KVTUNER, Setting, cache_bits

SCHEMA = "kvtuner-evaluation/1"
AUTO = Setting("auto")
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
    """

    model: str
    settings: tuple[Setting, ...]
    data: Path
    tokens: int = 4096
    context: int = 1024
    chunk: int | None = None
    kv_memory_bytes: int = 1 << 30
    dtype: str = "bfloat16"
    noise_floor: bool = False


def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """Run all engines one after the other and return what ``--json`` writes.

    KL is in nats per token, natural logarithm; ``perplexity`` is exp of the mean negative log-likelihood over the same
    positions; ``kv_tokens`` is what vLLM reports to fit in ``kv_memory_bytes``.

    Raises:
        ValueError: too little data, a context beyond the model, or a profile that does not fit it.
    """
    from transformers import AutoConfig, AutoTokenizer

    hf_config = AutoConfig.from_pretrained(request.model)
    max_model_len = max_model_len_for(request.context, hf_config.get_text_config().max_position_embeddings)
    width = 32 if request.dtype == "float32" else 16
    bits = {setting: cache_bits(setting, hf_config, request.model, width) for setting in (AUTO, *request.settings)}
    tokenizer = AutoTokenizer.from_pretrained(request.model)
    windows = load_windows(request.data, tokenizer, tokens=request.tokens, context=request.context)
    chunk = request.chunk or request.context

    def run(label: str, setting: Setting, chunk: int, reference: ReferenceLogits | Path) -> EngineResult:
        job = EngineJob(
            label=label,
            model=request.model,
            dtype=request.dtype,
            setting=setting,
            windows=tuple(map(tuple, windows)),
            max_model_len=max_model_len,
            chunk=chunk,
            kv_memory_bytes=request.kv_memory_bytes,
            reference=reference,
        )
        return in_own_process(run_engine, job)

    head = provenance()
    with tempfile.TemporaryDirectory(prefix="kvtuner-evaluate-") as folder:
        recorded = run("auto (reference)", AUTO, chunk, Path(folder) / "logits")
        passes = [(setting.label, setting, chunk) for setting in request.settings]
        if request.noise_floor:
            passes.insert(0, ("auto (noise floor)", AUTO, -(-min(chunk, request.context) // 2)))
        rows: list[dict[str, Any]] = []
        for label, setting, step in passes:
            result = run(label, setting, step, recorded.reference)
            rows.append(_row(label, setting, bits[setting], result, recorded.kv_tokens))
    return {
        "schema": SCHEMA,
        **head,
        "model": request.model,
        "dtype": request.dtype,
        "data": {"file": request.data.name, "sha256": file_sha256(request.data)},
        "context": request.context,
        "chunk": chunk,
        "windows": len(windows),
        "predicted_tokens": recorded.reference.rows,
        "kv_memory_bytes": request.kv_memory_bytes,
        "reference": {"kv_tokens": recorded.kv_tokens, "logits_dtype": recorded.reference.dtype},
        "settings": rows,
    }


def table(evaluation: dict[str, Any]) -> str:
    """The evaluation's settings as a Markdown table."""
    return format_table(COLUMNS, evaluation["settings"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner evaluate``."""
    parser.add_argument("model", help="model folder or id")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        help="precision profile to evaluate (path, shipped name or pair); repeat",
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
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner evaluate``; 0 when every setting was evaluated."""
    settings = request_settings(args.kv_cache_dtype, args.profile)
    if not settings and not args.noise_floor:
        raise ValueError("evaluate needs a --profile, a --kv-cache-dtype or --noise-floor, but got none")
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
        )
    )
    if args.json:
        write_json(args.json, evaluation)
    print(
        f"{evaluation['model']} ({evaluation['dtype']}), {evaluation['predicted_tokens']} tokens of "
        f"{evaluation['data']['file']}, KL against auto in nats per token; auto: perplexity "
        f"{evaluation['settings'][0]['perplexity_reference']:.3f}, {evaluation['reference']['kv_tokens']:,} KV tokens"
    )
    print(table(evaluation))
    return 0


def request_settings(dtypes: Sequence[str], profiles: Sequence[str]) -> tuple[Setting, ...]:
    """Settings of the two repeated options, vLLM's dtypes first."""
    return (*map(Setting, dtypes), *(Setting(KVTUNER, profile) for profile in profiles))


def _row(
    label: str, setting: Setting, bits: tuple[float, float] | None, result: EngineResult, auto_kv_tokens: int
) -> dict[str, Any]:
    assert result.scores is not None
    nominal, stored = bits or (None, None)
    return {
        "label": label,
        "kv_cache_dtype": setting.kv_cache_dtype,
        "profile": setting.profile,
        "nominal_bits": nominal,
        "stored_bits": stored,
        **result.scores.summary(),
        "kv_tokens": result.kv_tokens,
        "kv_tokens_ratio": result.kv_tokens / auto_kv_tokens,
        "block_size": result.block_size,
        "seconds": round(result.seconds, 1),
    }
