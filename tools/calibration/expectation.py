"""What a user may expect of the profile to serve: its KL, and what was measured of its answers and its speed.

Answers are measured by ``kvtuner evaluate``, whose result in the output folder a report takes; what nobody measured is
called so.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtuner_tools.bench import step_times
from kvtuner_tools.cache_setting import KVTUNER, CacheSetting, profile_sha256
from kvtuner_tools.calibration.artifacts import read_artifact
from kvtuner_tools.calibration.outcome import Scored
from kvtuner_tools.calibration.report_inputs import ReportInputs
from kvtuner_tools.evaluation.request import SCHEMA

EVALUATION_FILE = "evaluation.json"
"""Where a report looks for the result of ``kvtuner evaluate``."""
NOT_MEASURED = "not measured"
_SETS = {"accuracy": ("task", "generate"), "needles": ("needles",), "quotes": ("quotes",)}
"""Names of rows, and the sets of questions that they are of, the first that was measured."""


def expectation(inputs: ReportInputs) -> list[tuple[str, str]]:
    """Names and texts: quality on text, by kind, of answers, of long contexts, and speed."""
    verdict = inputs.verdict
    found, why = _evaluation(inputs.out, inputs.out / verdict.file)
    rows = [("expect", _on_text(verdict.serve)), ("by text", _by_kind(inputs, verdict.serve))]
    rows += [(name, _answers(name, sets, found) or why) for name, sets in _SETS.items()]
    rows += [("step time", _step_time(inputs, verdict.serve))]
    if any(text.startswith(NOT_MEASURED) for name, text in rows if name in _SETS):
        rows.append(("to measure", measuring_command(inputs)))
    return [(name, text) for name, text in rows if text]


def measuring_command(inputs: ReportInputs) -> str:
    """The commands that fill in what is not measured."""
    model = shlex.quote(inputs.options.model)
    profile, result = (shlex.quote(str(inputs.out / name)) for name in (inputs.verdict.file, EVALUATION_FILE))
    measures = "--generate --needles 4096 --quotes"
    return (
        f"kvtuner evaluate {model} --profile {profile} {measures} --out {result} && "
        f"kvtuner report {shlex.quote(str(inputs.out))}"
    )


def _on_text(serve: Scored) -> str:
    quality = serve.quality
    return (
        f"KL {quality.kl_mean:.5f} ± {quality.kl_stderr:.5f} nats a token on held-out text, which is how far the next "
        f"token's distribution is from that with an unquantized cache (0: not at all); the most likely token is the "
        f"same at {quality.top1_agreement:.1%} of positions; perplexity {quality.perplexity:.3f}, unquantized "
        f"{quality.perplexity_reference:.3f}"
    )


def _by_kind(inputs: ReportInputs, serve: Scored) -> str:
    kinds = inputs.heldout.kinds.get(serve.origin, {})
    return "; ".join(
        f"{kind} {each['kl_mean']:.5f} ± {each['kl_stderr']:.5f} on {each['tokens']:,} tokens"
        for kind, each in kinds.items()
    )


def _evaluation(out: Path, profile: Path) -> tuple[dict[str, Any] | None, str]:
    """The result in the folder, its row of the profile under ``row``; or None, and why there is none."""
    path = out / EVALUATION_FILE
    if not path.exists():
        return None, NOT_MEASURED
    try:
        result = read_artifact(path, SCHEMA, ("reference", "settings", "questions"))
    except ValueError as error:
        return None, f"{NOT_MEASURED}: {error}"
    digest = profile_sha256(CacheSetting(KVTUNER, str(profile)))
    row = next((each for each in result["settings"] if each["profile_sha256"] == digest), None)
    if row is None:
        return None, f"{NOT_MEASURED}: {EVALUATION_FILE} is of other profiles than {profile.name} as it is now"
    return {**result, "row": row}, NOT_MEASURED


def _answers(name: str, sets: tuple[str, ...], result: Mapping[str, Any] | None) -> str | None:
    """Scores of a set of questions, beside the unquantized cache's; None where it was not asked."""
    measured = [] if result is None else [each for each in sets if each in result["row"].get("answers", {})]
    if result is None or not measured:
        return None
    ours, theirs = (row["answers"][measured[0]] for row in (result["row"], result["reference"]))
    pair, about = result["row"]["paired"][measured[0]], result["questions"][measured[0]]
    if not ours["graded"]:
        return None
    text = (
        f"{ours['score']:.3f} on {ours['graded']} questions, unquantized {theirs['score']:.3f}; the difference on the "
        f"same questions is {pair['difference']:+.3f} ± {pair['difference_stderr']:.3f}"
    )
    if name == "accuracy":
        file = "bundled" if about["file"] == "bundled" else about["file"]
        ratio = f"{pair['tokens_ratio']:.2f} ± {pair['tokens_ratio_stderr']:.2f} times the unquantized ones' tokens"
        return f"{text} ({file}); its answers have {ratio}, and {ours['ended']:.1%} end ({theirs['ended']:.1%})"
    if name == "needles":
        return f"{text} (prompts of {', '.join(f'{length:,}' for length in about['lengths'])} tokens)"
    return f"{text} (share of words, {about['distance']} words back)"


def _step_time(inputs: ReportInputs, serve: Scored) -> str:
    measured = step_times.find(inputs.device, step_times.group(inputs.shapes.values()))
    text = None if measured is None else measured.text_for(serve.stored_bits)
    return text or f"{NOT_MEASURED} for such layers at these bits on this device ({inputs.device})"
