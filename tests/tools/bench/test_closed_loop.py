"""The closed loop: against an engine with a known cost model, and against vLLM's."""

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest

from kvtuner_tools.bench.closed_loop import (
    DECODE_STEPS,
    FILL_STEPS,
    SETTLE_STEPS,
    ClosedLoop,
    fitting_requests,
    measure_decode,
    measure_throughput,
)
from kvtuner_tools.bench.points import ThroughputPoint

STEP_S, PREFILL_S, DECODE_S = 1.0, 0.001, 0.01
"""Seconds of a step of the fake engine, and of every prompt and every output token in it."""


class FakeEngine:
    """Chunked prefill with decodes first, on a clock of its own; every other step returns nothing first.

    A step gives a decoding request the next of ``accepted`` tokens, in turns, and one of its first a single token. Of a
    prompt that it has seen, all but the last token is cached, if prompts are told apart. Three of four steps
    return ``early`` seconds too soon, and the fourth as much later as makes up for them.
    """

    def __init__(
        self, batched_tokens: int, caches: bool = False, early: float = 0.0, accepted: tuple[int, ...] = (1,)
    ) -> None:
        self.batched_tokens = batched_tokens
        self.caches = caches
        self.early = early
        self.accepted = itertools.cycle(accepted)
        self.seen: set[tuple[int, ...]] = set()
        self.now = 0.0
        self.requests: dict[str, SimpleNamespace] = {}
        self.most_in_flight = 0
        self.generated: dict[str, int] = {}
        self.aborted: list[str] = []
        self.first_tokens: list[int] = []
        self._idle = False

    def add_request(self, request_id: str, prompt: dict, params: int) -> str:
        tokens = tuple(prompt["prompt_token_ids"])
        cached = len(tokens) - 1 if self.caches and tokens in self.seen else 0
        self.seen.add(tokens)
        self.requests[request_id] = SimpleNamespace(prompt=len(tokens) - cached, tokens=0, limit=params)
        self.most_in_flight = max(self.most_in_flight, len(self.requests))
        return request_id

    def abort_request(self, request_ids: list[str]) -> None:
        for request in request_ids:
            self.generated[request] = self.requests.pop(request).tokens
            self.aborted.append(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[SimpleNamespace]:
        self._idle = not self._idle
        if self._idle:
            return []
        decoding = [name for name, request in self.requests.items() if not request.prompt]
        budget = self.batched_tokens - len(decoding)
        began = []
        for name, request in self.requests.items():
            if chunk := min(request.prompt, budget):
                request.prompt -= chunk
                budget -= chunk
                began += [] if request.prompt else [name]
        prefilled = self.batched_tokens - len(decoding) - budget
        self.now += STEP_S + PREFILL_S * prefilled + DECODE_S * (len(decoding) + len(began))
        self.now += -self.early if len(self.first_tokens) % 4 else 3 * self.early
        self.first_tokens.append(len(began))
        outputs = []
        for name in decoding + began:
            request = self.requests[name]
            new = 1 if name in began else min(next(self.accepted), request.limit - request.tokens)
            request.tokens += new
            finished = request.tokens == request.limit
            if finished:
                self.generated[name] = self.requests.pop(name).tokens
            outputs.append(
                SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[7] * new)], finished=finished)
            )
        return outputs


def run(engine: FakeEngine, point: ThroughputPoint, concurrency: int, window_s: float, most_per_step: int = 1) -> dict:
    preemptions = Counter()

    def preempted() -> int:
        preemptions["asked"] += 1
        return 5 * preemptions["asked"]

    numbers = itertools.count()
    loop = ClosedLoop(
        engine, lambda: [next(numbers)] * point.prompt, lambda tokens: tokens, lambda: engine.now, most_per_step
    )
    return measure_throughput(loop, point, concurrency, window_s, preempted)


def test_rates_are_those_of_the_engine():
    engine, point, concurrency = FakeEngine(200, caches=True), ThroughputPoint(100, 50), 8

    result = run(engine, point, concurrency, window_s=600.0)

    assert engine.most_in_flight == concurrency
    assert result["decode_ms"] == pytest.approx(1e3 * (STEP_S + concurrency * DECODE_S))
    assert result["decode_tok_s"] == pytest.approx(concurrency / (STEP_S + concurrency * DECODE_S), abs=0.1)
    assert (result["decode_steps"], result["tokens_per_step"]) == (DECODE_STEPS, 1)
    # Each step every request gets a token, and one prompt is prefilled for every 50 of them.
    step_s = STEP_S + concurrency * (DECODE_S + PREFILL_S * point.prompt / point.output)
    assert result["output_tok_s"] == pytest.approx(concurrency / step_s, rel=0.02)
    # With cached prompts, one token of a prompt.
    cached_step_s = STEP_S + concurrency * (DECODE_S + PREFILL_S / point.output)
    assert result["repeat_tok_s"] == pytest.approx(concurrency / cached_step_s, rel=0.01)
    prompts_s = concurrency / point.output / step_s
    assert result["prompts"] == pytest.approx(600 * prompts_s, rel=0.05)
    assert result["total_tok_s"] == pytest.approx(concurrency / step_s + prompts_s * point.prompt, rel=0.05)
    assert result["window_s"] == pytest.approx(600, abs=2)
    assert result["preemptions"] == 5
    assert not engine.has_unfinished_requests(), "the next point begins with an empty engine"


def test_steps_that_return_in_uneven_turns():
    """As those of an engine that prepares one step while another runs."""
    engine = FakeEngine(200, early=0.4)

    result = run(engine, ThroughputPoint(100, 50), 8, window_s=10.0)

    assert result["decode_ms"] == pytest.approx(1e3 * (STEP_S + 8 * DECODE_S))


def test_requests_end_evenly_from_the_windows_beginning_on():
    engine, point, concurrency = FakeEngine(200), ThroughputPoint(100, 50), 10

    run(engine, point, concurrency, window_s=200.0)

    begin = concurrency // 2 + 1 + SETTLE_STEPS + DECODE_STEPS
    ends = engine.first_tokens[begin:]
    assert max(ends) == 1, "a request in 5 steps, never two at once"
    gaps = [step for step, count in enumerate(ends) if count]
    assert all(4 <= later - sooner <= 6 for sooner, later in itertools.pairwise(gaps))
    replaced = [count for name, count in engine.generated.items() if int(name) >= concurrency]
    assert point.output in replaced
    assert max(replaced) == point.output


def test_a_loop_that_never_decodes_alone_says_so():
    """So short an output that prompts are prefilled in every step."""
    result = run(FakeEngine(100), ThroughputPoint(100, 4), 8, window_s=100.0)

    assert {result[key] for key in ("decode_ms", "decode_tok_s", "decode_steps", "tokens_per_step")} == {None}
    assert result["output_tok_s"] > 0


ACCEPTED = (4, 1, 1, 3, 4, 2, 1)
"""Tokens that requests get in their steps, where 3 are drafted."""


def test_rates_with_speculation():
    engine, point, concurrency = FakeEngine(200, caches=True, accepted=ACCEPTED), ThroughputPoint(100, 50), 8

    result = run(engine, point, concurrency, window_s=600.0, most_per_step=4)

    mean = sum(ACCEPTED) / len(ACCEPTED)
    step_s = STEP_S + concurrency * DECODE_S
    assert result["decode_steps"] == DECODE_STEPS, "no request ended while the others were prefilled or in these steps"
    assert result["decode_ms"] == pytest.approx(1e3 * step_s)
    assert result["tokens_per_step"] == pytest.approx(mean, rel=0.03)
    assert result["decode_tok_s"] == pytest.approx(result["tokens_per_step"] * concurrency / step_s, abs=0.1)
    # The first token is a step's alone, and the last step gives about one less than it accepted.
    in_loop = point.output / (1 + point.output / mean)
    prefill_s = PREFILL_S * point.prompt * in_loop / point.output
    assert result["output_tok_s"] == pytest.approx(concurrency * in_loop / (step_s + concurrency * prefill_s), rel=0.02)


def test_decoding_alone_with_speculation():
    engine = FakeEngine(200, accepted=ACCEPTED)

    found = measure_decode(engine, [[1] * 100] * 8, 20, lambda tokens: tokens, lambda: engine.now, most_per_step=4)

    assert (found.steps.count, found.steps.seconds) == (20, pytest.approx(STEP_S + 8 * DECODE_S))
    assert found.steps.tokens / 8 == pytest.approx(sum(ACCEPTED) / len(ACCEPTED), rel=0.03)


def test_decoding_alone():
    """Steps before all have their first token do not count, and nothing is left behind."""
    engine = FakeEngine(200)

    found = measure_decode(engine, [[1] * 100] * 8, 20, lambda tokens: tokens, lambda: engine.now)

    assert found.steps.seconds == pytest.approx(STEP_S + 8 * DECODE_S)
    assert (found.steps.count, found.steps.tokens) == (20, 8)
    assert found.first_s == pytest.approx(5 * STEP_S + 800 * PREFILL_S + (2 + 3 + 5 + 7 + 8) * DECODE_S)
    assert not engine.has_unfinished_requests()
    assert set(engine.generated.values()) <= set(range(20, 20 + FILL_STEPS)), "none ended while it was timed"


def test_decoding_that_is_never_alone_says_so():
    """So many prompts that the first requests have ended before the last begin."""
    engine = FakeEngine(100)

    found = measure_decode(engine, [[1] * 100] * 200, 4, lambda tokens: tokens, lambda: engine.now)

    assert found.steps is None


def test_requests_that_fit():
    assert fitting_requests(kv_tokens=831_494, block_size=16, tokens=4608) == 180
    assert fitting_requests(kv_tokens=64, block_size=16, tokens=17) == 1, "two blocks each, and one for none"
    assert fitting_requests(kv_tokens=32, block_size=16, tokens=17) == 0
