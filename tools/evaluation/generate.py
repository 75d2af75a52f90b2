"""The bundled questions of ``kvtuner evaluate --generate``: word problems with a number as the answer, instructions."""

from pathlib import Path
from typing import Any

from kvtuner_tools.data_files import file_sha256, read_data, usable_text
from kvtuner_tools.evaluation.prompts import prompt_form, prompt_ids
from kvtuner_tools.evaluation.questions import Grade, QuestionSet
from kvtuner_tools.task_accuracy import INSTRUCTION, final_number
from vllm_kvtuner.profile.problems import show

QUESTIONS = Path(__file__).parent / "data" / "questions.jsonl"


def generate_set(tokenizer: Any, *, limit: int | None, max_tokens: int) -> QuestionSet:
    """The bundled questions.

    Args:
        tokenizer: of the model.
        limit: questions at most, problems and instructions in turn, so that few are of both kinds.
        max_tokens: tokens an answer may have.
    """
    rows = read_data(QUESTIONS, _row)
    assert not isinstance(rows, str), "the bundled questions are rows of JSON"
    asked = _in_turn([row for _, row in rows])[:limit]
    return QuestionSet(
        name="generate",
        prompts=tuple(
            prompt_ids(tokenizer, question if answer is None else f"{question}\n\n{INSTRUCTION}")
            for question, answer in asked
        ),
        max_tokens=max_tokens,
        grades=tuple(None if answer is None else _grade(answer) for _, answer in asked),
        about={"file": "bundled", "sha256": file_sha256(QUESTIONS), "prompts": prompt_form(tokenizer)},
        is_followed=True,
    )


def _row(record: Any) -> tuple[str, str | None]:
    """Question and answer, None without one."""
    if not isinstance(record, dict) or "question" not in record:
        raise ValueError(f"each line must be an object with question, but got {show(record)}")
    answer = record.get("answer")
    return usable_text("question", record["question"]), None if answer is None else usable_text("answer", answer)


def _in_turn(rows: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """The rows, those without an answer spread evenly over the others."""
    parts = [[row for row in rows if row[1] is not None], [row for row in rows if row[1] is None]]
    placed = [((index + 0.5) / len(part), row) for part in parts for index, row in enumerate(part)]
    return [row for _, row in sorted(placed, key=lambda each: each[0])]


def _grade(answer: str) -> Grade:
    right = final_number(answer)
    return lambda text: float(final_number(text) == right)
