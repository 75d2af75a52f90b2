"""Task accuracy: final numbers, prompts in the chat template, and the score."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from kvtuner_tools.task_accuracy import INSTRUCTION, Completion, final_number, load_task, paired
from tests.helpers.tiny_model import make_tokenizer

LINES = [
    {"question": "1+1?", "answer": "One and one is <<1+1=2>>2.\n#### 2"},
    {"question": "Dollars?", "answer": "Many.\n#### 1,200"},
    {"question": "Loss?", "answer": "Less.\n#### -3.5"},
]


def write(folder: Path, lines: list) -> Path:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"First \boxed{3}, no: \boxed{72} clips, not 5.", "72"),
        (r"\boxed{72\text{ clips}}", "72"),
        (r"\boxed{\$1,200.50}", "1200.5"),
        (r"\boxed{12{,}000}", "12000"),
        (r"\boxed{12\,000}", "12000"),
        ("She has 5.\n#### 1,234", "1234"),
        ("It costs 3 and then $18.", "18"),
        ("5-3=2", "2"),
        ("between 10-20", "20"),
        ("10 - 30 = -20.", "-20"),
        ("so −4", "-4"),  # noqa: RUF001
        ("a loss of -$5", "-5"),
        ("no idea", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_prompts_follow_the_chat_template(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()

    task = load_task(write(tmp_path, LINES), tokenizer, shots=1, limit=1, max_tokens=7)

    assert task.answers == (Decimal(1200),)
    assert tokenizer.decode(task.prompts[0]) == (
        f"<|user|>1+1?\n\n{INSTRUCTION}<|end|><|assistant|>One and one is 2.\nThe answer is \\boxed{{2}}.<|end|>"
        f"<|user|>Dollars?\n\n{INSTRUCTION}<|end|><|assistant|>"
    )
    assert task.max_model_len == len(task.prompts[0]) + 7


def test_score(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, LINES), make_tokenizer())
    completions = [Completion(r"\boxed{2}", True, 4), Completion("1200 and so", False, 9), Completion("?", False, 9)]

    score = task.score(completions)

    assert score.accuracy == pytest.approx(2 / 3)
    assert score.stderr == pytest.approx((2 / 9 / 3) ** 0.5)
    assert (score.num_questions, score.num_finished) == (3, 1)
    assert score.summary()["task_right"] == "110"
    assert score.summary()["task_tokens_mean"] == pytest.approx(22 / 3)


def test_differences_are_paired() -> None:
    row, reference = {"task_right": "0110", "task_tokens_mean": 30}, {"task_right": "1111", "task_tokens_mean": 20}

    got = paired(row, reference)

    assert got["task_difference"] == -0.5
    assert got["task_difference_stderr"] == pytest.approx((1 / 3 / 4) ** 0.5)
    assert got["task_tokens_ratio"] == 1.5


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([LINES[0], {"question": "q"}], {}, r"task\.jsonl:2: each line must be an object with question and answer"),
        ([{"question": "q", "answer": "no number"}], {}, r"task\.jsonl:1: each line .*'#### number', but got"),
        ([7], {}, r"task\.jsonl:1: each line must be an object"),
        (LINES, {"shots": 3}, "more than 3 questions, those of the worked examples, but got 3"),
        (LINES, {"limit": 0}, "limit must be at least 1, but got 0"),
        (LINES, {"shots": -1}, "shots must be at least 0, but got -1"),
        (LINES, {"max_tokens": 0}, "max_tokens must be at least 1, but got 0"),
    ],
)
def test_unusable_tasks_are_refused(tmp_path: Path, lines: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(write(tmp_path, lines), make_tokenizer(), **options)


def test_a_model_without_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None

    with pytest.raises(ValueError, match="chat template"):
        load_task(write(tmp_path, LINES), tokenizer)
