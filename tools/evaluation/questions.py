"""Sets of questions that every setting answers, and what its answers are worth beside another setting's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtuner_tools.evaluation.statistics import mean_stderr, paired_mean, ratio_stderr
from kvtuner_tools.task_accuracy import Completion, Task, final_number

QUARTERS = 4
"""Parts of an answer by which its KL is told."""
Grade = Callable[[str], float]
"""What an answer is worth, from 0 to 1."""


@dataclass(frozen=True)
class QuestionSet:
    """Questions as the model sees them.

    Attributes:
        name: key of the set in results.
        prompts: token ids of each question.
        max_tokens: tokens an answer may have.
        grades: of each question; None where no answer is the right one.
        groups: of each question, names of parts of the set that are scored by themselves too.
        about: what results say of the set, as JSON's types.
        is_followed: whether KL is measured along the unquantized model's answers.
        task: the file that the set is, if it is one.
    """

    name: str
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    grades: tuple[Grade | None, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    is_followed: bool = False
    task: Task | None = None

    @property
    def max_model_len(self) -> int:
        """Tokens the longest prompt and its answer need."""
        return max(map(len, self.prompts)) + self.max_tokens

    def description(self) -> dict[str, Any]:
        """What a result says of the set."""
        graded = sum(grade is not None for grade in self.grades)
        return {"questions": len(self.prompts), "graded": graded, "max_tokens": self.max_tokens, **self.about}

    def summary(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Scores of one completion per question.

        ``score`` and ``stderr`` are of the graded questions, ``exact`` is the share of these that is worth 1,
        ``ended`` the share of all answers that ended within the tokens allowed. ``scores``, with None where nothing is
        graded, ``tokens`` and ``ends`` are of each question, so that any two results of the same questions can be
        paired.
        """
        pairs = zip(completions, self.grades, strict=True)
        scores = [None if grade is None else float(grade(each.text)) for each, grade in pairs]
        summary: dict[str, Any] = {
            "questions": len(scores),
            "ended": sum(each.finished for each in completions) / len(completions),
            "tokens_mean": sum(each.num_tokens for each in completions) / len(completions),
            **_scored(scores),
        }
        names = dict.fromkeys(name for names in self.groups for name in names)
        if names:
            parts = {name: [s for s, of in zip(scores, self.groups, strict=True) if name in of] for name in names}
            summary["groups"] = {name: _scored(part) for name, part in parts.items()}
        ends = "".join(str(int(each.finished)) for each in completions)
        return {**summary, "scores": scores, "tokens": [each.num_tokens for each in completions], "ends": ends}


def _scored(scores: Sequence[float | None]) -> dict[str, Any]:
    graded = [score for score in scores if score is not None]
    if not graded:
        return {"graded": 0, "score": None, "stderr": None, "exact": None}
    score, stderr = mean_stderr(graded)
    exact = sum(each == 1 for each in graded) / len(graded)
    return {"graded": len(graded), "score": score, "stderr": stderr, "exact": exact}


def task_set(task: Task, *, is_followed: bool) -> QuestionSet:
    """A file of questions as a set."""

    def grade_of(answer: Any) -> Grade:
        return lambda text: float(final_number(text) == answer)

    return QuestionSet(
        name="task",
        prompts=task.prompts,
        max_tokens=task.max_tokens,
        grades=tuple(map(grade_of, task.answers)),
        about={"file": task.source, "sha256": task.sha256, "shots": task.shots},
        is_followed=is_followed,
        task=task,
    )


def paired_answers(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float | None]:
    """Differences between two settings' answers to the same questions, from :meth:`QuestionSet.summary` of each.

    Returns:
        ``difference`` of the mean scores and ``difference_stderr``, None where nothing is graded;
        ``ended_difference`` of the shares of answers that ended, and its standard error; ``tokens_ratio``, tokens of
        all answers over the other's, and its standard error.
    """
    graded = [
        (one, other) for one, other in zip(ours["scores"], theirs["scores"], strict=True) if None not in (one, other)
    ]
    difference, stderr = paired_mean(*zip(*graded, strict=True)) if graded else (None, None)
    ends = [[int(end) for end in each["ends"]] for each in (ours, theirs)]
    ended, ended_stderr = paired_mean(*ends)
    ratio, ratio_error = ratio_stderr(ours["tokens"], theirs["tokens"])
    return {
        "difference": difference,
        "difference_stderr": stderr,
        "ended_difference": ended,
        "ended_difference_stderr": ended_stderr,
        "tokens_ratio": ratio,
        "tokens_ratio_stderr": ratio_error,
    }


def kl_along(answers: Sequence[np.ndarray]) -> dict[str, Any]:
    """KL along the unquantized model's answers.

    ``kl_mean`` and ``kl_quarters`` are means over tokens, in nats, of all of each answer and of its first to last
    quarter; standard errors take answers as independent, and tokens of one answer not.

    Args:
        answers: KL of each predicted token, one array for each answer.
    """
    sums, counts = [float(each.sum(dtype=np.float64)) for each in answers], [len(each) for each in answers]
    mean, stderr = ratio_stderr(sums, counts)
    parts = [np.array_split(each, QUARTERS) for each in answers if len(each) >= QUARTERS]
    quarters = [
        ratio_stderr(
            *zip(*((float(part[place].sum(dtype=np.float64)), len(part[place])) for part in parts), strict=True)
        )
        for place in range(QUARTERS if parts else 0)
    ]
    return {
        "kl_mean": mean,
        "kl_stderr": stderr,
        "kl_p99": float(np.percentile(np.concatenate(answers), 99)),
        "kl_tokens": sum(counts),
        "kl_quarters": [quarter for quarter, _ in quarters],
        "kl_quarters_stderr": [error for _, error in quarters],
        "kl_answers": [total / count for total, count in zip(sums, counts, strict=True)],
    }
