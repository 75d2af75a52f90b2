"""Calibration text of the model's own: what it answers to bundled prompts with an unquantized cache.

A server caches what its model writes, and errors of the cache add up while it writes. So the model's own answers are
among the texts that settings are chosen and scored on. Answers are drawn, as LLM-QAT's data are (Liu et al., 2023),
since greedy ones of small models repeat themselves.
"""

import json
import logging
from pathlib import Path
from typing import Any

from kvtuner_tools.cache_setting import AUTO
from kvtuner_tools.calibration.artifacts import digest, read_artifact
from kvtuner_tools.calibration.calibration_text import GENERATED_FILE, read_generated
from kvtuner_tools.calibration.captured import model_identity
from kvtuner_tools.calibration.options import CalibrationOptions
from kvtuner_tools.data_files import file_sha256, read_data, usable_text
from kvtuner_tools.engine_arguments import computed_by
from kvtuner_tools.engines.evaluate import EngineOptions, max_model_len_for
from kvtuner_tools.engines.generation import GenerationJob, run_generation
from kvtuner_tools.evaluation.prompts import prompt_ids
from kvtuner_tools.model_files import load_model_shape, load_tokenizer, max_positions
from kvtuner_tools.processes import in_own_process
from kvtuner_tools.results import provenance, write_bytes, write_json

GENERATED_KEY_FILE = "generated.key.json"
GENERATED_SCHEMA = "kvtuner-generated-text/1"
PROMPTS = Path(__file__).parent / "data" / "generation_prompts.jsonl"
MAX_TOKENS = 512
"""Of an answer."""
TEMPERATURE = 0.7
MAX_NUM_SEQS = 64

logger = logging.getLogger("kvtuner")


def generate_text(options: CalibrationOptions, out: Path) -> str:
    """Write the text that the options ask for, unless an earlier run of the same options did.

    Returns:
        What came of it, in some words.
    """
    path, key_path = out / GENERATED_FILE, out / GENERATED_KEY_FILE
    if not options.generated_tokens:
        for each in (path, key_path):
            each.unlink(missing_ok=True)
        return "no generated text"
    shape = load_model_shape(options.model, options.source)
    inputs = digest(
        {
            "schema": GENERATED_SCHEMA,
            "model": model_identity(shape),
            "prompts": file_sha256(PROMPTS),
            "sampling": [TEMPERATURE, MAX_TOKENS, options.seed],
            "tokens": options.generated_tokens,
            "dtype": options.dtype,
            "versions": provenance("-")["versions"],
            **({"engine": computed} if (computed := computed_by(options.engine)) else {}),
        }
    )
    known = read_artifact(key_path, GENERATED_SCHEMA, ("inputs", "sha256")) if key_path.exists() else {}
    if not path.exists() or known != {"inputs": inputs, "sha256": file_sha256(path)}:
        rows = _write(options)
        write_bytes(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        write_json(key_path, {"schema": GENERATED_SCHEMA, "inputs": inputs, "sha256": file_sha256(path)})
    found = read_generated(out)
    assert found is not None
    tokens = sum(len(each.ids) for each in found.documents)
    if tokens < options.generated_tokens:
        logger.warning("the model wrote %d tokens of the %d asked for", tokens, options.generated_tokens)
    return f"{tokens:,} generated tokens"


def _write(options: CalibrationOptions) -> list[dict[str, Any]]:
    """Rows with question, answer and token ids."""
    tokenizer = load_tokenizer(options.model, options.source)
    questions = read_data(PROMPTS, _question)
    assert not isinstance(questions, str) and options.generated_tokens is not None
    prompts = tuple(prompt_ids(tokenizer, question) for _, question in questions)
    positions = max_positions(options.model, options.source)
    max_tokens = min(MAX_TOKENS, positions - 1 - max(map(len, prompts)))
    if max_tokens < 1:
        raise ValueError(f"--generated-tokens must be 0 for a model of {positions} positions, which hold no answer")
    longest = max(map(len, prompts)) + max_tokens
    engine = EngineOptions(
        label="generated text",
        model=options.model,
        dtype=options.dtype,
        setting=AUTO,
        max_model_len=max_model_len_for(longest, positions),
        chunk=longest,
        kv_memory_bytes=options.kv_memory,
        max_num_seqs=MAX_NUM_SEQS,
        words=options.engine,
    )
    job = GenerationJob(engine, prompts, max_tokens, options.generated_tokens, TEMPERATURE)
    answers = in_own_process(run_generation, job)
    return [
        {
            "question": questions[number][1],
            "answer": answer.text,
            "ids": [*prompts[number], *answer.token_ids],
        }
        for number, answer in answers
    ]


def _question(record: Any) -> str:
    return usable_text("question", record["question"])
