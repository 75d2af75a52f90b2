"""Bytes that a cached token takes on a wire and in each tier, and how soon the first token comes from there.

Two engines of a setting, with random weights, take turns. One computes a prompt; the other reads its pages over NIXL
and goes on, as if over links of the given rates. A link's rate is kept in the connector, and bytes are counted there.
Then an engine stores prompts in each tier, forgets them, and answers again from the tier. Every setting is set against
the first one, as which an unquantized cache (auto) is meant. Needs NIXL (pip install nixl).
"""

import argparse
import contextlib
import importlib.util
import socket
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvtuner_tools.arguments import parse_memory
from kvtuner_tools.bench.presets import Preset, presets
from kvtuner_tools.cache_setting import CacheSetting, cache_bits, profile_sha256
from kvtuner_tools.engines.transfer import LAST_TOKENS, LINK_MODULE, TransferJob, ask, forget, metric, start, stop
from kvtuner_tools.processes import OwnProcess
from kvtuner_tools.results import format_table, provenance, write_json

SCHEMA = "kvtuner-bench-transfer/1"
BYTES_PER_GBIT = 1e9 / 8
OFFLOADED = "vllm:kv_offload_load_bytes"
"""vLLM's counter of bytes that its offloading connector brings back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``kvtuner bench transfer``."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("model", metavar="MODEL", nargs="?", type=Path, help="folder with config.json")
    model.add_argument("--shape", help=f"instead of MODEL: {', '.join(presets())}, or a rank's share such as NAME:tp8")
    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--setting",
        action="append",
        required=True,
        type=CacheSetting.parse,
        help="auto, fp8, or kvtuner:PROFILE; the others are set against the first; repeat",
    )
    measured.add_argument(
        "--prompt", type=int, default=4096, metavar="TOKENS", help="of each request (default: %(default)s)"
    )
    measured.add_argument(
        "--gbit", default="1,10,100", metavar="RATES", help="of links, in Gbit/s, or none (default: %(default)s)"
    )
    measured.add_argument(
        "--tiers",
        default="disk",
        help="cpu (vLLM's offloading connector, on a GPU), disk (files of its ExampleConnector), both, or none "
        "(default: %(default)s)",
    )
    measured.add_argument("--runs", type=int, default=3, help="of each, of which the median counts (default: 3)")
    measured.add_argument("--disk", type=Path, metavar="FOLDER", help="where files go (default: a temporary folder)")
    measured.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    engine = parser.add_argument_group("engines")
    engine.add_argument("--dtype", default="bfloat16", help="of the models (default: %(default)s)")
    engine.add_argument(
        "--devices", metavar="CARDS", help="card of the prefilling and of the decoding engine, such as 0,1"
    )
    engine.add_argument(
        "--gpu-memory-utilization", type=float, default=0.4, help="of each engine (default: %(default)s)"
    )
    engine.add_argument(
        "--kv-cache-memory-bytes",
        type=parse_memory,
        default="2GiB",
        metavar="MEMORY",
        help="of each engine's KV cache (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Run ``kvtuner bench transfer``."""
    if args.model:
        return _run(args, args.model)
    with Preset.parse(args.shape).folder() as model:
        return _run(args, model)


def _run(args: argparse.Namespace, model: Path) -> int:
    from transformers import AutoConfig

    rates, tiers = _check(args)
    hf_config = AutoConfig.from_pretrained(model)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        **provenance(),
        "model": args.shape or str(model),
        "dtype": args.dtype,
        "prompt": args.prompt,
        "runs": args.runs,
        "devices": args.devices,
        "settings": {},
    }
    settings = result["settings"]
    for setting in args.setting:
        bits = cache_bits(setting, hf_config, model.name, 16)
        entry = settings[setting.label] = {"stored_bits": bits and bits[1], "profile_sha256": profile_sha256(setting)}
        try:
            entry |= _over_links(args, model, setting, rates)
            entry |= {"tiers": {tier: _from_tier(args, model, setting, tier) for tier in tiers}, "error": None}
        except Exception as failure:  # an engine can fail in any way; the next one must still be measured
            entry["error"] = f"{type(failure).__name__}: {failure}"
        compare(measured(settings))
        # After every setting, so that a run cut short keeps what it measured.
        if args.out:
            write_json(args.out, result)
        print(f"{setting.label}: {entry['error'] or 'done'}", flush=True)
    if done := measured(settings):
        print(table(done))
    return 1 if len(done) < len(settings) else 0


def measured(settings: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings whose engines did not fail."""
    return {label: entry for label, entry in settings.items() if entry["error"] is None}


def _over_links(args: argparse.Namespace, model: Path, setting: CacheSetting, rates: list[float]) -> dict[str, Any]:
    """Bytes over a wire, and seconds to the decoding side's first token."""
    cards = (args.devices or ",").split(",")
    with contextlib.ExitStack() as stack:
        ends = []
        for role, card in zip(("kv_producer", "kv_consumer"), cards, strict=True):
            connector = {
                "kv_connector": "LimitedNixlConnector",
                "kv_connector_module_path": LINK_MODULE,
                "kv_role": role,
                "kv_buffer_device": _device(),
            }
            environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(_free_port()), "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1"}
            if card:
                environment["CUDA_VISIBLE_DEVICES"] = card
            ends.append(stack.enter_context(_engine(_job(args, model, setting, connector, environment))))
        (prefill, pages), (decode, _) = ends
        seeds = iter(range(1, 1 << 20))

        def transferred(rate: float | None, output_tokens: int = 1) -> tuple[Any, int]:
            seed = next(seeds)
            params = prefill.run(_prefill, args.prompt, seed).params
            return decode.run(_decode, args.prompt, seed, output_tokens, params, rate), seed

        transferred(None)  # the handshake, and what the first request warms up
        answer, seed = transferred(None, LAST_TOKENS)
        alone = prefill.run(_decode, args.prompt, seed, LAST_TOKENS, None, None)
        alike = sum(ours == theirs for ours, theirs in zip(answer.token_ids, alone.token_ids, strict=True))
        seconds: dict[str, list[float]] = {}
        for rate in rates:
            runs = [transferred(rate * BYTES_PER_GBIT)[0] for _ in range(args.runs)]
            seconds[f"{rate:g} Gbit/s"] = [run.seconds for run in runs]
        seconds["no limit"] = [transferred(None)[0].seconds for _ in range(args.runs)]
        computed = [next(seeds) for _ in range(args.runs)]
        for name in ("computed", "device"):  # the second time from the engine's own prefix cache
            runs = [decode.run(_decode, args.prompt, seed, 1, None, None) for seed in computed]
            seconds[name] = [run.seconds for run in runs]
    return {
        **pages,
        "wire": {"bytes": answer.moved_bytes, "bytes_per_token": answer.moved_bytes / args.prompt},
        "tokens_alike": f"{alike} of {LAST_TOKENS}",
        "first_token_s": {name: _seconds(each) for name, each in seconds.items()},
    }


def _from_tier(args: argparse.Namespace, model: Path, setting: CacheSetting, tier: str) -> dict[str, Any]:
    """Bytes in a tier, and seconds to the first token of a prompt whose pages are there."""
    with tempfile.TemporaryDirectory(prefix="kvtuner-tier-", dir=args.disk) as folder:
        extra: dict[str, Any] = {"shared_storage_path": folder}
        name = "ExampleConnector"
        if tier == "cpu":
            name, extra = "OffloadingConnector", {"cpu_bytes_to_use": 4 * args.kv_cache_memory_bytes}
        connector = {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra}
        with _engine(_job(args, model, setting, connector, {})) as (engine, _):
            seeds = range(1, args.runs + 2)  # the first warms up
            for seed in seeds:
                engine.run(_decode, args.prompt, seed, 1, None, None)
            engine.run(forget)
            before = engine.run(metric, OFFLOADED)
            answers = [engine.run(_decode, args.prompt, seed, 1, None, None) for seed in seeds]
            loaded = engine.run(metric, OFFLOADED) - before
            tokens = sum(answer.cached_tokens for answer in answers)
        size = loaded if tier == "cpu" else sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    if not tokens:
        raise RuntimeError(f"{setting.label}: no prompt's pages came back from the {tier} tier")
    return {
        "cached_tokens": answers[-1].cached_tokens,
        "bytes_per_token": size / tokens,
        "hit_s": _seconds([answer.seconds for answer in answers[1:]]),
    }


def compare(settings: dict[str, dict[str, Any]]) -> None:
    """Set each setting's bytes against the first one's, and beside that its stored bits against the first one's.

    ``ratio`` has both, and ``off_by``, how much larger the one is than the other, of each place that holds pages.
    """
    base = next(iter(settings.values()), None)
    for entry in settings.values():
        assert base is not None
        expected = None
        if entry["stored_bits"] and base["stored_bits"]:
            expected = entry["stored_bits"] / base["stored_bits"]
        places = {"wire": (entry["wire"], base["wire"])}
        places |= {name: (entry["tiers"][name], base["tiers"][name]) for name in entry["tiers"]}
        entry["ratio"] = {
            name: {
                "bytes": ours["bytes_per_token"] / theirs["bytes_per_token"],
                "stored_bits": expected,
                "off_by": expected and ours["bytes_per_token"] / theirs["bytes_per_token"] / expected - 1,
            }
            for name, (ours, theirs) in places.items()
        }


def table(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """Bytes per token and milliseconds to the first token, a line per setting."""
    base = next(iter(settings.values()))
    columns = {
        "setting": "label:",
        "stored bits": "stored_bits:.2f",
        "wire B/token": "wire:,.0f",
        "x first": "ratio:.3f",
    }
    columns |= {"bits x first": "expected:.3f"}
    columns |= {f"{name}, ms": f"{name}:,.1f" for name in base["first_token_s"]}
    for tier in base["tiers"]:
        columns |= {f"{tier} B/token": f"{tier} bytes:,.0f", f"{tier} hit, ms": f"{tier} hit:,.1f"}
    rows = []
    for label, entry in settings.items():
        ratio = entry["ratio"]["wire"]
        row = {"label": label, "stored_bits": entry["stored_bits"], "wire": entry["wire"]["bytes_per_token"]}
        row |= {"ratio": ratio["bytes"], "expected": ratio["stored_bits"]}
        row |= {name: 1e3 * each["median"] for name, each in entry["first_token_s"].items()}
        for tier, held in entry["tiers"].items():
            row |= {f"{tier} bytes": held["bytes_per_token"], f"{tier} hit": 1e3 * held["hit_s"]["median"]}
        rows.append(row)
    return format_table(columns, rows)


def _check(args: argparse.Namespace) -> tuple[list[float], list[str]]:
    """Rates and tiers, or all that is wrong with the options."""
    import torch

    problems = []
    if importlib.util.find_spec("nixl") is None:
        problems.append("bench transfer needs NIXL, which is not installed: pip install nixl")
    for name in ("prompt", "runs"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} must be at least 1, but got {getattr(args, name)}")
    if len({setting.label for setting in args.setting}) < len(args.setting):
        problems.append("--setting must name each setting once")
    try:
        rates = [] if args.gbit == "none" else [float(text) for text in args.gbit.split(",")]
    except ValueError:
        rates = [0.0]
    if any(rate <= 0 for rate in rates):
        problems.append(f"--gbit must be positive numbers such as 1,10,100, or none, but got {args.gbit}")
    tiers = {"none": [], "both": ["cpu", "disk"]}.get(args.tiers, [args.tiers])
    if set(tiers) - {"cpu", "disk"}:
        problems.append(f"--tiers must be cpu, disk, both or none, but got {args.tiers}")
    if "cpu" in tiers and not torch.cuda.is_available():
        problems.append("--tiers must leave out cpu without a GPU, since vLLM offloads from GPUs alone")
    if args.devices and len(args.devices.split(",")) != 2:
        problems.append(f"--devices must be two cards such as 0,1, but got {args.devices}")
    if problems:
        raise ValueError("\n".join(problems))
    return rates, tiers


def _job(
    args: argparse.Namespace, model: Path, setting: CacheSetting, connector: dict[str, Any], environment: dict[str, str]
) -> TransferJob:
    return TransferJob(
        model=model,
        setting=setting,
        dtype=args.dtype,
        connector=connector,
        max_model_len=args.prompt + 2 * LAST_TOKENS,
        kv_memory_bytes=args.kv_cache_memory_bytes,
        memory=args.gpu_memory_utilization,
        environment=environment,
    )


@contextlib.contextmanager
def _engine(job: TransferJob) -> Iterator[tuple[OwnProcess, dict[str, float]]]:
    """An engine in a process of its own, and what :func:`start` says of its pages."""
    process = OwnProcess()
    try:
        yield process, process.run(start, job)
        process.run(stop)
    finally:
        process.close()


def _prefill(tokens: int, seed: int) -> Any:
    return ask(tokens, seed, params={"do_remote_decode": True, "do_remote_prefill": False})


def _decode(tokens: int, seed: int, output_tokens: int, params: Any, bytes_per_s: float | None) -> Any:
    return ask(tokens, seed, output_tokens=output_tokens, params=params, bytes_per_s=bytes_per_s)


def _seconds(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "all": values}


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
