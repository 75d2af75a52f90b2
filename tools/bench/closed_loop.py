"""Throughput with a fixed number of requests in flight: one that ends is replaced at once; and decoding alone."""

import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvtuner_tools.bench.points import ThroughputPoint

DECODE_STEPS = 32
"""Steps after the last request's first token that are timed on their own."""

SETTLE_STEPS = 16
"""Steps of a full engine before those, in which the loop catches up with what the engine has done meanwhile."""

FILL_STEPS = 64
"""Tokens that requests may generate while others still wait for their first, where decoding alone is measured."""


class Engine(Protocol):
    """What the loop uses of vLLM's LLMEngine."""

    def add_request(self, request_id: str, prompt: Any, params: Any) -> str: ...

    def abort_request(self, request_ids: list[str]) -> None: ...

    def step(self) -> list[Any]: ...

    def has_unfinished_requests(self) -> bool: ...


@dataclass(frozen=True)
class Step:
    """One engine step that returned something, or several as one.

    Args:
        seconds: since the one before ended.
        tokens: output tokens of all requests.
        requests: how many got some; with speculation one may get several.
        first_tokens: how many of the tokens were a request's first.
    """

    seconds: float
    tokens: int
    requests: int
    first_tokens: int


@dataclass(frozen=True)
class DecodeSteps:
    """Steps in which all requests decode, as means of one.

    Args:
        count: steps.
        seconds: of a step.
        tokens: output tokens of all requests in a step.
    """

    count: int
    seconds: float
    tokens: float

    def rates(self, requests: int) -> dict[str, float]:
        """What a result says of them."""
        return {
            "decode_ms": round(self.seconds * 1e3, 3),
            "decode_tok_s": round(self.tokens / self.seconds, 1),
            "decode_steps": self.count,
            "tokens_per_step": round(self.tokens / requests, 4),
        }


NO_RATES = dict.fromkeys(("decode_ms", "decode_tok_s", "decode_steps", "tokens_per_step"))
"""What a result says where there was no such step."""


class ClosedLoop:
    """Requests in flight in an engine, and the output tokens of each.

    While ``repeat`` is set, a request that replaces another has its prompt, which the prefix cache then holds.

    Args:
        engine: where they run.
        prompt: makes a new prompt's tokens.
        sampling: makes the parameters of a request with so many output tokens; they return tokens as they come.
        clock: seconds.
        most_per_step: tokens that a request gets in a step at most.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Callable[[], Sequence[int]],
        sampling: Callable[[int], Any],
        clock: Callable[[], float] = time.perf_counter,
        most_per_step: int = 1,
    ) -> None:
        self.engine = engine
        self.clock = clock
        self.most_per_step = most_per_step
        self.tokens: dict[str, int] = {}
        self.limits: dict[str, int] = {}
        self.repeat = False
        self._prompt = prompt
        self._prompts: dict[str, Sequence[int]] = {}
        self._sampling = sampling
        self._last = clock()
        self._submitted = 0

    def submit(self, output_tokens: int, prompt: Sequence[int] | None = None) -> None:
        """Add a request, with a new prompt if none is given."""
        request = str(self._submitted)
        self._submitted += 1
        self.tokens[request] = 0
        self._prompts[request] = self._prompt() if prompt is None else prompt
        self.engine.add_request(request, {"prompt_token_ids": self._prompts[request]}, self._sampling(output_tokens))

    def step(self, output_tokens: int) -> Step:
        """Run the engine until a step returns tokens; each request that ends is replaced by one of ``output_tokens``.

        A request also ends when its tokens reach its entry in ``limits``.
        """
        while not (outputs := self.engine.step()):
            pass
        now = self.clock()
        tokens = requests = first = 0
        ended = []
        for output in outputs:
            count = self.tokens.get(output.request_id)
            if count is None:
                continue  # aborted while this step ran
            new = len(output.outputs[0].token_ids)
            tokens += new
            requests += new > 0
            first += count == 0 and new > 0
            self.tokens[output.request_id] = count + new
            limit = self.limits.get(output.request_id)
            if output.finished:
                ended.append(output.request_id)
            elif limit is not None and count + new >= limit:
                self.engine.abort_request([output.request_id])
                ended.append(output.request_id)
        for request in ended:
            del self.tokens[request]
            self.limits.pop(request, None)
            prompt = self._prompts.pop(request)
            self.submit(output_tokens, prompt if self.repeat else None)
        seconds, self._last = now - self._last, now
        return Step(seconds, tokens, requests, first)

    def stop(self) -> None:
        """Abort what is in flight and let the engine drain."""
        self.engine.abort_request(list(self.tokens))
        self.tokens.clear()
        while self.engine.has_unfinished_requests():
            self.engine.step()


def fitting_requests(kv_tokens: int, block_size: int, tokens: int) -> int:
    """Requests of up to ``tokens`` tokens that ``kv_tokens`` of cache hold at once, a block being given to none."""
    blocks = -(-tokens // block_size)
    return (kv_tokens // block_size - 1) // blocks


@dataclass(frozen=True)
class Decode:
    """What :func:`measure_decode` found.

    Args:
        first_s: seconds until every request has its first token.
        steps: those in which all requests decode, None if there was none.
    """

    first_s: float
    steps: DecodeSteps | None


def measure_decode(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    steps: int,
    sampling: Callable[[int], Any],
    clock: Callable[[], float] = time.perf_counter,
    most_per_step: int = 1,
) -> Decode:
    """Submit all prompts at once, and time ``steps`` engine steps from when all of them have their first token.

    Only steps count in which every request got a token and none was prefilled. Arguments are :class:`ClosedLoop`'s.
    """
    loop = ClosedLoop(engine, itertools.cycle(prompts).__next__, sampling, clock, most_per_step)
    begin = clock()
    tokens = decode_room(steps, most_per_step)
    for _ in prompts:
        loop.submit(tokens)
    first_wave = set(loop.tokens)
    while any(loop.tokens.get(request) == 0 for request in first_wave):
        loop.step(tokens)
    first_s = clock() - begin
    taken = [loop.step(tokens) for _ in range(steps)]
    loop.stop()
    return Decode(first_s, _decode_steps(taken, len(prompts)))


def decode_room(steps: int, most_per_step: int = 1) -> int:
    """Tokens that a request of :func:`measure_decode` may generate."""
    return (FILL_STEPS + steps) * most_per_step


def throughput_room(point: ThroughputPoint, most_per_step: int = 1) -> int:
    """Tokens that the first requests of :func:`measure_throughput` may generate: their output, and as many steps' while
    others are prefilled."""
    return point.output * (1 + most_per_step)


def _decode_steps(steps: Sequence[Step], requests: int) -> DecodeSteps | None:
    """The steps in which all ``requests`` got a token and none was prefilled, None if there is no such step.

    The mean, since the steps of an engine that prepares one while another runs return in uneven turns: with 1,024
    requests a median of 12 ms was seen where the arithmetic alone takes 30.
    """
    pure = [step for step in steps if step.requests == requests and not step.first_tokens]
    if not pure:
        return None
    seconds, tokens = (statistics.mean(values) for values in ([s.seconds for s in pure], [s.tokens for s in pure]))
    return DecodeSteps(len(pure), seconds, tokens)


Progress = Callable[[str, float], None]
"""Told the name of a phase and the share of it that is done."""


def measure_throughput(
    loop: ClosedLoop,
    point: ThroughputPoint,
    concurrency: int,
    window_s: float,
    preemptions: Callable[[], int],
    progress: Progress = lambda phase, share: None,
) -> dict[str, Any]:
    """Closed-loop throughput of ``concurrency`` requests of the point's size.

    Four phases. *Fill*: all requests are submitted at once and prefilled. *Decode*: ``SETTLE_STEPS`` and then
    ``DECODE_STEPS`` steps while all of them generate. *Repeat*: ``window_s`` seconds of steady state, in which a
    request that ends is replaced by one with the same prompt, which is cached. *Window*: as many seconds in which new
    prompts are prefilled among the decodes.

    Args:
        loop: of an empty engine; its prompts have the point's tokens.
        point: prompt and output tokens of a request.
        concurrency: requests in flight.
        window_s: seconds of each steady state.
        preemptions: how many the engine has had so far.
        progress: told of each step.

    Returns:
        ``fill_s``; ``decode_ms``, ``decode_tok_s`` and ``tokens_per_step`` of a request, of the last ``DECODE_STEPS``
        of the decode phase's steps those in which every request got a token and none was prefilled, of which there
        were ``decode_steps`` (means; None if there was no such step);
        ``repeat_tok_s``, output tokens with cached prompts; ``window_s`` as it came out, ``output_tok_s``,
        ``total_tok_s`` (output tokens and the prompts prefilled meanwhile) and ``prompts`` of the window;
        ``preemptions`` in all phases.
    """
    preempted = preemptions()
    fill_s = _fill(loop, point, concurrency, progress)
    decode = _decode_alone(loop, point, concurrency, progress)
    _spread_ends(loop, point)
    loop.repeat = True
    repeat = _run_window(loop, point, window_s, functools.partial(progress, "repeat"))
    loop.repeat = False
    window = _run_window(loop, point, window_s, functools.partial(progress, "window"))
    preempted = preemptions() - preempted
    loop.stop()
    return {
        "fill_s": round(fill_s, 2),
        **(NO_RATES if decode is None else decode.rates(concurrency)),
        "repeat_tok_s": round(repeat.tokens / repeat.seconds, 1),
        "window_s": round(window.seconds, 2),
        "prompts": window.first_tokens,
        "output_tok_s": round(window.tokens / window.seconds, 1),
        "total_tok_s": round((window.tokens + window.first_tokens * point.prompt) / window.seconds, 1),
        "preemptions": preempted,
    }


def _fill(loop: ClosedLoop, point: ThroughputPoint, concurrency: int, progress: Progress) -> float:
    """Submit all requests at once; seconds until each has its first token."""
    begin = loop.clock()
    for _ in range(concurrency):
        loop.submit(throughput_room(point, loop.most_per_step))
    first_wave = set(loop.tokens)
    while waiting := sum(loop.tokens.get(request) == 0 for request in first_wave):
        progress("fill", 1 - waiting / concurrency)
        loop.step(point.output)
    return loop.clock() - begin


def _decode_alone(loop: ClosedLoop, point: ThroughputPoint, concurrency: int, progress: Progress) -> DecodeSteps | None:
    """Steps in which all requests decode, as :func:`_decode_steps`."""
    steps = []
    for index in range(SETTLE_STEPS + DECODE_STEPS):
        progress("decode", index / (SETTLE_STEPS + DECODE_STEPS))
        steps.append(loop.step(point.output))
    return _decode_steps(steps[SETTLE_STEPS:], concurrency)


def _spread_ends(loop: ClosedLoop, point: ThroughputPoint) -> None:
    """Let the requests in flight end evenly from now on, as they do in a loop that has run for long: their remaining
    lengths are spread over 1 to ``point.output``, in random order."""
    requests = list(loop.tokens)
    random.Random(0).shuffle(requests)
    for index, request in enumerate(requests):
        loop.limits[request] = loop.tokens[request] + -(-point.output * (index + 1) // len(requests))


def _run_window(loop: ClosedLoop, point: ThroughputPoint, window_s: float, progress: Callable[[float], None]) -> Step:
    """All steps of ``window_s`` seconds as one."""
    begin = loop.clock()
    tokens = requests = first_tokens = 0
    while (elapsed := loop.clock() - begin) < window_s:
        progress(elapsed / window_s)
        step = loop.step(point.output)
        tokens += step.tokens
        requests += step.requests
        first_tokens += step.first_tokens
    return Step(elapsed, tokens, requests, first_tokens)
