"""Tables of what a user of the 1.5B model sees, by setting: loss, answers, needles and quotes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .published import Published, accuracy, fixed, only, table

SERVED, FEEDBACK = "evaluate_served_h200", "evaluate_feedback_h200"
PROFILE = "qwen25_coder_1.5b_feedback"
BITS = ("2.25", "2.50", "3.00", "3.50", "4.25")
"""Stored bits of the profiles that are shipped for it."""
PROFILES = {f"`{PROFILE}_{bits}bit`": f"kvtuner:{PROFILE}_{bits}bit" for bits in BITS}
NO_DATA = {f"`{pair}`, no calibration": f"kvtuner:{pair}" for pair in ("K8V8", "K4V4", "K4V2")}
OWN = {"fp8, as vLLM gives it": "fp8", "int4_per_token_head": "int4_per_token_head"}
INT4_BITS = "4.25"
"""Stored bits of int4_per_token_head at heads of 128, which its result does not say."""

Score = Mapping[str, Any]


def _evaluations(published: Published, *names: str) -> list[dict[str, Any]]:
    """Evaluations of the model by name, of both files."""
    every = [each for file in (SERVED, FEEDBACK) for each in published.result(file)["evaluations"]]
    return [only(each for each in every if each["name"] == name) for name in names]


def _score(evaluations: Iterable[Mapping[str, Any]], label: str) -> Score | None:
    """The first score of a setting, None where it was not measured."""
    found = (setting for each in evaluations for setting in each["settings"] if setting["label"] == label)
    return next(found, None)


def _kl(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    mean = score["kl_mean"]
    digits = 5 if mean < 0.01 else 4 if mean < 0.1 else 3
    return f"{fixed(mean, digits)} ± {fixed(score['kl_stderr'], digits)}"


def _difference(difference: float, stderr: float) -> str:
    return f"{'+' if difference > 0 else ''}{fixed(difference, 3)} ± {fixed(stderr, 3)}"


def _bits(*scores: Score | None) -> str:
    known = next((score["stored_bits"] for score in scores if score and score.get("stored_bits") is not None), None)
    return INT4_BITS if known is None else fixed(known, 2)


def loss_and_answers(published: Published, page: Path) -> str:
    """KL at two lengths, and GSM8K with its paired difference and the KL along its answers."""
    short = _evaluations(published, "1.5B, contexts of 1,024", "contexts of 1,024", "1.5B, without data")
    long = _evaluations(published, "1.5B, contexts of 8,192", "contexts of 8,192")
    answers = _evaluations(published, "answers", "answers, searched")
    rows = [["bf16", "16", "0", "0", accuracy(answers[0]["reference"]), "-", "0"]]
    for name, label in (OWN | NO_DATA | PROFILES).items():
        near, far, task = (_score(each, label) for each in (short, long, answers))
        scored = ["-", "-", "-"]
        if task is not None:
            difference = _difference(task["task_difference"], task["task_difference_stderr"])
            scored = [accuracy(task), difference, _kl(task["along"]["task"])]
        rows.append([name, _bits(near, task), _kl(near), _kl(far), *scored])
    heads = ["cache", "stored bits", "KL, contexts of 1,024", "of 8,192"]
    heads += ["GSM8K", "to bf16, paired", "KL along answers"]
    return table(heads, rows) + "\n\n" + published.source(page, SERVED, FEEDBACK)


def needles_and_quotes(published: Published, page: Path) -> str:
    """Facts found by length of the text, and words of quotes that are right."""
    (evaluation,) = _evaluations(published, "needles and quotes")
    lengths = evaluation["questions"]["needles"]["lengths"]
    rows = []
    for name, label in ({"bf16": None} | OWN | NO_DATA | PROFILES).items():
        score = evaluation["reference"] if label is None else _score([evaluation], label)
        if score is None:
            continue
        needles, quotes = (score["answers"][kind] for kind in ("needles", "quotes"))
        differences = ["-", "-"]
        if label is not None:
            paired = (score["paired"][kind] for kind in ("needles", "quotes"))
            differences = [_difference(each["difference"], each["difference_stderr"]) for each in paired]
        found = [fixed(needles["groups"][f"{length} tokens"]["score"], 3) for length in lengths]
        rows.append([name, _bits(score), *found, differences[0], fixed(quotes["score"], 3), differences[1]])
    heads = ["cache", "stored bits", *(f"{length:,} tokens" for length in lengths)]
    heads += ["to bf16, paired", "words of quotes", "to bf16, paired"]
    return table(heads, rows) + "\n\n" + published.source(page, SERVED)


BLOCKS = {"served-1.5b": loss_and_answers, "needles-1.5b": needles_and_quotes}
"""Blocks by name."""
