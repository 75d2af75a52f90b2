"""Rows of ``kvtuner evaluate --simulate``: what simulated caches lose, and what they take."""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from kvtuner_tools.calibration.calibration_text import CalibrationText, load_text
from kvtuner_tools.divergence import TokenScores
from kvtuner_tools.engine_arguments import EngineWords
from kvtuner_tools.engines.evaluate import EngineOptions, ReferenceLogits, Window
from kvtuner_tools.engines.simulate import CalibrationTexts, build, simulate
from kvtuner_tools.processes import OwnProcess, in_own_process
from kvtuner_tools.simulation.cache import Method, Storage
from kvtuner_tools.simulation.gradients import GradientJob, write_gradients
from kvtuner_tools.simulation.methods import NAMES, parse_method
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.profile import ResolvedProfile

STATED_TOKENS = 8192
"""Tokens of a request that bits are stated for, what methods keep exactly included."""
BLOCK = 32
"""Neighbouring positions that count as one where errors are estimated."""
SEED = 0
"""Of the drawing of calibration texts."""
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size")


@dataclass(frozen=True)
class SimulationRequest:
    """What to simulate.

    Args:
        methods: as the command line has them.
        data: text for methods that calibrate; None for the bundled set.
        tokens: of it.
        prompt_tokens: of each window that are prefilled exactly; what they predict is not scored.
    """

    methods: tuple[str, ...] = ()
    data: Path | None = None
    tokens: int = 4096
    prompt_tokens: int = 0


class Simulations:
    """The simulated settings of an evaluation. A context manager, whose engine starts with the first that is measured.

    Args:
        request: what to simulate.
        shape: the model.
        tokenizer: of the model.
        context: tokens of a window.
        words: vLLM's engine arguments.

    Raises:
        ValueError: everything that a method lacks, or that the simulation does not serve.
    """

    def __init__(
        self, request: SimulationRequest, shape: ModelShape, tokenizer: Any, context: int, words: EngineWords
    ) -> None:
        self._request = request
        self._model = shape.name
        self.methods = tuple(parse_method(text, shape) for text in request.methods)
        problems = [f"--simulate runs on one rank, but got {name}" for name in PARALLEL if words.get(name)]
        problems += [
            f"{method.label} compresses a prompt once: give --prompt-tokens"
            for method in self.methods
            if method.needs_prompt and not request.prompt_tokens
        ]
        if not 0 <= request.prompt_tokens < context - 1:
            problems.append(f"--prompt-tokens must be below the {context} of a window, but got {request.prompt_tokens}")
        if problems:
            raise ValueError("\n".join(problems))
        self._text: CalibrationText | None = None
        if any(method.calibrates for method in self.methods):
            self._text = load_text(request.data, tokenizer, tokens=request.tokens, context=context, seed=SEED)
        self._folder = tempfile.TemporaryDirectory(prefix="kvtuner-simulate-")
        self._process: OwnProcess | None = None

    def description(self) -> dict[str, Any]:
        """What the rows rest on, as JSON."""
        return {
            "methods": [method.label for method in self.methods],
            "calibration": None if self._text is None else self._text.identity,
            "prompt_tokens": self._request.prompt_tokens,
        }

    def measure(
        self,
        method: Method,
        options: EngineOptions,
        text: tuple[Window, ...],
        answers: tuple[Window, ...],
        reference: Callable[[], ReferenceLogits],
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The row of a method, and KL at all predicted positions of the answers.

        Args:
            method: one of :attr:`methods`.
            options: of an engine with an unquantized cache.
            text: windows of text.
            answers: prompts with answers to run along.
            reference: gives the logits of both, one after the other.
        """
        if self._process is None:
            texts = self._calibration()
            process = OwnProcess()
            process.run(build, options, reference(), texts)
            self._process = process
        started = time.monotonic()
        result = self._process.run(simulate, method, text, answers)
        lengths = [window.positions for window in text]
        scores = result.scores.part(0, sum(lengths))
        row = {
            "label": row_label(method),
            "simulated": method.label,
            "profile_sha256": None,
            "stored_bits": mean_bits(result.storages),
            "stored_bits_at": {
                str(tokens): mean_bits(result.storages, tokens) for tokens in (len(text[0].ids), STATED_TOKENS)
            },
            **scores.summary(),
            "kl_windows": scores.window_means(lengths),
            "kl_blocks": block_means(scores, lengths),
            "seconds": round(time.monotonic() - started, 1),
        }
        return row, result.scores.kl[sum(lengths) :]

    def _calibration(self) -> CalibrationTexts | None:
        if self._text is None:
            return None
        folder = None
        if any(method.needs_gradients for method in self.methods):
            folder = Path(self._folder.name)
            in_own_process(write_gradients, GradientJob(self._model, self._text.windows, folder))
        return CalibrationTexts(self._text.windows, folder)

    def __enter__(self) -> "Simulations":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.close()
        self._folder.cleanup()


def block_means(scores: TokenScores, lengths: Sequence[int]) -> list[float]:
    """Mean KL of each BLOCK neighbouring positions of the texts, whose errors hang together; the last ones of a text
    that fill no block are left out. For errors of paired differences between settings."""
    means, start = [], 0
    for length in lengths:
        blocks = scores.kl[start : start + length // BLOCK * BLOCK].reshape(-1, BLOCK)
        means += [float(each) for each in blocks.mean(1, dtype=np.float64)]
        start += length
    return means


def row_label(method: Method) -> str:
    """Unlike that of a real cache of the same format."""
    return f"simulated {method.label}"


def mean_bits(storages: tuple[Storage, ...], num_tokens: int | None = None) -> float:
    """Mean stored bits per number over layers of one shape.

    Args:
        storages: of the layers.
        num_tokens: of a request, whose exact tokens count; None for packed rows alone.
    """
    bits = [each.bits if num_tokens is None else each.bits_at(num_tokens) for each in storages]
    return sum(bits) / len(bits)


def profile_bits_at(resolved: ResolvedProfile, num_tokens: int) -> float:
    """Mean stored bits per number of a real cache, its recent windows' tokens counted, as :meth:`Storage.bits_at`."""
    numbers = resolved.bf16_bytes_per_token / 2
    return resolved.stored_bits + 8 * resolved.recent_bytes_per_request / (numbers * num_tokens)


def add_simulation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of simulated caches."""
    group = parser.add_argument_group("simulated caches")
    group.add_argument(
        "--simulate",
        action="append",
        default=[],
        metavar="METHOD",
        help=f"cache to simulate in attention, NAME[:PARAMETER...]: {', '.join(NAMES)}; repeat",
    )
    group.add_argument(
        "--calibration-data", type=Path, metavar="FILE", help="text for methods that calibrate (default: bundled)"
    )
    group.add_argument(
        "--calibration-tokens", type=int, default=4096, metavar="TOKENS", help="of it (default: %(default)s)"
    )
    group.add_argument(
        "--prompt-tokens",
        type=int,
        default=0,
        metavar="TOKENS",
        help="of each window that are prefilled exactly and not scored, for methods that compress a prompt "
        "(default: %(default)s)",
    )


def simulation_request(args: argparse.Namespace) -> SimulationRequest:
    """What :func:`add_simulation_arguments` parsed."""
    return SimulationRequest(tuple(args.simulate), args.calibration_data, args.calibration_tokens, args.prompt_tokens)
