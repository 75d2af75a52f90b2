"""What is refused of a calibration's options before any model loads, all at once."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtuner_tools.calibration import window_default
from kvtuner_tools.calibration.calibration_text import MIN_WINDOW, read_documents
from kvtuner_tools.calibration.options import GROUPS, CalibrationOptions
from kvtuner_tools.calibration.sampling import make_sampler
from kvtuner_tools.calibration.space import check_budget
from kvtuner_tools.calibration.study import open_storage
from kvtuner_tools.model_files import load_model_shape, refuse_model_folder
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, UNQUANTIZED
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import MAX_RECENT_WINDOW, MAX_SINK_TOKENS, SINK_TOKENS_WITHOUT_WINDOW


def check_options(options: CalibrationOptions, out: Path, *, with_budget: bool) -> None:
    """Refuse everything that can be known to be wrong without loading the model, all at once.

    Args:
        options: to check.
        out: the output folder.
        with_budget: whether a budget must be given.

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
    attempt(lambda: refuse_model_folder(options.model, out))
    shape: ModelShape | None = attempt(lambda: load_model_shape(options.model))
    if shape is not None:
        problems += [f"{options.model}: model {reason}" for reason in shape.unsupported]
        attempt(lambda: _check_layers(options, shape))
        attempt(lambda: problems.extend(window_default.refuse(options, shape)))
    for name in (options.data, options.heldout):
        if name is not None:
            attempt(lambda path=Path(name): read_documents(path))  # type: ignore[misc]
    if out.exists() and not out.is_dir():
        problems.append(f"--out must be a folder, but got {str(out)!r}, which is a file")
    if with_budget and (wrong := _budget_kind(options)):
        problems.append(wrong)
    elif with_budget and shape is not None and not problems:
        attempt(lambda: _check_budget(window_default.fill(options, shape)[0], shape))
    if options.sampler == "moead":
        attempt(lambda: make_sampler(options.sampler, options.seed))
    if options.storage is not None:
        attempt(lambda: open_storage(options.storage_url(out)))
    if problems:
        raise ProfileError(problems)


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
    }
    problems = []
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= minimum):
            problems.append(f"--{name.replace('_', '-')} must be at least {minimum}, but got {value}")
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
    if not problems and MIN_WINDOW <= options.window <= (least := window_default.WINDOW_SHARE * held):
        why = f"{window_default.WINDOW_SHARE} times the {held} that the recent window and the sink tokens keep"
        problems.append(f"--window must be more than {least} tokens, {why} unquantized, but got {options.window}")
    return problems


def _budget_kind(options: CalibrationOptions) -> str | None:
    by_memory = [options.memory is not None, options.context is not None, options.concurrency is not None]
    if (options.max_bits is None and all(by_memory)) or (options.max_bits is not None and not any(by_memory)):
        return None
    names = [name for name in GROUPS["search"][:4] if getattr(options, name) is not None]
    given = ", ".join(f"--{name.replace('_', '-')}" for name in names) or "none"
    return f"the budget must be given as --max-bits, or as --memory with --context and --concurrency, but got {given}"


def _check_layers(options: CalibrationOptions, shape: ModelShape) -> None:
    try:
        layers = options.unquantized_layers
    except ValueError as error:
        raise ValueError(f"--unquantized {error}") from None
    if unknown := sorted(set(layers) - set(shape.attention_layers)):
        rule = f"must name layers of {shape.name} that cache keys and values"
        raise ValueError(f"--unquantized {rule}, but got {', '.join(map(str, unknown))}")
    if set(layers) == set(shape.attention_layers):
        raise ValueError(f"--unquantized must leave a layer to choose pairs for, but got all {len(layers)}")


def shapes_of(shape: ModelShape) -> dict[int, tuple[int, int]]:
    """KV heads and head size of every layer that caches keys and values."""
    layers = {layer: shape.layers[layer] for layer in shape.attention_layers}
    return {layer: (each.num_kv_heads, each.head_size) for layer, each in layers.items()}


def _check_budget(options: CalibrationOptions, shape: ModelShape) -> None:
    shapes = shapes_of(shape)
    smallest = min(QUANTIZED_PAIRS, key=lambda pair: pair.nominal_bits)
    cheapest = [UNQUANTIZED if layer in options.unquantized_layers else smallest for layer in shapes]
    check_budget(options.max_bytes(shapes), shapes, cheapest)
