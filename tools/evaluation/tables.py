"""What ``kvtuner evaluate`` prints: a table of each thing that was measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvtuner_tools.results import format_table
from kvtuner_tools.simulation.rows import STATED_TOKENS

TEXT_COLUMNS = {
    "KL mean": "kl_mean:.5f",
    "± stderr": "kl_stderr:.5f",
    "KL p99": "kl_p99:.4f",
    "top-1": "top1_agreement:.4f",
    "perplexity": "perplexity:.3f",
}
SIMULATION_COLUMNS = {f"bits at {STATED_TOKENS:,}": f"stored_bits_{STATED_TOKENS}:.2f"}
"""Beside simulated caches: stored bits of a request of so many tokens, those that are kept exactly included."""
TASK_COLUMNS = {
    "accuracy": "task_accuracy:.3f",
    "± stderr ": "task_stderr:.3f",
    "to auto": "task_difference:+.3f",
    "± paired": "task_difference_stderr:.3f",
    "finished": "task_finished:,",
    "tokens": "task_tokens_mean:.0f",
}
ALONG_COLUMNS = {
    "KL mean": "kl_mean:.5f",
    "± stderr": "kl_stderr:.5f",
    "first quarter": "first_quarter:.5f",
    "last quarter": "last_quarter:.5f",
}
LENGTH_COLUMNS = {
    "ended": "ended:.3f",
    "tokens": "tokens_mean:.0f",
    "x auto": "tokens_ratio:.3f",
    "± paired ": "tokens_ratio_stderr:.3f",
}
SCORE_NAMES = {"generate": "accuracy", "task": "accuracy", "needles": "found", "quotes": "words right"}
"""What the score of a set is called."""


def table(evaluation: dict[str, Any]) -> str:
    """``auto`` and the evaluation's settings as a Markdown table: text, a file of questions, lm-eval's tasks."""
    columns = {"setting": "label:", "nominal bits": "nominal_bits:.2f", "stored bits": "stored_bits:.2f"}
    if evaluation.get("data") is not None or "kl_mean" in evaluation["reference"]:
        columns |= TEXT_COLUMNS
    columns |= {"KV tokens": "kv_tokens:,", "x auto": "kv_tokens_ratio:.3f"}
    rows = [{**evaluation["reference"], "kv_tokens_ratio": 1.0}, *map(dict, evaluation["settings"])]
    if evaluation["task"] is not None:
        columns |= TASK_COLUMNS
    for task, metrics in evaluation["reference"].get("lm_eval", {}).items():
        for metric in metrics:
            columns |= {f"{task} {metric}": f"{task}/{metric}:.3f", f"± {task} {metric}": f"{task}/{metric}/stderr:.3f"}
    if "simulation" in evaluation:
        columns |= SIMULATION_COLUMNS
    for row in rows:
        row |= {f"stored_bits_{tokens}": bits for tokens, bits in row.get("stored_bits_at", {}).items()}
        for task, metrics in row.get("lm_eval", {}).items():
            for metric, (value, stderr) in metrics.items():
                row |= {f"{task}/{metric}": value, f"{task}/{metric}/stderr": stderr}
    return format_table(columns, rows)


def text(evaluation: dict[str, Any]) -> str:
    """All of it, each table under a line that says what it is of."""
    title = f"{evaluation['model']} ({evaluation['dtype']})"
    if evaluation["data"] is not None:
        of = f"{evaluation['predicted_tokens']} tokens of {evaluation['data']['file']}"
        title += f", {of}, KL against auto in nats per token"
    lines = [title]
    if task := evaluation["task"]:
        lines.append(f"Accuracy on {task['questions']} questions of {task['file']}, {task['shots']} worked examples")
    lines.append(table(evaluation))
    for name, about in evaluation["questions"].items():
        if name != "task" or "along" in evaluation["reference"]:
            lines += ["", _title(name, about, evaluation["sampling"]), _answers_table(name, evaluation)]
    return "\n".join(lines)


def _title(name: str, about: Mapping[str, Any], sampling: Mapping[str, float]) -> str:
    """What a set of questions is."""
    count = about["questions"]
    if name == "needles":
        lengths = ", ".join(f"{length:,}" for length in about["lengths"])
        facts = f"{len(about['depths'])} facts of one form in each text, one asked"
        return f"Needles: {count} questions, prompts of {lengths} tokens, {facts}; seed {about['seed']}"
    if name == "quotes":
        return f"Quotes: {count} sentences to repeat from {about['distance']} words back; seed {about['seed']}"
    temperature = sampling["temperature"]
    how = f"temperature {temperature:g}" if temperature else "greedy"
    graded = f"{about['graded']} with a right answer"
    file = "bundled questions" if about["file"] == "bundled" else f"questions of {about['file']}"
    return f"Generation: {count} {file}, {graded}; {how}, at most {about['max_tokens']} tokens; KL along auto's answers"


def _answers_table(name: str, evaluation: Mapping[str, Any]) -> str:
    rows = [_answers_row(name, row) for row in (evaluation["reference"], *evaluation["settings"])]
    columns = {"setting": "label:", "stored bits": "stored_bits:.2f"}
    if any("kl_mean" in row for row in rows):
        columns |= ALONG_COLUMNS
    if evaluation["questions"][name]["graded"]:
        columns |= {
            SCORE_NAMES[name]: "score:.3f",
            "±": "stderr:.3f",
            "to auto": "difference:+.3f",
            "± paired": "difference_stderr:.3f",
        }
        if name == "quotes":
            columns |= {"all right": "exact:.3f"}
        columns |= {group: f"group {group}:.3f" for group in _groups(rows)}
    if name != "needles":
        columns |= LENGTH_COLUMNS
    return format_table(columns, rows)


def _answers_row(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """One setting's answers to a set, flat."""
    flat = {"label": row["label"], "stored_bits": row["stored_bits"]}
    for part in ("answers", "along", "paired"):
        flat |= row.get(part, {}).get(name, {})
    if flat.get("kl_quarters"):
        flat |= {"first_quarter": flat["kl_quarters"][0], "last_quarter": flat["kl_quarters"][-1]}
    flat |= {f"group {group}": scores["score"] for group, scores in flat.get("groups", {}).items()}
    return flat


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(group for row in rows for group in row.get("groups", {})))
