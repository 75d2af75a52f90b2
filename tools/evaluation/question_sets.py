"""The sets of questions that an evaluation asks, and what each pass gives for them."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from kvtuner_tools.engines.evaluate import Asked, Window
from kvtuner_tools.evaluation.generate import generate_set
from kvtuner_tools.evaluation.needles import needle_set
from kvtuner_tools.evaluation.questions import QuestionSet, kl_along, paired_answers, task_set
from kvtuner_tools.evaluation.quotes import quote_set
from kvtuner_tools.evaluation.request import EvaluationRequest
from kvtuner_tools.task_accuracy import Completion, load_task, paired

SAMPLED = ("generate", "task")
"""Sets whose answers may be drawn; needles and quotes have one right answer, so the most likely tokens are taken."""


def question_sets(request: EvaluationRequest, tokenizer: Any, positions: int) -> tuple[QuestionSet, ...]:
    """All sets of a request.

    Args:
        request: what to evaluate.
        tokenizer: of the model.
        positions: that the model has.

    Raises:
        ValueError: a set that cannot be made, or that the model has too few positions for.
    """
    sets = []
    if request.generate:
        sets.append(generate_set(tokenizer, limit=request.task_limit, max_tokens=request.task_tokens))
    if request.task is not None:
        task = load_task(
            request.task,
            tokenizer,
            limit=request.task_limit,
            shots=request.num_fewshot or 0,
            max_tokens=request.task_tokens,
            positions=positions,
        )
        sets.append(task_set(task, is_followed=request.generate))
    if request.needles is not None:
        sets.append(needle_set(request.needles, tokenizer))
    if request.quotes is not None:
        sets.append(quote_set(request.quotes, tokenizer))
    for each in sets:
        if each.max_model_len >= positions:
            rule = f"{each.name}: a question and its answer must take fewer tokens than the model's {positions:,}"
            raise ValueError(f"{rule} positions, but got {each.max_model_len:,}")
    return tuple(sets)


def asked(sets: Sequence[QuestionSet], temperature: float) -> tuple[Asked, ...]:
    """The sets as an engine takes them."""
    return tuple(
        Asked(each.prompts, each.max_tokens, temperature if each.name in SAMPLED else 0.0, each.is_followed)
        for each in sets
    )


def answered(sets: Sequence[QuestionSet], answers: Sequence[Sequence[Completion]]) -> dict[str, Any]:
    """What a row has of one setting's answers: ``answers`` by set, and the fields of a file of questions."""
    if not sets:
        return {}
    found: dict[str, Any] = {"answers": {}}
    for each, completions in zip(sets, answers, strict=True):
        if each.task is not None:
            found |= each.task.score(completions).summary()
        found["answers"][each.name] = each.summary(completions)
    return found


def followed(sets: Sequence[QuestionSet], windows: Sequence[Window], kl: np.ndarray) -> dict[str, Any]:
    """KL along the unquantized model's answers, by set.

    Args:
        sets: of the evaluation.
        windows: prompts with their answers.
        kl: of all their positions, one window after the other.
    """
    parts = np.split(kl, np.cumsum([each.positions for each in windows])[:-1])
    found = {}
    for each in sets:
        if each.is_followed:
            prompts = set(each.prompts)
            mine = [part for part, at in zip(parts, windows, strict=True) if at.ids[: at.start] in prompts]
            if mine:
                found[each.name] = kl_along(mine)
    return {"along": found} if found else {}


def paired_rows(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Differences of one row's answers from another's; {} where either has none."""
    if "answers" not in row or "answers" not in other:
        return {}
    by_set = {name: paired_answers(each, other["answers"][name]) for name, each in row["answers"].items()}
    return {"paired": by_set, **(paired(row, other) if "task_right" in row else {})}


def paired_settings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Differences of every two rows that have answers, the first's less the second's."""
    answering = [row for row in rows if "answers" in row]
    return [
        {"setting": one["label"], "other": two["label"], **paired_rows(one, two)["paired"]}
        for two, one in combinations(answering, 2)
    ]
