"""Tables of kernels and engines."""

from pathlib import Path

from .published import AUTO, FP8, KVTUNER, Published, fixed, table

POINTS = ("64x8192", "8x32000", "1x131072", "mixed:64:256-16128")
PAIRS = ("K8V8", "K8V4", "K8V2", "K4V8", "K4V4", "K4V2", "K2V8", "K2V4", "K2V2")
FEW_PAIRS = ("K8V8", "K4V4", "K4V2", "K2V2")
NAMES = {AUTO: "auto (bf16)", FP8: "fp8", KVTUNER: "kvtuner, llama31_3.25bit"}
SHAPES = ("8/8/64", "9/3/64", "28/4/128", "32/4/128", "16/2/256")


def point_name(point: str) -> str:
    """A decode point in words."""
    if point.startswith("mixed:"):
        _, requests, lengths = point.split(":")
        low, high = lengths.split("-")
        return f"{requests} of {int(low):,} to {int(high):,}"
    return point.replace("x", " x ")


def readme(published: Published, page: Path) -> str:
    """The README's one table: bits, capacity, a step's time and throughput of three caches."""
    rows = []
    for label, name in NAMES.items():
        setting = published.setting("serve_steps_h200", label)
        loop = published.throughput("serve_throughput_h200", label)
        rows.append([
            name,
            f"{setting['nominal_bits']:g} / {setting['stored_bits']:g}",
            fixed(setting["kv_tokens"]),
            fixed(published.point("serve_steps_h200", label, 64, 8192)["decode_ms"], 2),
            fixed(loop["output_tok_s"]),
            fixed(loop["repeat_tok_s"]),
        ])  # fmt: skip
    heads = [
        "`--kv-cache-dtype`", "bits, nominal / stored", "KV tokens that fit", "step of 64 x 8,192, ms",
        "tokens/s, new prompts", "tokens/s, cached prompts",
    ]  # fmt: skip
    return table(heads, rows)


def steps(published: Published, page: Path) -> str:
    """Capacity, step times and prefill of whole engines."""
    auto = published.setting("serve_steps_h200", AUTO)["kv_tokens"]
    rows = []
    for label, name in NAMES.items():
        setting = published.setting("serve_steps_h200", label)
        short, long = (published.point("serve_steps_h200", label, 64, context) for context in (1024, 8192))
        rows.append([
            name,
            f"{setting['nominal_bits']:g} / {setting['stored_bits']:g}",
            fixed(setting["kv_tokens"]),
            fixed(setting["kv_tokens"] / auto, 2),
            fixed(short["decode_ms"], 2),
            fixed(long["decode_ms"], 2),
            fixed(long["prefill_s"], 2),
        ])  # fmt: skip
    heads = [
        "setting", "bits, nominal / stored", "KV tokens", "times auto's", "step, 64 x 1024, ms", "64 x 8192, ms",
        "prefill, 64 x 8192, s",
    ]  # fmt: skip
    return table(heads, rows) + "\n\n" + published.source(page, "serve_steps_h200")


def throughput(published: Published, page: Path) -> str:
    """The closed loop at full memory."""
    rows = []
    for label, name in NAMES.items():
        loop = published.throughput("serve_throughput_h200", label)
        rows.append([
            name,
            fixed(loop["concurrency"]),
            fixed(loop["output_tok_s"]),
            fixed(loop["repeat_tok_s"]),
            fixed(loop["decode_tok_s"]),
            fixed(loop["decode_ms"], 2),
        ])  # fmt: skip
    for other in (FP8, AUTO):
        ratios = [
            fixed(
                published.throughput("serve_throughput_h200", KVTUNER)[key]
                / published.throughput("serve_throughput_h200", other)[key],
                2,
            )
            for key in ("concurrency", "output_tok_s", "repeat_tok_s", "decode_tok_s")
        ]
        rows.append([f"kvtuner, times {other}'s", *ratios, ""])
    heads = ["setting", "requests", "new prompts", "cached prompts", "while all decode", "ms of a step then"]
    return table(heads, rows) + "\n\n" + published.source(page, "serve_throughput_h200")


def contexts(published: Published, page: Path) -> str:
    """The closed loop by prompt length, each length from the newest run that has it."""
    rows = []
    for prompt, name in ((1024, "serve_steps_h200"), (4096, "serve_throughput_h200"), (16384, "serve_contexts_h200")):
        for label, setting in NAMES.items():
            loop = published.throughput(name, label, prompt)
            requests = fixed(loop["concurrency"])
            if loop["fitting"] > loop["concurrency"]:
                requests += f" (of {fixed(loop['fitting'])} that fit)"
            rows.append([
                f"{fixed(prompt)} + {loop['output']}",
                setting,
                requests,
                fixed(loop["output_tok_s"]),
                fixed(loop["repeat_tok_s"]),
            ])  # fmt: skip
    heads = ["prompt + output tokens", "setting", "requests", "new prompts, tokens/s", "cached prompts, tokens/s"]
    names = ("serve_steps_h200", "serve_throughput_h200", "serve_contexts_h200")
    return table(heads, rows) + "\n\n" + published.source(page, *names)


def window_cost(published: Published, page: Path) -> str:
    """What a recent window takes of capacity and time."""
    plain, window = KVTUNER, f"{KVTUNER} with recent_window 64"
    rows = []
    for label, name in ((plain, "llama31_3.25bit"), (window, "with a window of 64 tokens in 16 bits")):
        setting = published.setting("serve_window_h200", label)
        times = [published.point("serve_window_h200", label, 64, context)["decode_ms"] for context in (1024, 8192)]
        rows.append([name, fixed(setting["kv_tokens"]), *(fixed(value, 2) for value in times)])
    heads = ["setting", "KV tokens", "step, 64 x 1024, ms", "64 x 8192, ms"]
    return table(heads, rows) + "\n\n" + published.source(page, "serve_window_h200")


def kernel(published: Published, page: Path) -> str:
    """Every implementation's decode attention: time, bandwidth and error."""
    cases = [("fa3_bf16", "bf16", "FlashAttention 3"), ("fa3_fp8", "fp8", "FlashAttention 3"),
             ("int4_per_token_head", "int4", "vLLM, int4_per_token_head")]  # fmt: skip
    cases += [(name, pair, name) for name in ("cuda", "triton") for pair in PAIRS]
    rows = []
    for implementation, form, name in cases:
        entries = [
            published.kernel("kernel_h200", implementation=implementation, format=form, point=point) for point in POINTS
        ]
        errors = entries[0]["relative_errors"]
        rows.append([
            f"{name}, {form}",
            f"{entries[0]['stored_bits']:g}",
            *(f"{fixed(entry['us'], 1)} ({fixed(100 * entry['fraction_given'], 1)})" for entry in entries),
            " / ".join(fixed(1e3 * errors[key], 1) for key in ("random", "nearly_uniform", "large_keys")),
        ])  # fmt: skip
    heads = ["kernel", "stored bits", *map(point_name, POINTS), "errors, 1e-3"]
    return table(heads, rows) + "\n\n" + published.source(page, "kernel_h200")


def layer(published: Published, page: Path) -> str:
    """Decode attention alone and after the store of the new tokens."""
    cases = [(f"fa3_{form}", form, "none", f"FlashAttention 3, {form}") for form in ("bf16", "fp8")]
    cases += [("cuda", pair, "none", pair) for pair in FEW_PAIRS]
    cases += [("cuda", pair, "offset", f"{pair}, rotations and an offset of 8 pairs") for pair in FEW_PAIRS]
    rows = []
    for implementation, form, transforms, name in cases:
        row = [name]
        for point in ("64x8192", "mixed:64:256-16128"):
            for part in ("decode", "layer"):
                entry = published.kernel(
                    "kernel_layer_h200", part, implementation=implementation, format=form, transforms=transforms,
                    point=point,
                )  # fmt: skip
                row.append(f"{fixed(entry['us'], 1)} ({fixed(100 * entry['fraction_given'], 1)})")
        rows.append(row)
    heads = ["kernel", "64 x 8192, decode alone", "store and decode", "mixed lengths, decode alone", "store and decode"]
    return table(heads, rows) + "\n\n" + published.source(page, "kernel_layer_h200")


def transforms(published: Published, page: Path) -> str:
    """Bandwidth with none to all transforms."""
    rows = []
    for point in ("64x8192", "8x32000", "1x131072"):
        for pair in FEW_PAIRS:
            shares = [
                published.kernel("kernel_transforms_h200", format=pair, point=point, transforms=name)["fraction_given"]
                for name in ("none", "hadamard", "offset", "all")
            ]
            rows.append([point_name(point), pair, *(fixed(100 * share, 1) for share in shares)])
    heads = ["point", "pair", "none", "rotations", "and an offset of 8 pairs", "all, an offset of 64 pairs"]
    return table(heads, rows) + "\n\n" + published.source(page, "kernel_transforms_h200")


def _shapes(published: Published, page: Path, point: str) -> str:
    rows = []
    for shape in SHAPES:
        row = [shape.replace("/", " / ")]
        for implementation, form in (("fa3_bf16", "bf16"), ("fa3_fp8", "fp8"), *(("cuda", pair) for pair in FEW_PAIRS)):
            shares = [
                100 * published.kernel(
                    "kernel_shapes_h200", implementation=implementation, format=form, shape=shape, point=point,
                    block_size=block_size,
                )["fraction_given"]
                for block_size in (16, 128)
            ]  # fmt: skip
            row.append(" / ".join(fixed(share, 1) for share in shares))
        rows.append(row)
    heads = ["query / KV heads / head size", "FA3 bf16", "FA3 fp8", *FEW_PAIRS]
    return table(heads, rows) + "\n\n" + published.source(page, "kernel_shapes_h200")


def shapes_many(published: Published, page: Path) -> str:
    """Bandwidth of other models' layers with many requests."""
    return _shapes(published, page, "64x8192")


def shapes_one(published: Published, page: Path) -> str:
    """Bandwidth of other models' layers with one long request."""
    return _shapes(published, page, "1x131072")


def store(published: Published, page: Path) -> str:
    """Times of store and gather, without transforms and with."""
    rows = []
    for name, form in (("reshape_and_cache_flash auto", "bf16"), ("reshape_and_cache_flash fp8", "fp8")):
        times = [
            published.kernel("kernel_h200", "store", implementation=name, format=form, tokens=tokens)["us"]
            for tokens in (64, 16384)
        ]
        rows.append([f"vLLM, {form}", "none", *(fixed(value, 1) for value in times), ""])
    words = {"none": "none", "hadamard": "rotations", "offset": "and an offset of 8 pairs", "all": "all"}
    for implementation in ("cuda", "triton"):
        for pair in ("K8V8", "K4V4", "K2V2"):
            for kind, word in words.items():
                # The newest run has no transforms.
                file = "kernel_h200" if kind == "none" else "kernel_store_gather_h200"
                keys = dict(implementation=implementation, format=pair, transforms=kind)
                times = [published.kernel(file, "store", tokens=tokens, **keys)["us"] for tokens in (64, 16384)]
                times.append(published.kernel(file, "gather", tokens=32768, **keys)["us"])
                rows.append([f"{implementation}, {pair}", word, *(fixed(value, 1) for value in times)])
    heads = ["kernel", "transforms", "store, 64 tokens, us", "16,384 tokens, us", "gather, 32,768 tokens, us"]
    return table(heads, rows) + "\n\n" + published.source(page, "kernel_h200", "kernel_store_gather_h200")


BLOCKS = {
    "readme": readme,
    "steps": steps,
    "throughput": throughput,
    "contexts": contexts,
    "window-cost": window_cost,
    "kernel": kernel,
    "layer": layer,
    "transforms": transforms,
    "shapes-many": shapes_many,
    "shapes-one": shapes_one,
    "store": store,
}
"""Blocks by name."""
