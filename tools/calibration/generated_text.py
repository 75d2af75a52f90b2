"""Calibration text of the model's own: what it answers to bundled prompts with an unquantized cache.

A server caches what its model writes, and errors of the cache add up while it writes. So the model's own answers are
among the texts that settings are chosen and scored on. Answers are drawn, as LLM-QAT's data are (Liu et al., 2023),
since greedy ones of small models repeat themselves.
"""

import json
import logging
from pathlib import Path
from typing import Any

from kvtuner_tools.calibration.artifacts import digest, read_artifact
from kvtuner_tools.calibration.calibration_text import GENERATED_FILE, read_generated
from kvtuner_tools.calibration.captured import model_identity
from kvtuner_tools.calibration.options import CalibrationOptions
from kvtuner_tools.data_files import file_sha256, read_data, usable_text
from kvtuner_tools.engine_arguments import computed_by
from kvtuner_tools.engines.generation import GenerationJob, generate
from kvtuner_tools.engines.unquantized import UnquantizedEngine
from kvtuner_tools.evaluation.prompts import prompt_ids
from kvtuner_tools.model_files import load_model_shape, load_tokenizer, max_positions
from kvtuner_tools.results import provenance, write_bytes, write_json

GENERATED_KEY_FILE = "generated.key.json"
GENERATED_SCHEMA = "kvtuner-generated-text/1"
PROMPTS = Path(__file__).parent / "data" / "generation_prompts.jsonl"
TEMPERATURE = 0.7
MAX_NUM_SEQS = 64

logger = logging.getLogger("kvtuner")


def generate_text(options: CalibrationOptions, out: Path, engine: UnquantizedEngine) -> str:
    """Write the text that the options ask for, unless an earlier run of the same options did.

    Args:
        options: filled in.
        out: the output folder.
        engine: writes it; has room for :func:`longest_answer`.

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
            "sampling": [TEMPERATURE, options.answer_tokens, options.seed],
            "tokens": options.generated_tokens,
            "dtype": options.dtype,
            "versions": provenance("-")["versions"],
            **({"engine": computed} if (computed := computed_by(options.engine)) else {}),
        }
    )
    known = read_artifact(key_path, GENERATED_SCHEMA, ("inputs", "sha256")) if key_path.exists() else {}
    if not path.exists() or known != {"inputs": inputs, "sha256": file_sha256(path)}:
        rows = _write(options, engine)
        write_bytes(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
        write_json(key_path, {"schema": GENERATED_SCHEMA, "inputs": inputs, "sha256": file_sha256(path)})
    found = read_generated(out)
    assert found is not None
    tokens = sum(len(each.ids) for each in found.documents)
    if tokens < options.generated_tokens:
        logger.warning("the model wrote %d tokens of the %d asked for", tokens, options.generated_tokens)
    return f"{tokens:,} generated tokens"


def longest_answer(options: CalibrationOptions) -> int:
    """Tokens of the longest prompt and the longest answer that it may have; 0 where no text is written.

    Raises:
        ValueError: the model has too few positions for an answer.
    """
    if not options.generated_tokens:
        return 0
    job = _job(options)
    return max(map(len, job.prompts)) + job.max_tokens


def _write(options: CalibrationOptions, engine: UnquantizedEngine) -> list[dict[str, Any]]:
    """Rows with question, answer and token ids."""
    job, questions = _job(options), _questions()
    return [
        {
            "question": questions[number],
            "answer": answer.text,
            "ids": [*job.prompts[number], *answer.token_ids],
        }
        for number, answer in engine.run(generate, job)
    ]


def _job(options: CalibrationOptions) -> GenerationJob:
    tokenizer = load_tokenizer(options.model, options.source)
    prompts = tuple(prompt_ids(tokenizer, question) for question in _questions())
    positions = max_positions(options.model, options.source)
    max_tokens = min(options.answer_tokens, positions - 1 - max(map(len, prompts)))
    if max_tokens < 1:
        raise ValueError(f"--generated-tokens must be 0 for a model of {positions} positions, which hold no answer")
    assert options.generated_tokens is not None
    return GenerationJob(prompts, max_tokens, options.generated_tokens, TEMPERATURE)


def _questions() -> list[str]:
    rows = read_data(PROMPTS, _question)
    assert not isinstance(rows, str)
    return [question for _, question in rows]


def _question(record: Any) -> str:
    return usable_text("question", record["question"])
