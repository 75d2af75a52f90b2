"""Accuracy on word problems with a number as the answer (GSM8K's format): greedy chat, exact match of the number."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from kvtuner_tools.data_files import file_sha256, read_data, refuse_rows, usable_text
from vllm_kvtuner.profile.problems import show

INSTRUCTION = "Solve the problem step by step. Put the final number in \\boxed{}."
DEFAULT_MAX_TOKENS = 512

_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\d[\d,]*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_CALCULATION = re.compile(r"<<[^>]*>>")
_MARK = "####"
"""Stands before the final number in GSM8K's answers."""
_FORM = f"question and answer, the answer ending in '{_MARK} number'"


@dataclass(frozen=True)
class Completion:
    """What the model answered to one question.

    Attributes:
        text: the answer.
        finished: whether it ended by itself, within the tokens allowed.
        num_tokens: of the answer.
        token_ids: of the answer, what ended it included.
    """

    text: str
    finished: bool
    num_tokens: int
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskScore:
    """Accuracy of one setting on a task.

    Attributes:
        accuracy: share of questions whose final number is right; an answer that was cut counts by what it has.
        stderr: its standard error, from the binomial distribution.
        num_questions: questions asked.
        num_finished: answers that ended within the tokens allowed.
        right: which answers are right, in the questions' order.
        num_tokens: of each answer.
    """

    accuracy: float
    stderr: float
    num_questions: int
    num_finished: int
    right: tuple[bool, ...]
    num_tokens: tuple[int, ...]

    def summary(self) -> dict[str, Any]:
        """``task_right`` has a 1 for each right answer and a 0 for each other, so that any two results of the same
        questions can be paired."""
        return {
            "task_accuracy": self.accuracy,
            "task_stderr": self.stderr,
            "task_questions": self.num_questions,
            "task_finished": self.num_finished,
            "task_right": "".join(str(int(right)) for right in self.right),
            "task_tokens": list(self.num_tokens),
            "task_tokens_mean": sum(self.num_tokens) / len(self.num_tokens),
        }


def paired(row: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    """Differences of a setting's answers from the reference's to the same questions.

    Args:
        row: of :meth:`TaskScore.summary`.
        reference: the reference's.

    Returns:
        ``task_difference``: of the accuracies; ``task_difference_stderr``: its standard error, from the differences of
        single questions; ``task_tokens_ratio``: tokens of all answers over the reference's.
    """
    scores = [[int(right) for right in each["task_right"]] for each in (row, reference)]
    differences = [ours - theirs for ours, theirs in zip(*scores, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((each - mean) ** 2 for each in differences) / max(count - 1, 1)
    return {
        "task_difference": mean,
        "task_difference_stderr": (variance / count) ** 0.5,
        "task_tokens_ratio": row["task_tokens_mean"] / reference["task_tokens_mean"],
    }


@dataclass(frozen=True)
class Task:
    """Questions as the model sees them, and their answers.

    Attributes:
        source: the file's name.
        sha256: of the file.
        shots: worked examples before each question.
        max_tokens: tokens an answer may have.
        prompts: token ids of each question in the chat template, examples before it.
        answers: the right numbers.
    """

    source: str
    sha256: str
    shots: int
    max_tokens: int
    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[Decimal, ...]

    @property
    def max_model_len(self) -> int:
        """Tokens the longest prompt and its answer need."""
        return max(map(len, self.prompts)) + self.max_tokens

    def description(self) -> dict[str, Any]:
        """What a result says of the task."""
        return {
            "file": self.source,
            "sha256": self.sha256,
            "questions": len(self.answers),
            "shots": self.shots,
            "max_tokens": self.max_tokens,
        }

    def score(self, completions: Sequence[Completion]) -> TaskScore:
        """Compare the completions, one per prompt, with the answers."""
        right = [
            final_number(completion.text) == answer
            for completion, answer in zip(completions, self.answers, strict=True)
        ]
        accuracy = sum(right) / len(right)
        return TaskScore(
            accuracy=accuracy,
            stderr=(accuracy * (1 - accuracy) / len(right)) ** 0.5,
            num_questions=len(right),
            num_finished=sum(completion.finished for completion in completions),
            right=tuple(right),
            num_tokens=tuple(completion.num_tokens for completion in completions),
        )


def load_task(
    path: Path,
    tokenizer: Any,
    *,
    limit: int | None = None,
    shots: int = 0,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    positions: int | None = None,
) -> Task:
    """Read a file of JSON rows with ``question`` and ``answer``, the answer ending in ``#### number``.

    Args:
        path: the file.
        tokenizer: of the model, with a chat template.
        limit: questions to ask at most.
        shots: rows from the beginning that become worked examples and are not asked.
        max_tokens: tokens an answer may have.
        positions: that the model has for a question, the examples before it and its answer; None for any number.

    Raises:
        ProfileError: the file cannot be read, or every row in it that cannot be used, with file and line.
        ValueError: too few rows, a count below its least, or no chat template.
    """
    for name, value, least in (("limit", limit, 1), ("shots", shots, 0), ("max_tokens", max_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, but got {value}")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path}: a task needs a tokenizer with a chat template, but {tokenizer.name_or_path} has none"
        )
    rows = read_data(path, _question)
    if isinstance(rows, str):
        raise ValueError(f"{path}: the file must hold JSON rows of {_FORM}, but got text")
    examples, asked = rows[:shots], rows[shots:][:limit]
    if not asked:
        raise ValueError(
            f"{path}: must hold more than {shots} questions, those of the worked examples, but got {len(rows)}"
        )
    head = [message for _, row in examples for message in _exchange(*row)]
    prompts, problems = [], []
    for line, (question, _, _) in asked:
        chat = [*head, _user(question)]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens itself, so the tokenizer must not add them again.
        prompts.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        if positions is not None and (needed := len(prompts[-1]) + max_tokens) >= positions:
            rule = f"a question and its answer must take fewer tokens than the model's {positions:,} positions"
            problems.append(f"{path}:{line}: {rule}, but got {needed:,}")
    refuse_rows(path, problems)
    return Task(
        source=path.name,
        sha256=file_sha256(path),
        shots=shots,
        max_tokens=max_tokens,
        prompts=tuple(prompts),
        answers=tuple(answer for _, (_, _, answer) in asked),
    )


def final_number(text: str) -> Decimal | None:
    """The number an answer ends in: the last one in its last ``\\boxed{}``, after its last ``####``, or of all.

    None where there is none, as in garbage.
    """
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    elif _MARK in text:
        text = text.rpartition(_MARK)[2]
    # LaTeX writes 1,200 as 1{,}200 or 1\,200, and dollars as \$.
    text = re.sub(r"\{,\}|\\[,!]", ",", text)
    numbers = _NUMBER.findall(re.sub(r"[\\$]", "", text).replace("\N{MINUS SIGN}", "-"))
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _question(record: Any) -> tuple[str, str, Decimal]:
    """Question, rationale and final number of one row."""
    if isinstance(record, dict) and {"question", "answer"} <= record.keys():
        question, text = (usable_text(key, record[key]) for key in ("question", "answer"))
        rationale, mark, answer = text.rpartition(_MARK)
        found = final_number(answer)
        if mark and found is not None:
            return question, _CALCULATION.sub("", rationale).strip(), found
    raise ValueError(f"each line must be an object with {_FORM}, but got {show(record)}")


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}


def _exchange(question: str, rationale: str, answer: Decimal) -> list[dict[str, str]]:
    return [_user(question), {"role": "assistant", "content": f"{rationale}\nThe answer is \\boxed{{{answer}}}."}]
