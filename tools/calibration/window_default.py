"""Windows that a calibration was not told: of its text, and the recent window where the model is served with it."""

from collections.abc import Iterator
from dataclasses import replace

from kvtuner_tools.calibration.options import (
    DEFAULT_RECENT_WINDOW,
    DEFAULT_SINK_TOKENS,
    DEFAULT_WINDOW,
    CalibrationOptions,
)
from kvtuner_tools.model_files import max_positions, text_value
from vllm_kvtuner.pages.layout import UNQUANTIZED
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import format_layers

WINDOW_SHARE = 4
"""Windows of text must be longer than this many times the tokens that the recent window and the sinks hold: attention
that is exact for most of a text says nothing of the pairs, and one that is exact for all of it has no error at all."""


def fill(options: CalibrationOptions, shape: ModelShape) -> tuple[CalibrationOptions, str | None]:
    """The options with ``window``, ``recent_window`` and ``sink_tokens`` as numbers.

    Args:
        options: with None where the default is wanted.
        shape: the model's.

    Returns:
        The options, and one line that says why there is no recent window, where that is not as asked, or None.
    """
    window, sink_tokens, left_out = options.recent_window, options.sink_tokens, None
    if window is None:
        broken = next(_broken_rules(options, shape, DEFAULT_RECENT_WINDOW), None)
        window = DEFAULT_RECENT_WINDOW if broken is None else 0
        if broken is not None:
            left_out = f"no recent window and no sink tokens: the window {broken}"
    if sink_tokens is None:
        sink_tokens = DEFAULT_SINK_TOKENS if window else 0
    text = options.window
    if text is None:
        text = min(DEFAULT_WINDOW, max_positions(options.model, options.source) - 1)
    return replace(options, window=text, recent_window=window, sink_tokens=sink_tokens), left_out


def refuse(options: CalibrationOptions, shape: ModelShape) -> Iterator[str]:
    """What is wrong with a recent window that was asked for."""
    if options.recent_window:
        for broken in _broken_rules(options, shape, options.recent_window):
            yield f"--recent-window {broken}"
    window = DEFAULT_RECENT_WINDOW if options.recent_window is None else options.recent_window
    if window and options.recent_window_bits != UNQUANTIZED.k_bits and _is_on_gpu():
        # Teacher-forced passes attend to cached prefill, where a chunk's newest tokens are read as they are.
        rule = f"must be {UNQUANTIZED.k_bits} on a GPU, where calibration reads back what it stored"
        yield f"--recent-window-bits {rule}, but got {options.recent_window_bits}"


def held_tokens(options: CalibrationOptions) -> int:
    """Tokens that a request's window and sinks hold, where the defaults are served."""
    window = DEFAULT_RECENT_WINDOW if options.recent_window is None else options.recent_window
    sink_tokens = DEFAULT_SINK_TOKENS if options.sink_tokens is None else options.sink_tokens
    return window + sink_tokens if window else 0


def _broken_rules(options: CalibrationOptions, shape: ModelShape, tokens: int) -> Iterator[str]:
    """``must <rule>, but got <value>`` of each rule that a window of so many tokens breaks with this model."""
    layers: dict[LayerShape, list[int]] = {}
    for index in shape.attention_layers:
        if index not in options.unquantized_layers:
            layers.setdefault(shape.layers[index], []).append(index)
    if len(layers) > 1:
        where = ", ".join(map(format_layers, layers.values()))
        yield f"must only be given to layers of one shape, but got layers of {len(layers)} shapes ({where})"
    sliding = text_value(options.model, "sliding_window", options.source)
    if isinstance(sliding, int) and sliding <= tokens:
        yield f"must be less than the layers' own sliding window of {sliding} tokens, but got {tokens}"


def _is_on_gpu() -> bool:
    import torch  # takes seconds to import, which a calibration that is refused should not

    return torch.cuda.is_available()
