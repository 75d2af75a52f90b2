"""Figures that prose quotes, by name: each is computed from the data and written as the prose has it."""

from collections.abc import Callable

from .published import AUTO, FP8, KVTUNER, Published, fixed, loss, only
from .served import PROFILE, SERVED

Claim = Callable[[Published], str]
_IMPLEMENTATIONS = {"bf16": "fa3_bf16", "fp8": "fa3_fp8", "int4": "int4_per_token_head"}


def _step(other: str) -> Claim:
    """How many times as long the other cache's step takes, 64 requests of 8,192 tokens."""

    def claim(published: Published) -> str:
        times = [published.point("serve_steps_h200", label, 64, 8192)["decode_ms"] for label in (other, KVTUNER)]
        return fixed(times[0] / times[1], 1)

    return claim


def _loop(other: str, key: str, prompt: int = 4096) -> Claim:
    """How many times the other cache's figure of the closed loop ours is."""
    name = "serve_contexts_h200" if prompt == 16384 else "serve_throughput_h200"

    def claim(published: Published) -> str:
        own, theirs = (published.throughput(name, label, prompt)[key] for label in (KVTUNER, other))
        return fixed(own / theirs, 1)

    return claim


def _loss_of_prompts(label: str) -> Claim:
    """Percent of decoding's rate that is lost with cached prompts."""

    def claim(published: Published) -> str:
        loop = published.throughput("serve_throughput_h200", label)
        return fixed(100 * (1 - loop["repeat_tok_s"] / loop["decode_tok_s"]))

    return claim


def _fit(other: str) -> Claim:
    """How many times as many KV tokens fit as in the other cache."""

    def claim(published: Published) -> str:
        own, theirs = (published.setting("serve_steps_h200", label)["kv_tokens"] for label in (KVTUNER, other))
        return fixed(own / theirs, 1)

    return claim


def _kernel_us(form: str) -> Claim:
    """Microseconds of decode attention at 64 x 8192."""

    def claim(published: Published) -> str:
        implementation = _IMPLEMENTATIONS.get(form, "cuda")
        case = published.kernel("kernel_h200", implementation=implementation, format=form, point="64x8192")
        return fixed(case["us"])

    return claim


def _kernel(form: str, other: str, part: str = "decode") -> Claim:
    """How many times as long the other format's attention takes at 64 x 8192."""
    name = "kernel_h200" if part == "decode" else "kernel_layer_h200"

    def claim(published: Published) -> str:
        keys = dict(part=part, point="64x8192")
        theirs = published.kernel(name, implementation=_IMPLEMENTATIONS[other], format=other, **keys)["us"]
        return fixed(theirs / published.kernel(name, format=form, **keys)["us"], 1)

    return claim


def _window_step(context: int) -> Claim:
    """Percent by which a recent window lengthens a step of 64 requests."""

    def claim(published: Published) -> str:
        labels = (KVTUNER, f"{KVTUNER} with recent_window 64")
        plain, window = (published.point("serve_window_h200", label, 64, context)["decode_ms"] for label in labels)
        return fixed(100 * (window / plain - 1), 1)

    return claim


def _window_tokens(published: Published) -> str:
    """Percent fewer KV tokens with a recent window."""
    labels = (KVTUNER, f"{KVTUNER} with recent_window 64")
    plain, window = (published.setting("serve_window_h200", label)["kv_tokens"] for label in labels)
    return fixed(100 * (1 - window / plain), 1)


def _offset(form: str, kind: str) -> Claim:
    """Percent by which a key offset lengthens attention at 64 x 8192, against rotations alone."""

    def claim(published: Published) -> str:
        plain, offset = (
            published.kernel("kernel_transforms_h200", format=form, point="64x8192", transforms=name)["us"]
            for name in ("hadamard", kind)
        )
        return fixed(100 * (offset / plain - 1))

    return claim


def _prefill_rate(per: int) -> Claim:
    """Prompt tokens a second that an engine prefills, of 64 prompts of 8,192, over ``per``; to the nearest hundred."""

    def claim(published: Published) -> str:
        seconds = published.point("serve_steps_h200", KVTUNER, 64, 8192)["prefill_s"]
        return f"{round(64 * 8192 / seconds / per, -2):,.0f}"

    return claim


def _noise(model: str) -> Claim:
    """KL between two bf16 engines."""
    return lambda published: loss(published.score(model, "vllm fp8", "(noise floor)")["kl_mean"])


def _gsm8k(key: str, label: str | None = None) -> Claim:
    """Accuracy of Qwen2.5-Coder-1.5B on GSM8K, or its standard error, by a setting's label; bf16's without one."""

    def claim(published: Published) -> str:
        evaluations = [each for each in published.result(SERVED)["evaluations"] if "task_accuracy" in each["reference"]]
        settings = (setting for each in evaluations for setting in each["settings"] if setting["label"] == label)
        return fixed((only(settings) if label else evaluations[0]["reference"])[key], 3)

    return claim


CLAIMS: dict[str, Claim] = {
    "decode-vs-fp8": _step(FP8),
    "decode-vs-auto": _step(AUTO),
    "fit-vs-fp8": _fit(FP8),
    "fit-vs-auto": _fit(AUTO),
    "new-vs-fp8": _loop(FP8, "output_tok_s"),
    "new-vs-auto": _loop(AUTO, "output_tok_s"),
    "cached-vs-fp8": _loop(FP8, "repeat_tok_s"),
    "cached-vs-auto": _loop(AUTO, "repeat_tok_s"),
    "cached-16k-vs-fp8": _loop(FP8, "repeat_tok_s", 16384),
    "cached-loss": _loss_of_prompts(KVTUNER),
    "cached-loss-fp8": _loss_of_prompts(FP8),
    "prefill-rate": _prefill_rate(1),
    "prefill-bound": _prefill_rate(8),
    "kernel-k8v8-us": _kernel_us("K8V8"),
    "kernel-k2v2-us": _kernel_us("K2V2"),
    "kernel-fp8-us": _kernel_us("fp8"),
    "kernel-int4-us": _kernel_us("int4"),
    "kernel-k8v8-vs-auto": _kernel("K8V8", "bf16"),
    "kernel-k4v4-vs-auto": _kernel("K4V4", "bf16"),
    "kernel-k4v4-vs-fp8": _kernel("K4V4", "fp8"),
    "layer-k8v8-vs-auto": _kernel("K8V8", "bf16", "layer"),
    "layer-k4v4-vs-auto": _kernel("K4V4", "bf16", "layer"),
    "layer-k4v4-vs-fp8": _kernel("K4V4", "fp8", "layer"),
    "window-step-1k": _window_step(1024),
    "window-step-8k": _window_step(8192),
    "window-tokens": _window_tokens,
    "offset-8-k2v2": _offset("K2V2", "offset"),
    "offset-64-k8v8": _offset("K8V8", "all"),
    "offset-64-k2v2": _offset("K2V2", "all"),
    "noise-1.5b": _noise("qwen25_coder_1.5b"),
    "noise-0.5b": _noise("qwen25_coder_0.5b"),
    "gsm8k-bf16": _gsm8k("task_accuracy"),
    "gsm8k-stderr": _gsm8k("task_stderr"),
    "gsm8k-k4v4": _gsm8k("task_accuracy", "kvtuner:K4V4"),
    "gsm8k-2.50": _gsm8k("task_accuracy", f"kvtuner:{PROFILE}_2.50bit"),
}
"""Claims by name. Each gives the bare number."""
