"""``kvtuner profile show|check|list``: what a profile stores, whether it is right, and which ones are shipped."""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from kvtuner_tools.model_files import load_model_shape
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, PrecisionPair
from vllm_kvtuner.profile.load import load_profile, shipped_profiles
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError, format_layers
from vllm_kvtuner.profile.profile import Profile, RecentWindow, ResolvedProfile, TransformSettings
from vllm_kvtuner.profile.statics import load_statics

_MEMORY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_UNITS = {
    unit: base**power
    for base, names in ((1000, ("b", "kb", "mb", "gb", "tb")), (1024, ("b", "kib", "mib", "gib", "tib")))
    for power, unit in enumerate(names)
}


def parse_memory(text: str) -> int:
    """Bytes of ``20GiB``, ``512 MB`` or a plain number of bytes.

    Raises:
        argparse.ArgumentTypeError: not of that form.
    """
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"memory must be a number with a unit such as 20GiB, but got {text!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "B").lower()])


def tokens_that_fit(memory: int, bytes_per_token: int) -> int:
    """Tokens whose keys and values fit in ``memory`` bytes, in whole blocks of the smallest block size."""
    return memory // (bytes_per_token * BLOCK_SIZE_MULTIPLE) * BLOCK_SIZE_MULTIPLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print a profile")
    show.add_argument("profiles", metavar="PROFILE", nargs=1, help="file, name of a shipped profile, or pair (K8V4)")
    check = actions.add_parser("check", help="validate profiles; exit status 1 with all problems on stderr")
    check.add_argument("profiles", metavar="PROFILE", nargs="+", help="file, name of a shipped profile, or pair (K8V4)")
    for action in (show, check):
        action.add_argument("--model", metavar="FOLDER_OR_ID", help="model to match the profile with")
        action.add_argument("--memory", type=parse_memory, help="KV cache memory, such as 20GiB: tokens that fit")
    listing = actions.add_parser("list", help="list the shipped profiles")
    for action in (show, check, listing):
        action.add_argument("--json", action="store_true", help="print JSON (check: one object per line)")


def run(args: argparse.Namespace) -> int:
    if args.action == "list":
        return _list(args.json)
    if args.action == "show":
        summary = _summarize(args.profiles[0], args.model, args.memory)
        print(json.dumps(summary, indent=2) if args.json else _format(summary))
        return 0
    return _check(args)


def _check(args: argparse.Namespace) -> int:
    status = 0
    for spec in args.profiles:
        try:
            summary = {"ok": True, "problems": [], **_summarize(spec, args.model, args.memory)}
        except ProfileError as error:
            print(error, file=sys.stderr)
            summary = {"profile": spec, "ok": False, "problems": list(error.problems)}
            status = 1
        if args.json:
            print(json.dumps(summary))
        elif summary["ok"]:
            print(f"{spec}: ok, {_format_bits(summary)}")
    return status


def _list(as_json: bool) -> int:
    rows = []
    for name in shipped_profiles():
        summary = _summarize(name, None, None)
        rows.append({"name": name, **{key: summary[key] for key in ("model", "nominal_bits", "stored_bits")}})
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    widths = [max(len(row[key]) for row in rows) for key in ("name", "model")]
    print(f"{'name':{widths[0]}}  {'model':{widths[1]}}  nominal bits  stored bits")
    for row in rows:
        bits = f"{row['nominal_bits']:12.3f}  {row['stored_bits']:11.3f}"
        print(f"{row['name']:{widths[0]}}  {row['model']:{widths[1]}}  {bits}")
    return 0


def _summarize(spec: str, model: str | None, memory: int | None) -> dict[str, Any]:
    """Everything ``show`` prints; what only a model's shape can tell is None without one.

    Raises:
        ProfileError: the profile, its statics, or their fit to the model is wrong.
    """
    profile, shape, resolved = resolve(spec, model)
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
        "statics": None if profile.statics is None else str(profile.statics),
        "layers": _layers(profile, resolved),
        "provenance": profile.provenance,
    }


def resolve(spec: str, model: str | None) -> tuple[Profile, ModelShape | None, ResolvedProfile | None]:
    """A profile, its model's shape where one is known, and the two matched, statics included.

    Args:
        spec: file, name of a shipped profile, or pair.
        model: folder or id; by default the model that the profile names, if it does.

    Raises:
        ProfileError: the profile, its statics, or their fit to the model is wrong.
    """
    profile = load_profile(spec)
    shape = profile.model if model is None else load_model_shape(model)
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
            "scale_bits": pair.scale_bits if pair.is_quantized else None,
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
        rows.append(("recent window", f"{summary['recent_bytes_per_request']:,} more bytes per request"))
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
