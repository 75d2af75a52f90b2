"""What is refused of a calibration's options before any model loads, all at once."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvtuner_tools.calibration import window_default
from kvtuner_tools.calibration.calibration_text import MIN_WINDOW, OwnText, read_generated
from kvtuner_tools.calibration.options import (
    DEFAULT_GENERATED_TOKENS,
    DEFAULT_WINDOW,
    GROUPS,
    QUICK_GENERATED_TOKENS,
    CalibrationOptions,
    Texts,
    flag,
    load_texts,
)
from kvtuner_tools.calibration.sampling import make_sampler
from kvtuner_tools.calibration.space import bf16_bytes, check_budget
from kvtuner_tools.calibration.study import open_storage
from kvtuner_tools.calibration.table_stages import TABLE_STAGES
from kvtuner_tools.data_files import read_documents
from kvtuner_tools.engine_arguments import check_engine_words, check_max_model_len, ranks
from kvtuner_tools.model_files import (
    load_model_shape,
    load_tokenizer,
    max_positions,
    refuse_model_folder,
    shape_of_values,
    text_value,
)
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, UNQUANTIZED
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import MAX_RECENT_WINDOW, MAX_SINK_TOKENS, SINK_TOKENS_WITHOUT_WINDOW

READS_TEXT = {"capture", "search", "export"}
"""Stages that run text through an engine."""
MAX_BLOCK_SIZE = 256
"""Tokens by which whole blocks may exceed a window."""


@dataclass(frozen=True)
class Checked:
    """Options that can be run.

    Args:
        options: with every default filled in.
        note: one line on a default that the model is not served with, or None.
        texts: where a stage reads one.
    """

    options: CalibrationOptions
    note: str | None
    texts: Texts | None


def check_options(options: CalibrationOptions, out: Path, stages: Collection[str]) -> Checked:
    """Refuse everything that can be known to be wrong without loading the model, all at once.

    Args:
        options: to check.
        out: the output folder.
        stages: that are to run; a search must have a budget, and what starts an engine must have its text.

    Raises:
        ProfileError: the problems.
    """
    problems: list[str] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except ProfileError as error:
            problems.extend(error.problems)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        return None

    problems += _numbers(options)
    attempt(lambda: check_engine_words(options.engine))
    attempt(lambda: refuse_model_folder(options.model, out))
    # An earlier stage had vLLM's verdict on the model, which takes its import; tables need the shape alone.
    load = shape_of_values if set(stages) <= set(TABLE_STAGES) else load_model_shape
    shape: ModelShape | None = attempt(lambda: load(options.model, options.source))
    layers_known = shape is not None and attempt(lambda: _check_layers(options, shape)) is not None
    filled, note = options, None
    if shape is not None:
        problems += shape.refusals
    if shape is not None and layers_known and not shape.unsupported:
        attempt(lambda: problems.extend(window_default.refuse(options, shape)))
        filled, note = attempt(lambda: window_default.fill(options, shape)) or (options, None)
    if filled.generated_tokens is None:
        default = QUICK_GENERATED_TOKENS if filled.quick else DEFAULT_GENERATED_TOKENS
        filled = replace(filled, generated_tokens=0 if filled.data else default)
    problems += _folder(out)
    if "search" in stages and (wrong := _budget_kind(options)):
        problems.append(wrong)
    elif "search" in stages and shape is not None and not problems:
        attempt(lambda: _check_budget(filled, shape))
    if options.sampler == "moead":
        attempt(lambda: make_sampler(options.sampler, options.seed))
    if options.storage is not None:
        attempt(lambda: open_storage(options.storage_url(out)))
    texts = None
    if shape is not None and READS_TEXT & set(stages):
        generated = attempt(lambda: read_generated(out)) if filled.generated_tokens else None
        texts = _check_texts(filled, shape, generated, attempt)
    if problems:
        raise ProfileError(problems)
    return Checked(filled, note, texts)


def _check_texts(
    options: CalibrationOptions,
    shape: ModelShape,
    generated: OwnText | None,
    attempt: Callable[[Callable[[], Any]], Any],
) -> Texts | None:
    """The three texts, if they can be drawn; what keeps them from it goes to ``attempt``."""
    files = [Path(name) for name in (options.data, options.heldout) if name is not None]
    readable = [attempt(lambda path=path: read_documents(path)) for path in files]  # type: ignore[misc]
    tokenizer = attempt(lambda: load_tokenizer(options.model, options.source))
    sizes = (options.capture_tokens, options.search_tokens, options.heldout_tokens)
    if options.window is None or options.window < MIN_WINDOW or min(sizes) < 1:
        return None
    attempt(lambda: _check_positions(options))
    if tokenizer is None or None in readable:
        return None
    texts: Texts | None = attempt(lambda: load_texts(options, tokenizer, generated))
    if texts is not None:
        longest = max(text.identity["longest"] for text in (texts.capture, texts.search, texts.heldout))
        attempt(lambda: check_max_model_len(options.engine, longest + 1))
        attempt(lambda: _check_memory(options, shape, texts))
        attempt(lambda: _check_disk(options, texts))
    return texts


def _check_positions(options: CalibrationOptions) -> None:
    limit = max_positions(options.model, options.source)
    assert options.window is not None
    if options.window >= limit:
        raise ValueError(
            f"{flag('window')} must be less than the model's {limit:,} positions, but got {options.window:,}"
        )


def _check_memory(options: CalibrationOptions, shape: ModelShape, texts: Texts) -> None:
    """An unquantized engine holds one window at a time, in whole blocks, on each rank that of its heads and layers.

    What the model writes itself is such a window too.
    """
    longest = max(text.identity["longest"] for text in (texts.capture, texts.search, texts.heldout))
    if options.generated_tokens:
        longest = max(longest, options.answer_tokens)
    width = 2 if options.dtype == "float32" else 1
    tensor, stages = ranks(options.engine)
    shapes = {layer: (max(1, heads // tensor), size) for layer, (heads, size) in shapes_of(shape).items()}
    of_stage = -(-bf16_bytes(shapes) // stages)
    least = of_stage * width * (longest + MAX_BLOCK_SIZE)
    if options.kv_memory < least:
        rule = f"must hold the longest window, of {longest:,} tokens, which takes {least:,} bytes on a rank"
        raise ValueError(f"{flag('kv_memory')} {rule}, but got {options.kv_memory:,}")


def _check_disk(options: CalibrationOptions, texts: Texts) -> None:
    """The reference's logits, fp32 of every predicted token, lie in a temporary file while an engine is compared."""
    vocab_size = text_value(options.model, "vocab_size", options.source)
    folder = tempfile.gettempdir()
    if not isinstance(vocab_size, int):
        return
    free = shutil.disk_usage(folder).free
    sizes = {"--search-tokens": texts.search.tokens, "--heldout-tokens": texts.heldout.tokens}
    name, tokens = max(sizes.items(), key=lambda item: item[1])
    if (needed := 4 * vocab_size * tokens) > free:
        rule = f"must be few enough for their logits, {needed:,} bytes, to fit in {folder} (TMPDIR), which has {free:,}"
        raise ValueError(f"{name} {rule}, but got {tokens:,}")


def _folder(out: Path) -> list[str]:
    if out.exists() and not out.is_dir():
        return [f"--out must be a folder, but got {str(out)!r}, which is a file"]
    there = next(each for each in (out, *out.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return [f"--out must be a folder that can be written to, but got {str(out)!r} ({there} cannot)"]
    return []


def _numbers(options: CalibrationOptions) -> list[str]:
    least = {
        "window": MIN_WINDOW,
        "capture_tokens": 1,
        "search_tokens": 1,
        "heldout_tokens": 1,
        "kv_memory": 1,
        "recent_window": 0,
        "cluster_factor": 1,
        "memory": 1,
        "context": 1,
        "concurrency": 1,
        "trials": 1,
        "long_window": 0,
        "generated_tokens": 0,
    }
    problems = []
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            problems.append(f"{flag(name)} must be at least {minimum}, but got {value}")
    problems += _recent_numbers(options)
    if options.max_bits is not None and not 0 < options.max_bits <= 16:
        problems.append(f"--max-bits must be above 0 and at most 16, but got {options.max_bits:g}")
    return problems


def _recent_numbers(options: CalibrationOptions) -> list[str]:
    problems = []
    window, sink_tokens = options.recent_window, options.sink_tokens
    if window is not None and window > MAX_RECENT_WINDOW:
        problems.append(f"--recent-window must be at most {MAX_RECENT_WINDOW}, but got {window}")
    if sink_tokens is not None and not 0 <= sink_tokens <= MAX_SINK_TOKENS:
        problems.append(f"--sink-tokens must be an integer of 0-{MAX_SINK_TOKENS} tokens, but got {sink_tokens}")
    elif sink_tokens and window == 0:
        problems.append(f"--sink-tokens {SINK_TOKENS_WITHOUT_WINDOW}, but got {sink_tokens}")
    held = window_default.held_tokens(options)
    length = DEFAULT_WINDOW if options.window is None else options.window
    if not problems and MIN_WINDOW <= length <= (least := window_default.WINDOW_SHARE * held):
        why = f"{window_default.WINDOW_SHARE} times the {held} that the recent window and the sink tokens keep"
        problems.append(f"{flag('window')} must be more than {least} tokens, {why} unquantized, but got {length}")
    return problems


def _budget_kind(options: CalibrationOptions) -> str | None:
    by_memory = [options.memory is not None, options.context is not None, options.concurrency is not None]
    if (options.max_bits is None and all(by_memory)) or (options.max_bits is not None and not any(by_memory)):
        return None
    names = [name for name in GROUPS["search"][:4] if getattr(options, name) is not None]
    given = ", ".join(map(flag, names)) or "none"
    return f"the budget must be given as --max-bits, or as --memory with --context and --concurrency, but got {given}"


def _check_layers(options: CalibrationOptions, shape: ModelShape) -> tuple[int, ...]:
    """The layers that stay unquantized."""
    try:
        layers = options.unquantized_layers
    except ValueError as error:
        raise ValueError(f"--unquantized {error}") from None
    if unknown := sorted(set(layers) - set(shape.attention_layers)):
        rule = f"must name layers of {shape.name} that cache keys and values"
        raise ValueError(f"--unquantized {rule}, but got {', '.join(map(str, unknown))}")
    if set(layers) == set(shape.attention_layers):
        raise ValueError(f"--unquantized must leave a layer to choose pairs for, but got all {len(layers)}")
    return layers


def shapes_of(shape: ModelShape) -> dict[int, tuple[int, int]]:
    """KV heads and head size of every layer that caches keys and values."""
    layers = {layer: shape.layers[layer] for layer in shape.attention_layers}
    return {layer: (each.num_kv_heads, each.head_size) for layer, each in layers.items()}


def _check_budget(options: CalibrationOptions, shape: ModelShape) -> None:
    shapes = shapes_of(shape)
    smallest = min(QUANTIZED_PAIRS, key=lambda pair: pair.nominal_bits)
    cheapest = [UNQUANTIZED if layer in options.unquantized_layers else smallest for layer in shapes]
    check_budget(options.max_bytes(shapes), shapes, cheapest)
