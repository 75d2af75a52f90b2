"""What a user needs of a finished calibration: how to serve the outcome, what fits, and what to expect."""

import shlex
from collections import Counter
from collections.abc import Iterable

from kvtuner_tools.calibration.options import recent_bytes
from kvtuner_tools.calibration.outcome import REPORT_FILE, Scored, bits_text
from kvtuner_tools.calibration.report_inputs import ReportInputs
from kvtuner_tools.calibration.space import bf16_bytes
from kvtuner_tools.profile_commands import tokens_that_fit
from vllm_kvtuner.pages.layout import content_bytes
from vllm_kvtuner.profile.profile import TransformSettings

REQUEST_TOKENS = 8192
"""Tokens of a request that the window's share is told of, where no other is known."""
FEW_TOKENS = 4096
"""Scores on fewer are told to be uncertain."""
_GIB = 1 << 30


def summarize(inputs: ReportInputs) -> list[tuple[str, str]]:
    """Names and texts, the verdict first and the command to serve last."""
    verdict = inputs.verdict
    serve = verdict.serve
    rows = [("verdict", verdict.text), ("fits", _capacity(inputs, serve)), ("expect", _expectation(serve))]
    if serve.quality.num_tokens < FEW_TOKENS:
        rows.append(("few tokens", f"The scores rest on {serve.quality.num_tokens:,} tokens: take them as a hint."))
    path = shlex.quote(str(inputs.out / verdict.file))
    model = shlex.quote(inputs.options.model)
    rows += [
        ("transforms", count_transforms(inputs.table.layers[index].transforms for index in _quantized(inputs, serve))),
        ("report", str(inputs.out / REPORT_FILE)),
        ("your task", f"kvtuner evaluate {model} --profile {path} --data FILE --tasks FILE"),
        ("serve", f"vllm serve {model} --kv-cache-dtype kvtuner --kvtuner-profile {path}"),
    ]
    return rows


def count_transforms(settings: Iterable[TransformSettings]) -> str:
    """How many layers have each transform that any has."""
    counts = Counter(name for each in settings for name in each.names)
    return ", ".join(f"{name} in {count} layers" for name, count in counts.items()) or "none"


def _quantized(inputs: ReportInputs, serve: Scored) -> list[int]:
    """Places of the quantized layers in the table."""
    return [place for place, layer in enumerate(inputs.table.layers) if serve.pairs[layer.index].is_quantized]


def _capacity(inputs: ReportInputs, serve: Scored) -> str:
    shapes, options = inputs.shapes, inputs.options
    per_token = sum(heads * content_bytes(serve.pairs[layer], size) for layer, (heads, size) in shapes.items())
    bf16 = bf16_bytes(shapes)
    memory = options.memory or _GIB
    where = "in the memory asked for" if options.memory else "per GiB of KV cache"
    fit, bf16_fit = tokens_that_fit(memory, per_token), tokens_that_fit(memory, bf16)
    text = f"{bf16 / per_token:.2f} times bf16's tokens, at {bits_text(serve)}: {fit:,} {where} (bf16: {bf16_fit:,})"
    if options.recent is None:
        return text
    tokens = options.context or REQUEST_TOKENS
    share = recent_bytes(options, shapes) / (tokens * per_token)
    return f"{text}; the recent window of {options.recent} adds {share:.1%} to a request of {tokens:,} tokens"


def _expectation(serve: Scored) -> str:
    quality = serve.quality
    return (
        f"KL {quality.kl_mean:.5f} ± {quality.kl_stderr:.5f} nats a token on held-out text, which is how far the next "
        f"token's distribution is from that with an unquantized cache (0: not at all); the most likely token is the "
        f"same at {quality.top1_agreement:.1%} of positions; perplexity {quality.perplexity:.3f}, unquantized "
        f"{quality.perplexity_reference:.3f}"
    )
