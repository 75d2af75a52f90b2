"""``kvtuner profile show|check|resolve|list|upload|download``: what a profile stores, whether it is right, what auto
means for a model, which ones are shipped, and profiles on the hub."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvtuner_tools.arguments import parse_memory, set_example
from kvtuner_tools.model_files import ModelSource, load_model_shape
from kvtuner_tools.profile_sharing import download, upload
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PrecisionPair
from vllm_kvtuner.profile.auto import is_auto, resolve_auto
from vllm_kvtuner.profile.load import AUTO, load_profile, shipped_profiles
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError, format_layers
from vllm_kvtuner.profile.profile import (
    FROM_WEIGHTS,
    WEIGHT_TRANSFORMS,
    Profile,
    RecentWindow,
    ResolvedProfile,
    TransformSettings,
)
from vllm_kvtuner.profile.statics import load_statics

SCHEMA = {
    "show": "kvtuner-profile/1",
    "check": "kvtuner-profile-check/1",
    "list": "kvtuner-profile-list/1",
    "resolve": "kvtuner-resolution/2",
}
"""Of each action's JSON."""
SCORES = {
    "kl": (("heldout_scores", "this profile", "kl_mean"), ("evaluation", "kl_mean")),
    "gsm8k": (("evaluation", "gsm8k"),),
}
"""Where provenance has what was measured of a profile as this package serves it."""
PAPER_SCORE = ("scores", "gsm8k_paper")
"""Where it has what a paper says of it, in the paper's own format."""


def tokens_that_fit(memory: int, bytes_per_token: int) -> int:
    """Tokens whose keys and values fit in ``memory`` bytes, in whole blocks of the smallest block size."""
    return memory // (bytes_per_token * BLOCK_SIZE_MULTIPLE) * BLOCK_SIZE_MULTIPLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print a profile")
    show.add_argument(
        "profiles", metavar="PROFILE", nargs=1, help="file, name of a shipped profile, or pair (K8V4, K8V4:plain)"
    )
    check = actions.add_parser("check", help="validate profiles; exit status 1 with all problems on stderr")
    check.add_argument(
        "profiles", metavar="PROFILE", nargs="+", help="file, name of a shipped profile, or pair (K8V4, K8V4:plain)"
    )
    for action in (show, check):
        action.add_argument("--model", metavar="FOLDER_OR_ID", help="model to match the profile with")
        action.add_argument(
            "--memory", type=parse_memory, help="KV cache memory, such as 20GiB, to count the tokens that fit"
        )
    resolving = actions.add_parser("resolve", help="say what auto means for a model, and why it is no other profile")
    resolving.add_argument("model", metavar="MODEL", help="folder or id of the model")
    resolving.add_argument(
        "--profile",
        metavar="SPEC",
        default=AUTO,
        help="auto, auto:BITS, or by need auto:fit=CONTEXTxREQUESTS with --memory (default: %(default)s)",
    )
    resolving.add_argument("--memory", type=parse_memory, help="KV cache memory, such as 20GiB, for a budget by need")
    resolving.add_argument("--revision", help="of the model on the hub")
    listing = actions.add_parser("list", help="list the shipped profiles")
    uploading = actions.add_parser("upload", help="put a profile into a repository of the Hugging Face hub")
    uploading.add_argument("source", metavar="PATH", type=Path, help="profile, or a calibration's output folder")
    uploading.add_argument("repo", metavar="ORG/REPO", help="repository; made if it is not there")
    uploading.add_argument("--revision", metavar="BRANCH", help="branch to put it on (default: the main one)")
    uploading.add_argument("--private", action="store_true", help="make a private repository, where one is made")
    downloading = actions.add_parser("download", help="bring a repository's profiles here, with their statics")
    downloading.add_argument("spec", metavar="ORG/REPO[@REVISION][/FILE.yaml]", help="repository, or one file of it")
    downloading.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to put them into")
    for action in (show, check, resolving, listing):
        action.add_argument("--json", action="store_true", help="print JSON")
    set_example(show, "kvtuner profile show K8V4 --model Qwen/Qwen3-8B --memory 20GiB")
    set_example(check, "kvtuner profile check mine.yaml --model Qwen/Qwen3-8B")
    set_example(resolving, "kvtuner profile resolve Qwen/Qwen3-8B --profile auto:3.5")
    set_example(listing, "kvtuner profile list --json")
    set_example(uploading, "kvtuner profile upload calibration/ org/Qwen3-8B-kvtuner")
    set_example(downloading, "kvtuner profile download org/Qwen3-8B-kvtuner --out profiles/")


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        return _list(args.json)
    if args.action == "resolve":
        return _resolve(args)
    if args.action == "upload":
        print(*upload(args.source, args.repo, private=args.private, revision=args.revision), sep="\n")
        return 0
    if args.action == "download":
        print(*download(args.spec, args.out), sep="\n")
        return 0
    if args.action == "show":
        summary = _summarize(args.profiles[0], args.model, args.memory)
        print(json.dumps({"schema": SCHEMA["show"], **summary}, indent=2) if args.json else _format(summary))
        return 0
    return _check(args)


def _check(args: argparse.Namespace) -> int:
    status = 0
    found: list[dict[str, Any]] = []
    for spec in args.profiles:
        try:
            summary = {"ok": True, "problems": [], **_summarize(spec, args.model, args.memory)}
        except ProfileError as error:
            print(error, file=sys.stderr)
            summary = {"profile": spec, "ok": False, "problems": list(error.problems)}
            status = 1
        found.append(summary)
        if summary["ok"] and not args.json:
            print(f"{spec}: ok, {_format_bits(summary)}")
    if args.json:
        print(json.dumps({"schema": SCHEMA["check"], "profiles": found}, indent=2))
    return status


def _resolve(args: argparse.Namespace) -> int:
    spec = args.profile
    if not is_auto(spec):
        raise ProfileError([f"{spec}: --profile must be {AUTO} or {AUTO}:BITS, which mean something to be looked for"])
    files = ModelFiles(args.model, args.revision)
    shape = load_model_shape(args.model, ModelSource(revision=args.revision))
    found = resolve_auto(spec, files, shape, args.memory)
    if args.json:
        print(json.dumps({"schema": SCHEMA["resolve"], **dataclasses.asdict(found)}, indent=2))
        return 0
    print(f"{found.asked} -> {found.chosen.spec} ({found.chosen.source}), {found.chosen.stored_bits:.3f} stored bits")
    for each in found.rejected:
        print(f"  not {each.spec} ({each.source}): {each.rejected}")
    return 0


def _list(as_json: bool) -> int:
    rows = [_row(name) for name in shipped_profiles()]
    if as_json:
        print(json.dumps({"schema": SCHEMA["list"], "profiles": rows}, indent=2))
        return 0
    cells = [("name", "model", "stored bits", "x bf16", "window", "KL", "GSM8K"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        left = (cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True))
        right = (cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True))
        print("  ".join((*left, *right)).rstrip())
    print(
        "x bf16: tokens that fit in the same memory. KL: mean, in nats per token, and GSM8K: measured as served here."
    )
    print("(paper): published for another format, and not measured here.")
    return 0


def _row(name: str) -> dict[str, Any]:
    """What the list has of a shipped profile; None for what nobody measured."""
    summary = _summarize(name, None, None)
    provenance = summary["provenance"]
    stored = summary["stored_bits"]
    return {
        "name": name,
        "model": summary["model"],
        "nominal_bits": summary["nominal_bits"],
        "stored_bits": stored,
        "times_bf16": None if stored is None else summary["bf16_bytes_per_token"] / summary["bytes_per_token"],
        "recent_window": max(layer["recent_window"] for layer in summary["layers"]),
        "sink_tokens": max(layer["sink_tokens"] for layer in summary["layers"]),
        **{key: next(filter(None, (_at(provenance, path) for path in paths)), None) for key, paths in SCORES.items()},
        "gsm8k_paper": _at(provenance, PAPER_SCORE),
    }


def _at(value: Any, path: Sequence[str]) -> Any:
    """What nested mappings hold there, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the printed list."""

    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    window = f"{row['recent_window']}+{row['sink_tokens']}" if row["sink_tokens"] else str(row["recent_window"] or "-")
    paper = row["gsm8k"] is None and row["gsm8k_paper"] is not None
    score = f"{row['gsm8k_paper']:.3f} (paper)" if paper else number("gsm8k", ".3f")
    bits = (number("stored_bits", ".3f"), number("times_bf16", ".2f"))
    return (row["name"], row["model"] or "any", *bits, window, number("kl", ".4f"), score)


def _summarize(spec: str, model: str | None, memory: int | None) -> dict[str, Any]:
    """Everything ``show`` prints; what only a model's shape can tell is None without one.

    Raises:
        ProfileError: the profile, its statics, or their fit to the model is wrong, or memory is given without a model.
    """
    profile, shape, resolved = resolve(spec, model, memory)
    if memory is not None and resolved is None:
        rule = "needs --model for a profile that names none, since bytes per token depend on it"
        raise ProfileError([f"{spec}: --memory {rule}, but got {memory:,} bytes alone"])
    return {
        "profile": profile.name,
        "source": None if profile.source is None else str(profile.source),
        "model": None if shape is None else shape.name,
        "nominal_bits": profile.nominal_bits if resolved is None else resolved.nominal_bits,
        "stored_bits": None if resolved is None else resolved.stored_bits,
        "bytes_per_token": None if resolved is None else resolved.bytes_per_token,
        "bf16_bytes_per_token": None if resolved is None else resolved.bf16_bytes_per_token,
        "recent_bytes_per_request": None if resolved is None else resolved.recent_bytes_per_request,
        "memory_bytes": memory,
        "tokens_that_fit": _tokens(memory, resolved, "bytes_per_token"),
        "bf16_tokens_that_fit": _tokens(memory, resolved, "bf16_bytes_per_token"),
        "attend_cached_prefill": profile.attend_cached_prefill,
        "adapts": profile.adapts,
        "left_out": list((profile if resolved is None else resolved.profile).left_out),
        **{
            f"{name}_from_weights": any(
                getattr(each, name) == FROM_WEIGHTS
                for each in (profile.transforms, *profile.transform_overrides.values())
            )
            for name in WEIGHT_TRANSFORMS
        },
        "statics": None if profile.statics is None else str(profile.statics),
        "layers": _layers(profile, resolved),
        "provenance": profile.provenance,
    }


def resolve(
    spec: str, model: str | None, memory: int | None = None
) -> tuple[Profile, ModelShape | None, ResolvedProfile | None]:
    """A profile, its model's shape where one is known, and the two matched, statics included.

    Args:
        spec: file, name of a shipped profile, pair, or with a model ``auto``.
        model: folder or id; by default the model that the profile names, if it does.
        memory: bytes of keys and values, for ``auto`` with a budget by need.

    Raises:
        ProfileError: the profile, its statics, or their fit to the model is wrong.
    """
    shape = None if model is None else load_model_shape(model)
    if shape is not None and model is not None and is_auto(spec):
        spec = resolve_auto(spec, ModelFiles(model), shape, memory).chosen.spec
    profile = load_profile(spec)
    shape = shape or profile.model
    resolved = None if shape is None else profile.resolve(shape)
    if resolved is not None and profile.statics is not None:
        load_statics(profile.statics, resolved)
    return profile, shape, resolved


def _tokens(memory: int | None, resolved: ResolvedProfile | None, per_token: str) -> int | None:
    if memory is None or resolved is None:
        return None
    return tokens_that_fit(memory, getattr(resolved, per_token))


def _layers(profile: Profile, resolved: ResolvedProfile | None) -> list[dict[str, Any]]:
    """One entry per layer; for a uniform profile that no model has met, one with ``layer`` None."""
    entries: list[tuple[int | None, PrecisionPair, TransformSettings, RecentWindow | None]]
    if resolved is not None:
        entries = [(layer.index, layer.pair, layer.transforms, layer.recent) for layer in resolved.layers]
    elif isinstance(profile.pairs, PrecisionPair):
        entries = [(None, profile.pairs, profile.transforms.at(profile.pairs), profile.recent_of(-1))]
    else:
        entries = [
            (layer, pair, profile.transforms_of(layer).at(pair), profile.recent_of(layer))
            for layer, pair in profile.pairs.items()
        ]
    return [
        {
            "layer": layer,
            "pair": pair.name,
            "k_bits": pair.k_bits,
            "v_bits": pair.v_bits,
            "transforms": list(transforms.names),
            "recent_window": recent.tokens if recent is not None and pair.is_quantized else 0,
            "recent_window_bits": recent.bits if recent is not None and pair.is_quantized else None,
            "sink_tokens": recent.sink_tokens if recent is not None and pair.is_quantized else 0,
        }
        for layer, pair, transforms, recent in entries
    ]


def _format_bits(summary: Mapping[str, Any]) -> str:
    if summary["stored_bits"] is None:
        return f"{summary['nominal_bits']:.3f} nominal bits (stored bits depend on the head size: give --model)"
    return f"{summary['nominal_bits']:.3f} nominal bits, {summary['stored_bits']:.3f} stored bits"


def _format(summary: Mapping[str, Any]) -> str:
    rows = [("profile", summary["profile"]), ("file", summary["source"]), ("model", summary["model"])]
    rows.append(("bits", _format_bits(summary)))
    if summary["bytes_per_token"] is not None:
        ratio = summary["bf16_bytes_per_token"] / summary["bytes_per_token"]
        bf16 = f"bf16 takes {summary['bf16_bytes_per_token']:,}, {ratio:.2f} times as many"
        rows.append(("bytes per token", f"{summary['bytes_per_token']:,} ({bf16})"))
    if summary["recent_bytes_per_request"]:
        fewer = "; fewer where requests are short" if summary["adapts"] else ""
        rows.append(("recent window", f"{summary['recent_bytes_per_request']:,} more bytes per request{fewer}"))
    if summary["key_offset_from_weights"]:
        rows.append(("key offset", "the k projection's bias, when the model is loaded"))
    if summary["key_round_feedback_from_weights"]:
        rows.append(("key feedback", "by the q projection's weights, when the model is loaded"))
    rows += [("without", reason) for reason in summary["left_out"]]
    if summary["tokens_that_fit"] is not None:
        bf16 = f"bf16: {summary['bf16_tokens_that_fit']:,}"
        rows.append(
            ("tokens that fit", f"{summary['tokens_that_fit']:,} in {summary['memory_bytes']:,} bytes ({bf16})")
        )
    rows.append(("statics", summary["statics"]))
    rows.append(("cached prefill", "attended as stored" if summary["attend_cached_prefill"] else None))
    for key, value in summary["provenance"].items():
        rows += value.items() if isinstance(value, Mapping) else [(key, value)]
    lines = [f"{name:16} {value}" for name, value in rows if value is not None]
    groups: dict[tuple[str, ...], list[int]] = {}
    for entry in summary["layers"]:
        tokens, bits, sink_tokens = entry["recent_window"], entry["recent_window_bits"], entry["sink_tokens"]
        recent = str(RecentWindow(tokens, bits, sink_tokens)) if tokens else "none"
        groups.setdefault((entry["pair"], ", ".join(entry["transforms"]) or "none", recent), []).append(entry["layer"])
    table: list[tuple[str, ...]] = [("layers", "pair  ", "transforms", "recent window")]
    for cells, layers in groups.items():
        table.append(("all" if layers == [None] else format_layers(layers), *cells))
    has_windows = any(entry["recent_window"] for entry in summary["layers"])
    columns = range(4 if has_windows else 3)
    widths = [max(len(row[column]) for row in table) for column in columns]
    lines.append("")
    for row in table:
        lines.append("  ".join(f"{row[column]:{widths[column]}}" for column in columns).rstrip())
    return "\n".join(lines)
