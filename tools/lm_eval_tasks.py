"""lm-eval's tasks through its vLLM backend, on one KV cache setting. Needs the optional package ``lm-eval``."""

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtuner_tools.cache_setting import AUTO, CacheSetting, unquantized_keywords
from kvtuner_tools.engine_arguments import EngineWords, engine_keywords, model_source
from kvtuner_tools.engines.evaluate import cache_memory
from kvtuner_tools.model_files import load_config, load_tokenizer, max_positions

MAX_MODEL_LEN = 4096
"""Tokens of prompt and answer, or fewer if the model has fewer positions."""
BOOTSTRAPS = 1000
"""Resamplings for the standard error of metrics that have no closed form."""


@dataclass(frozen=True)
class LmEvalJob:
    """One engine and the tasks to run in it.

    Attributes:
        tasks: names that lm-eval knows, or YAML files that define a task.
        limit: questions per task at most.
        num_fewshot: worked examples; None for the task's own number.
        kv_memory_bytes: memory of the KV cache on each rank.
        words: vLLM's engine arguments.
    """

    tasks: tuple[str, ...]
    limit: int | None
    num_fewshot: int | None
    model: str
    dtype: str
    setting: CacheSetting
    kv_memory_bytes: int
    words: EngineWords = field(default_factory=dict)


def check_lm_eval() -> None:
    """Raises: ValueError: lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval's --tasks need the package lm-eval: pip install 'vllm-kvtuner[lm-eval]'")


def run_lm_eval(job: LmEvalJob) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Metrics of each task, each its value and standard error (None where lm-eval gives none), under ``metric,filter``.

    Prompts are lm-eval's own, in the model's chat template if it has one. Meant for a process of its own.
    """
    # As in every measurement here: one process, and settings that differ in the cache alone.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import lm_eval

    source = model_source(job.words)
    positions = max_positions(job.model, source)
    arguments = {
        "pretrained": job.model,
        "dtype": job.dtype,
        "max_model_len": min(MAX_MODEL_LEN, positions),
        "kv_cache_dtype": job.setting.kv_cache_dtype,
        "additional_config": job.setting.additional_config(attend_cached_prefill=True, request_tokens=positions),
        **cache_memory(job.kv_memory_bytes),
        "enforce_eager": True,
    }
    if job.setting == AUTO:
        arguments |= unquantized_keywords(load_config(job.model, source), job.dtype)
    results = lm_eval.simple_evaluate(
        model="vllm",
        model_args=engine_keywords(job.words, arguments),
        tasks=[str(Path(task).absolute()) if task.endswith(".yaml") else task for task in job.tasks],
        batch_size="auto",
        limit=job.limit,
        num_fewshot=job.num_fewshot,
        log_samples=False,
        bootstrap_iters=BOOTSTRAPS,
        apply_chat_template=bool(load_tokenizer(job.model, source).chat_template),
    )
    return {task: _metrics(values) for task, values in results["results"].items()}


def _metrics(values: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """lm-eval's flat ``metric,filter`` and ``metric_stderr,filter``, paired."""
    metrics = {}
    for key, value in values.items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr,{filter_name}")
        metrics[key] = (value, stderr if isinstance(stderr, float) else None)
    return metrics
