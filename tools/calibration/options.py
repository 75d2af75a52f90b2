"""What a calibration is asked to do: the options of its commands, kept in the output folder."""

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kvtuner_tools.arguments import memory_text, parse_memory, refuse_old
from kvtuner_tools.calibration.artifacts import read_artifact
from kvtuner_tools.calibration.calibration_text import CalibrationText, OwnText, TextRequest, draw_texts
from kvtuner_tools.calibration.cluster import DEFAULT_FACTOR
from kvtuner_tools.calibration.sampling import SAMPLERS
from kvtuner_tools.calibration.space import bytes_for_bits, bytes_for_memory
from kvtuner_tools.calibration.study import sqlite_url
from kvtuner_tools.engine_arguments import add_engine_arguments, model_source, takes_engine_arguments
from kvtuner_tools.model_files import ModelSource, max_positions
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.layout import (
    BLOCK_SIZE_MULTIPLE,
    RECENT_BITS,
    content_bytes,
    recent_blocks,
)
from vllm_kvtuner.profile.problems import parse_layers
from vllm_kvtuner.profile.profile import RecentWindow

OPTIONS_SCHEMA = "kvtuner-calibration/5"
OPTIONS_FILE = "calibration.json"
DEFAULT_WINDOW = 2048
DEFAULT_GENERATED_TOKENS, QUICK_GENERATED_TOKENS = 8192, 3072
"""Each of the texts has one window of them, of a third or half as many tokens; the others are what is left over."""
DEFAULT_RECENT_WINDOW = 64
DEFAULT_SINK_TOKENS = 4
"""Together they lower the KL several times (docs/notes/windows-and-first-tokens.md) for 3 to 4% of a decode step."""


ANSWER_TOKENS, QUICK_ANSWER_TOKENS = 512, 256
"""Of an answer that the model writes as text of its own, at most. Answers are written together, so this is how many
steps the text takes, however long it is."""
QUICK: dict[str, Any] = {
    "window": 1024,
    "long_window": 0,
    "capture_tokens": 4096,
    "heldout_tokens": 4096,
    "cluster_factor": 1.0,
}
"""What ``--quick`` changes of the defaults; every layer decides alone, since no setting is scored for it."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Everything that can be asked for. What is None takes its default from elsewhere, as ``help`` says.

    Args:
        model: folder or id.
        data: calibration text; the bundled set by default.
        heldout: text for the final scores; by default windows of ``data`` that nothing else uses.
        generated_tokens: tokens that the model itself writes, which become one part more of the text; None takes the
            default beside the bundled set, and 0 beside ``data``.
        dtype: of the model.
        seed: of everything that is drawn.
        window: tokens of a window at most; None takes what the model has positions for, up to a default.
        long_window: tokens of the longer windows that half of the held-out text has, rounded down to a multiple of
            ``window`` and to the model's positions; 0 for none.
        capture_tokens: tokens that transforms, round feedback and sensitivity are measured on.
        search_tokens: tokens that a setting is scored on in the search.
        heldout_tokens: tokens that final scores rest on.
        kv_memory: bytes of the KV cache of every engine, on each rank.
        engine: vLLM's engine arguments: its names, and the words that give them.
        transforms: ``choose`` them by measured error, or ``none``.
        round_feedback: ``choose`` it for layers that have less error with it, or ``none``.
        recent_window: newest tokens of each request that every quantized layer also keeps unquantized; 0 for none. None
            takes what ``window_default`` finds to be served, as for ``sink_tokens``.
        recent_window_bits: 16, or 8.
        sink_tokens: first tokens of each request that the recent window holds too; 0 for none.
        unquantized: layers kept at K16V16, such as ``0, 31``; empty for none.
        keep_all_pairs: do not prune, since a layer's own error does not say whether keys or values hurt the model more.
        cluster_factor: largest ratio of errors within a cluster; 1 for none.
        max_bits: budget in stored bits.
        memory: budget as bytes of KV cache, together with ``context`` and ``concurrency``.
        context: tokens of a request.
        concurrency: requests at once.
        sampler: Optuna's sampler.
        trials: settings to score, seeds included.
        storage: URL of the Optuna storage; an SQLite file in the output folder by default.
        quick: take pairs by the integer program from sensitivities, on less text, and score no setting in a search.
        full_report: score all uniform settings, the greedy choice and the integer program's on held-out text too.
    """

    model: str = ""
    data: str | None = None
    heldout: str | None = None
    generated_tokens: int | None = None
    dtype: str = "bfloat16"
    seed: int = 0
    window: int | None = None
    long_window: int = 8192
    capture_tokens: int = 8192
    search_tokens: int = 6144
    heldout_tokens: int = 16384
    kv_memory: int = 1 << 30
    engine: Mapping[str, Sequence[str]] = field(default_factory=dict)
    transforms: str = "choose"
    round_feedback: str = "choose"
    recent_window: int | None = None
    recent_window_bits: int = 16
    sink_tokens: int | None = None
    unquantized: str = ""
    keep_all_pairs: bool = True
    cluster_factor: float = DEFAULT_FACTOR
    max_bits: float | None = None
    memory: int | None = None
    context: int | None = None
    concurrency: int | None = None
    sampler: str = "nsga2"
    trials: int = 96
    storage: str | None = None
    quick: bool = False
    full_report: bool = False

    @property
    def unquantized_layers(self) -> tuple[int, ...]:
        return tuple(parse_layers(self.unquantized, None)) if self.unquantized else ()

    @property
    def answer_tokens(self) -> int:
        """Tokens that an answer of the model's own has at most."""
        return QUICK_ANSWER_TOKENS if self.quick else ANSWER_TOKENS

    @property
    def longest_window(self) -> int:
        """Tokens of held-out text's longer windows: a multiple of the others', so that both add up to what is asked."""
        assert self.window is not None, "window_default.fill comes first"
        return min(self.long_window, max_positions(self.model, self.source) - 1) // self.window * self.window

    @property
    def has_feedback(self) -> bool:
        """Whether round feedback is chosen: without Hadamard rotations it is worse than nearest rounding."""
        return self.transforms == "choose" and self.round_feedback == "choose"

    @property
    def recent(self) -> RecentWindow | None:
        """The recent window of every quantized layer."""
        assert self.recent_window is not None and self.sink_tokens is not None, "window_default.fill comes first"
        if not self.recent_window:
            return None
        return RecentWindow(self.recent_window, self.recent_window_bits, self.sink_tokens)

    @property
    def source(self) -> ModelSource:
        """Where the model's config and tokenizer come from."""
        return model_source(self.engine)

    def command(self, out: Path) -> str:
        """The command line that gives these options, those of a default left out."""
        words = ["kvtuner", "calibrate", self.model, "--out", str(out)]
        presets = asdict(CalibrationOptions()) | (QUICK if self.quick else {})
        for name, value in asdict(self).items():
            if name == "engine":
                words += [word for group in value.values() for word in group]
            elif name != "model" and value != presets[name]:
                if isinstance(value, bool):
                    words.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
                else:
                    words += [flag(name), str(value)]
        return shlex.join(words)

    def storage_url(self, out: Path) -> str:
        return self.storage or sqlite_url(out / "study.db")

    def max_bytes(self, shapes: dict[int, tuple[int, int]]) -> int:
        """The budget in bytes per token; ``shapes`` gives each layer's KV heads and head size."""
        if self.max_bits is not None:
            return bytes_for_bits(self.max_bits, shapes)
        assert self.memory is not None and self.context is not None and self.concurrency is not None
        recent = self.concurrency * recent_bytes(self, shapes)
        return bytes_for_memory(max(0, self.memory - recent), self.context, self.concurrency)

    def budget_text(self, nominal: float, stored: float) -> str:
        """The budget in bits, and what it comes from where it was given as memory."""
        bits = f"at most {stored:.3f} stored bits ({nominal:.3f} nominal)"
        if self.recent is not None:
            bits += f", beside a recent window of {self.recent}"
        if self.max_bits is not None:
            return bits
        return f"{bits}: {self.concurrency} requests of {self.context:,} tokens in {self.memory:,} bytes"

    def write(self, out: Path) -> None:
        write_json(out / OPTIONS_FILE, {"schema": OPTIONS_SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, out: Path) -> "CalibrationOptions":
        """Options of an output folder.

        Raises:
            ValueError: none there, or a file of another schema.
        """
        return cls(**read_artifact(out / OPTIONS_FILE, OPTIONS_SCHEMA, tuple(each.name for each in fields(cls))))


def recent_bytes(options: CalibrationOptions, shapes: Mapping[int, tuple[int, int]]) -> int:
    """Bytes of one request's recent windows, in the smallest blocks that hold them.

    Args:
        options: filled in.
        shapes: KV heads and head size of every layer.
    """
    if options.recent is None:
        return 0
    blocks = recent_blocks(options.recent.tokens, BLOCK_SIZE_MULTIPLE) + (options.recent.sink_tokens > 0)
    tokens, pair = blocks * BLOCK_SIZE_MULTIPLE, options.recent.pair
    layers = [shape for layer, shape in shapes.items() if layer not in options.unquantized_layers]
    return sum(tokens * heads * content_bytes(pair, size) for heads, size in layers)


GROUPS: dict[str, tuple[str, ...]] = {
    "capture": (
        "data",
        "heldout",
        "generated_tokens",
        "dtype",
        "seed",
        "window",
        "long_window",
        "capture_tokens",
        "search_tokens",
        "heldout_tokens",
        "kv_memory",
    ),
    "transforms": ("transforms", "recent_window", "recent_window_bits", "sink_tokens"),
    "feedback": ("round_feedback",),
    "sensitivity": (),
    "prune": ("unquantized", "keep_all_pairs"),
    "cluster": ("cluster_factor",),
    "search": (
        "max_bits",
        "memory",
        "context",
        "concurrency",
        "sampler",
        "trials",
        "storage",
        "kv_memory",
    ),
    "export": ("full_report", "kv_memory"),
    "report": (),
}
"""Options of each stage's command; those of the stages before it stay as the output folder has them."""
STAGES = tuple(GROUPS)
"""In the order they run."""
ENGINE_STAGES = ("capture", "search", "export")
"""Those that start engines."""

_HELP: dict[str, tuple[str, dict[str, Any]]] = {
    "data": ("calibration text: plain text or rows of JSON (default: the bundled set)", {"metavar": "FILE"}),
    "heldout": (
        "text for the final scores (default: windows of the calibration text not used before)",
        {"metavar": "FILE"},
    ),
    "generated_tokens": (
        "tokens that the model itself writes, of which each text has a share as of each bundled file (default: "
        f"{DEFAULT_GENERATED_TOKENS}, with --quick {QUICK_GENERATED_TOKENS}, and with --data 0)",
        {"type": int, "metavar": "TOKENS"},
    ),
    "dtype": ("dtype of the model", {"choices": ("bfloat16", "float16", "float32")}),
    "seed": ("seed of everything that is drawn", {"type": int}),
    "window": (
        f"tokens of a window of text (default: {DEFAULT_WINDOW}, or what the model has positions for)",
        {"type": int, "metavar": "TOKENS"},
    ),
    "long_window": (
        "tokens of the longer windows that half of the held-out text has, where documents and the model's positions "
        "are that long; rounded down to a multiple of the others; 0 for none",
        {"type": int},
    ),
    "capture_tokens": ("tokens that transforms, round feedback and sensitivity are measured on", {"type": int}),
    "search_tokens": ("tokens that each setting is scored on in the search", {"type": int}),
    "heldout_tokens": ("tokens that the final scores rest on", {"type": int}),
    "kv_memory": ("KV cache memory of every engine, on each rank", {"type": parse_memory}),
    "transforms": ("choose each layer's transforms by measured error, or use none", {"choices": ("choose", "none")}),
    "round_feedback": (
        "round with feedback in layers that have less error with it, or in none; without transforms in none",
        {"choices": ("choose", "none")},
    ),
    "recent_window": (
        f"newest tokens of each request that layers also keep, and read, in more bits; 0 for none (default: "
        f"{DEFAULT_RECENT_WINDOW} where served)",
        {"type": int, "metavar": "TOKENS"},
    ),
    "recent_window_bits": ("bits of the recent window", {"type": int, "choices": RECENT_BITS}),
    "sink_tokens": (
        f"first tokens of each request that the recent window holds too; 0 for none (default: {DEFAULT_SINK_TOKENS} "
        "where served)",
        {"type": int, "metavar": "TOKENS"},
    ),
    "unquantized": ("layers to keep at K16V16, such as 0,31", {"metavar": "LAYERS"}),
    "keep_all_pairs": ("keep all pairs of each layer as candidates", {"action": argparse.BooleanOptionalAction}),
    "cluster_factor": (
        "largest ratio of two layers' errors within a cluster; 1: every layer decides alone",
        {"type": float, "metavar": "RATIO"},
    ),
    "full_report": (
        "score all uniform pairs, the greedy choice and the integer program's on held-out text too",
        {"action": argparse.BooleanOptionalAction},
    ),
    "quick": (
        "in minutes: less text, and pairs by the integer program from the layers' sensitivities, without a search",
        {"action": argparse.BooleanOptionalAction},
    ),
    "max_bits": ("budget in stored bits (scales included)", {"type": float, "metavar": "BITS"}),
    "memory": ("budget as KV cache memory such as 20GiB, with --context and --concurrency", {"type": parse_memory}),
    "context": ("tokens of a request, with --memory", {"type": int, "metavar": "TOKENS"}),
    "concurrency": ("requests at once, with --memory", {"type": int, "metavar": "REQUESTS"}),
    "sampler": ("Optuna's sampler", {"choices": SAMPLERS}),
    "trials": (
        "settings to score, those of earlier runs included; the first ones, two a cluster and more, are in any case",
        {"type": int},
    ),
    "storage": (
        "Optuna storage URL, kept in the output folder: leave its password to the driver, such as ~/.pgpass "
        "(default: an SQLite file in the output folder, for one worker)",
        {"metavar": "URL"},
    ),
}


FLAGS = {
    "window": "--sequence-length",
    "long_window": "--long-sequence-length",
    "kv_memory": "--kv-cache-memory-bytes",
}
"""Options whose spelling is not their name: ``window`` would be taken for the recent window, or for seconds."""
_EARLIER = {
    "window": ("--window", "--sequence-length"),
    "kv_memory": ("--kv-memory", "--kv-cache-memory-bytes"),
}
"""Spellings of earlier versions, and what they are now."""
_TITLES = {
    "capture": "text",
    "transforms": "transforms and recent window",
    "feedback": "round feedback",
    "prune": "pairs",
    "cluster": "clusters",
    "search": "search",
    "export": "result",
}
_OTHER_TITLES = {
    **dict.fromkeys(("dtype", "seed", "kv_memory"), "engine"),
    **dict.fromkeys(("max_bits", "memory", "context", "concurrency"), "budget"),
}
"""Headings of the help, by stage, and of options that stand elsewhere than their stage's."""
_METAVARS = {
    **dict.fromkeys(("long_window", "capture_tokens", "search_tokens", "heldout_tokens"), "TOKENS"),
    "kv_memory": "MEMORY",
    "trials": "SETTINGS",
}


def flag(name: str) -> str:
    """How an option is typed."""
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def add_options(parser: argparse.ArgumentParser, stages: Iterable[str]) -> None:
    """Add the options of these stages, each once; what is not given is absent from the parsed arguments."""
    for stage in stages:
        names = [name for name in GROUPS[stage] if flag(name) not in parser._option_string_actions]
        for name in names:
            add_option(_group(parser, _OTHER_TITLES.get(name, _TITLES[stage])), name)
        refuse_old(parser, dict(_EARLIER[name] for name in names if name in _EARLIER))
        if stage in ENGINE_STAGES and not takes_engine_arguments(parser):
            add_engine_arguments(parser)


def add_option(parser: argparse._ActionsContainer, name: str) -> None:
    """Add one option to a parser, or to a group of its."""
    text, more = _HELP[name]
    default = getattr(CalibrationOptions(), name)
    written = memory_text(default) if name == "kv_memory" else default
    shown = f" (default: {written})" if default is not False and default not in (None, "") else ""
    if name in _METAVARS:
        more = {"metavar": _METAVARS[name], **more}
    parser.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=text + shown, **more)


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The parser's group of that title, which is made where it is not there."""
    found = (group for group in parser._action_groups if group.title == title)
    return next(found, None) or parser.add_argument_group(title)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by name; a budget of one kind replaces one of the other."""
    names = {each.name for each in fields(CalibrationOptions)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if "quick" in given:
        presets = QUICK if given["quick"] else {name: getattr(CalibrationOptions(), name) for name in QUICK}
        given = {**presets, **given}
    if "max_bits" in given and not given.keys() & {"memory", "context", "concurrency"}:
        given |= dict.fromkeys(("memory", "context", "concurrency"))
    elif "memory" in given and "max_bits" not in given:
        given["max_bits"] = None
    return given


def merge(options: CalibrationOptions, given: dict[str, Any]) -> CalibrationOptions:
    """The options with those that were given; each of vLLM's engine arguments replaces that of its name alone."""
    if "engine" in given:
        given = {**given, "engine": {**options.engine, **given["engine"]}}
    return replace(options, **given)


@dataclass(frozen=True)
class Texts:
    """Token windows of the three purposes; none is in two of them, unless held-out text is a file of its own.

    Args:
        capture: what sensitivity is measured on.
        search: what settings are scored on in the search.
        heldout: what final scores rest on.
    """

    capture: CalibrationText
    search: CalibrationText
    heldout: CalibrationText


def load_texts(options: CalibrationOptions, tokenizer: Any, generated: OwnText | None = None) -> Texts:
    """Draw the windows.

    The held-out text is drawn first, so calibrations that differ in the sizes of the others are scored on the same.

    Args:
        options: filled in.
        tokenizer: of the model.
        generated: what the model wrote itself, if it has.

    Raises:
        ValueError: files that cannot be used or that hold too little text.
    """
    assert options.window is not None, "window_default.fill comes first"
    data = None if options.data is None else Path(options.data)
    heldout = TextRequest(options.heldout_tokens, options.window, options.longest_window, name="--heldout-tokens")
    requests = [
        TextRequest(options.capture_tokens, options.window, name="--capture-tokens"),
        TextRequest(options.search_tokens, options.window, name="--search-tokens"),
    ]
    if options.heldout is None:
        drawn = draw_texts(data, tokenizer, [heldout, *requests], seed=options.seed, generated=generated)
    else:
        drawn = draw_texts(Path(options.heldout), tokenizer, [heldout], seed=options.seed)
        drawn += draw_texts(data, tokenizer, requests, seed=options.seed, generated=generated)
    return Texts(heldout=drawn[0], capture=drawn[1], search=drawn[2])
