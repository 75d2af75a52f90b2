"""Mixed random requests for as long as one likes: python -m tests.soak --seconds 900.

Prompts of 1 token to the whole context, shared prefixes, sampling parameters of every kind, structured output, several
samples, cancellations, and a cache so small that requests are preempted. Each round checks that greedy text is what an
engine of its own gives for the request alone, that every block is free again, that no log-probability is NaN, and that
a fixed prompt still gets its first answer (on a GPU, its answer alone); the end, that neither the process's memory nor
what tensors hold on a GPU has grown. With ``--model``, weights that know a language, each round also asks for a needle
and a quote, which must be found as often among the others as alone. Prints one line of JSON; the exit status is 1 if
anything was wrong, and each failure says its round, which ``--first`` runs again.
"""

import argparse
import collections
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from kvtuner_tools.evaluation.needles import NeedleRequest, needle_set
from kvtuner_tools.evaluation.questions import Grade, QuestionSet
from kvtuner_tools.evaluation.quotes import QuoteRequest, quote_set
from kvtuner_tools.evaluation.statistics import paired_mean
from kvtuner_tools.model_files import load_model_shape, load_tokenizer
from tests.helpers.engine import SERVER_ENVIRONMENT, fork_server
from tests.helpers.tiny_model import make_tiny_model, make_tokenizer
from vllm_kvtuner.profile.load import load_profile

CONTEXT = 512
PROBE_CONTEXT = 2048
"""The whole context where needles and quotes are asked for: a sentence 700 words back has some 1,100 tokens."""
BLOCK_SIZE = 32
CONTEXTS = 1.5
"""Whole contexts that the cache holds."""
WINDOWS = 16
"""Recent windows, where the profile has one; a prompt's chunks hold several."""
KV_HEADS, HEAD_SIZE, LAYERS = 2, 64, 4
REQUESTS = 24
"""Of one round."""
COMPARED = 6
"""Greedy requests of a round that are run again alone."""
MAX_STEPS = 20_000
"""Steps of a round, after which its requests count as stuck."""
SETTLED = 80
"""Rounds in which caches of kernels by their shape fill up."""
MEMORY_GROWTH = 32 << 20
"""Bytes that the process may grow by after them, or in the second half; measured 5 MiB in 90 rounds."""
DEVICE_MEMORY_GROWTH = 4 << 20
"""The same of what tensors hold on a GPU."""
NEAR_TIE = {"cpu": 0.02, "cuda": 0.5}
"""Nats, by which a token may trail the best where texts part: float32 on CPUs and bf16 on GPUs round otherwise in other
batches, which moves single codes."""
N_GRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
UNSERVED_ON_CPU = ("seed",)
"""Where vLLM's CPU build cuts a seeded request's prompt up, it ends with "CPU Generator does not use offset"."""
UNSERVED_SPECULATIVELY = ("min_p", "logit_bias")
GREEDY_ALONE = {"temperature": 0, "n": 1, "top_k": 0, "top_p": 1.0}
"""Of every request that is speculated for on a CPU: vLLM's rejection sampler divides the logits of a batch that mixes
greedy requests with others by temperatures that no kernel has written there."""
STRUCTURES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"choice": ["yes", "no", "perhaps"]}, "yes|no|perhaps"),
    ({"regex": "[ab]{3,8}-[0-9]{2}"}, "[ab]{3,8}-[0-9]{2}"),
    (
        {"json": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}},
        r'\s*\{\s*"on"\s*:\s*(true|false)\s*\}\s*',
    ),
)
"""Structured outputs, and what the text must match."""
LOST = 3.0
"""Standard errors by which needles or quotes may be found less often among other requests than alone."""
TINY_TOKENIZER = make_tokenizer()

_engine: Any = None


@dataclass(frozen=True)
class Settings:
    """The engine under test.

    Args:
        model: folder.
        profile: file or pair.
        speculative: whether tokens are drafted.
        context: tokens of a request at most.
        probes: questions with a right answer, of which each round asks one of each set.
        tokenizer: of the model.
    """

    model: str
    profile: str
    speculative: bool
    context: int = CONTEXT
    probes: tuple[QuestionSet, ...] = ()
    tokenizer: Any = field(default=TINY_TOKENIZER, compare=False)


@dataclass
class Request:
    """One request of a round.

    Args:
        prompt: token ids.
        sampling: keywords of SamplingParams.
        arrival: step at which it is added.
        cancelled_at: step at which it is cancelled, if it still runs; None if never.
        pattern: what its text must match.
        output: what the engine gave last.
        probe: name and worth of its answer, of a request that asks for a needle or a quote.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    arrival: int
    cancelled_at: int | None
    pattern: str | None = None
    output: Any = None
    probe: tuple[str, Grade] | None = None

    @property
    def is_greedy(self) -> bool:
        return self.sampling.get("temperature") == 0 and self.pattern is None and len(self.sampling) == 4


def make_engine(settings: Settings) -> Any:
    """An engine whose cache holds one and a half contexts."""
    from vllm import LLM

    resolved = load_profile(settings.profile).resolve(load_model_shape(settings.model))
    tokens = math.ceil(CONTEXTS * settings.context / BLOCK_SIZE) * BLOCK_SIZE
    memory = tokens * resolved.bytes_per_token + WINDOWS * resolved.recent_bytes_per_request
    return LLM(
        settings.model,
        kv_cache_dtype="kvtuner",
        additional_config={"kvtuner_profile": settings.profile, "kvtuner_attend_cached_prefill": True},
        dtype="bfloat16" if torch.cuda.is_available() else "float32",
        max_model_len=settings.context,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=memory,
        gpu_memory_utilization=0.2,
        enforce_eager=not torch.cuda.is_available(),
        disable_log_stats=False,
        speculative_config=N_GRAM if settings.speculative else None,
    )


def start_reference(settings: Settings) -> None:
    global _engine
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    _engine = make_engine(settings)


def alone(prompts: Sequence[list[int]], max_tokens: Sequence[int]) -> list[tuple[list[int], list[dict[int, float]]]]:
    """Greedy tokens of each prompt by itself, in an empty cache, and the log-probabilities of the best five at each."""
    from vllm import SamplingParams

    answers = []
    for prompt, count in zip(prompts, max_tokens, strict=True):
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=5)
        _engine.reset_prefix_cache()
        (output,) = _engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        best = [{token: each.logprob for token, each in row.items()} for row in output.outputs[0].logprobs]
        answers.append((list(output.outputs[0].token_ids), best))
    return answers


def make_request(rng: random.Random, prefixes: Sequence[list[int]], unserved: Sequence[str]) -> Request:
    """Any request that a user could send, without the sampling parameters that vLLM does not serve."""
    length = rng.choice((1, 2, rng.randint(1, 40), int(2 ** rng.uniform(0, 8.99)), rng.randint(1, CONTEXT - 1)))
    prompt = [rng.randrange(10, 250) for _ in range(length)]
    if rng.random() < 0.4:
        prompt = (rng.choice(prefixes) + prompt)[: CONTEXT - 1]
    elif rng.random() < 0.3:
        prompt = (prompt[: rng.randint(1, 12)] * CONTEXT)[: len(prompt)]
    room = CONTEXT - len(prompt)
    sampling: dict[str, Any] = {"max_tokens": min(room, rng.choice((1, 2, 8, 24, 48))), "logprobs": 1}
    request = Request(prompt, sampling, rng.randrange(60), rng.randrange(120) if rng.random() < 0.15 else None)
    kind = rng.random()
    if kind < 0.5:
        sampling |= {"temperature": 0, "ignore_eos": True}
    elif kind < 0.65 and room > 40:
        structure, request.pattern = rng.choice(STRUCTURES)
        sampling |= {"temperature": rng.choice((0, 1.0)), "max_tokens": 40, "structured_outputs": structure}
    else:
        sampling |= {"temperature": rng.choice((0.2, 1.0, 1.7)), "n": rng.choice((1, 1, 2, 4))}
        extras: dict[str, Any] = {
            "top_p": 0.9,
            "top_k": 20,
            "min_p": 0.05,
            "seed": rng.randrange(100),
            "presence_penalty": 0.7,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.2,
            "min_tokens": 1,
            "prompt_logprobs": 1,
            "stop_token_ids": [rng.randrange(10, 250)],
            "logit_bias": {rng.randrange(10, 250): 5.0},
            "bad_words": ["ab"],
        }
        for name in rng.sample(sorted(extras), rng.randint(0, 4)):
            sampling[name] = extras[name]
        for name in unserved:
            sampling.pop(name, None)
    return request


def sampling_params(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    keywords = dict(request.sampling, output_kind=RequestOutputKind.FINAL_ONLY)
    if structure := keywords.pop("structured_outputs", None):
        keywords["structured_outputs"] = StructuredOutputsParams(**structure)
    return SamplingParams(**keywords)


def run_round(engine: Any, number: int, requests: Sequence[Request], counts: collections.Counter[str]) -> None:
    """All requests through the engine, arriving and being cancelled at their steps."""
    waiting = sorted(range(len(requests)), key=lambda index: requests[index].arrival)
    running: set[int] = set()
    for step in range(MAX_STEPS):
        while waiting and requests[waiting[0]].arrival <= step:
            index = waiting.pop(0)
            prompt = {"prompt_token_ids": requests[index].prompt}
            engine.add_request(f"{number}-{index}", prompt, sampling_params(requests[index]))
            running.add(index)
        for index in [each for each in running if requests[each].cancelled_at == step]:
            engine.abort_request([f"{number}-{index}"])
            running.discard(index)
            requests[index].output = None
            counts["cancelled"] += 1
        for output in engine.step():
            index = int(output.request_id.partition("-")[2])
            requests[index].output = output
            if output.finished:
                running.discard(index)
        if not waiting and not running:
            break
    assert not running and not waiting, f"round {number}: stuck after {MAX_STEPS} steps: {sorted(running)}"
    while engine.has_unfinished_requests():  # what was cancelled last
        engine.step()


def check_outputs(
    number: int, requests: Sequence[Request], counts: collections.Counter[str], tokenizer: Any = TINY_TOKENIZER
) -> None:
    """What holds of every answer by itself."""
    for index, request in enumerate(requests):
        if request.output is None:
            continue
        where = f"round {number}, request {index}"
        samples = request.output.outputs
        counts["finished"] += 1
        counts["samples"] += len(samples)
        counts["prompt tokens"] += len(request.prompt)
        counts["cached tokens"] += request.output.num_cached_tokens or 0
        assert len(samples) == request.sampling.get("n", 1), f"{where}: {len(samples)} samples"
        for sample in samples:
            counts["tokens"] += len(sample.token_ids)
            limit = request.sampling["max_tokens"]
            assert sample.finish_reason in ("stop", "length"), f"{where}: finished by {sample.finish_reason}"
            assert len(sample.token_ids) == limit or sample.finish_reason == "stop", f"{where}: too short"
            chosen = [row[token].logprob for row, token in zip(sample.logprobs, sample.token_ids, strict=True)]
            assert all(not math.isnan(each) for each in chosen), f"{where}: NaN"
            if request.pattern is not None and sample.finish_reason == "stop":
                counts["structured"] += 1
                # Not the engine's text, which begins with the prompt where random bytes are no UTF-8.
                text = tokenizer.decode(sample.token_ids, skip_special_tokens=True)
                assert re.fullmatch(request.pattern, text), f"{where}: {text!r}"


class Probes:
    """What needles and quotes were worth, among other requests and alone.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._worth: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)

    def add(self, request: Request, got: Sequence[int], alone: Sequence[int]) -> None:
        """Note the tokens of an answer, and those of the same request alone."""
        if request.probe is not None:
            name, grade = request.probe
            texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (got, alone)]
            self._worth[name].append((grade(texts[0]), grade(texts[1])))

    def report(self) -> dict[str, Any]:
        """For each kind how many were asked, and the mean worth of the answers; {} where none was asked."""
        return {
            name: {
                "asked": len(pairs),
                "among others": sum(mixed for mixed, _ in pairs) / len(pairs),
                "alone": sum(alone for _, alone in pairs) / len(pairs),
            }
            for name, pairs in self._worth.items()
        }

    def failures(self) -> list[str]:
        """Kinds that are found less often among other requests, by more than chance."""
        found = []
        for name, pairs in self._worth.items():
            difference, stderr = paired_mean(*zip(*pairs, strict=True))
            if difference < 0 and -difference > LOST * stderr:
                found.append(f"{name}: worth {-difference:.3f} ± {stderr:.3f} less among other requests than alone")
        return found


def check_text(
    number: int,
    requests: Sequence[Request],
    reference: ProcessPoolExecutor,
    counts: collections.Counter[str],
    probes: Probes,
) -> None:
    """Greedy answers against the reference's; texts may part at a near tie."""
    greedy = [each for each in reversed(requests) if each.is_greedy and each.output is not None][:COMPARED]
    prompts, limits = [each.prompt for each in greedy], [each.sampling["max_tokens"] for each in greedy]
    for request, (expected, best) in zip(greedy, reference.submit(alone, prompts, limits).result(), strict=True):
        got = list(request.output.outputs[0].token_ids)
        counts["compared"] += 1
        probes.add(request, got, expected)
        for mine, truth, row in zip(got, expected, best, strict=True):
            if mine != truth:
                gap = row[truth] - row.get(mine, -math.inf)
                limit = NEAR_TIE["cuda" if torch.cuda.is_available() else "cpu"]
                assert gap < limit, f"round {number}: prompt {request.prompt} gave {got}, alone {expected}, gap {gap}"
                counts["parted at a near tie"] += 1
                break


def make_round(number: int, settings: Settings) -> list[Request]:
    """The requests of a round, always the same for its number; the last is the same in all."""
    speculative = settings.speculative
    rng = random.Random(number)
    prefixes = [[rng.randrange(10, 250) for _ in range(size)] for size in (33, 64, 130, 300)]
    greedy = {"max_tokens": 16, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    unserved = UNSERVED_SPECULATIVELY if speculative else ()
    if not torch.cuda.is_available():
        unserved += UNSERVED_ON_CPU
    requests = [make_request(rng, prefixes, unserved) for _ in range(REQUESTS)]
    if speculative and not torch.cuda.is_available():
        for request in requests:
            request.sampling |= {} if request.is_greedy else GREEDY_ALONE
    return [*requests, *probe_requests(number, settings.probes), Request(list(range(20, 120)), greedy, 30, None)]


def probe_requests(number: int, probes: Sequence[QuestionSet]) -> list[Request]:
    """One question of each set, in turn over the rounds."""
    requests = []
    for arrival, each in enumerate(probes):
        index = number % len(each.prompts)
        sampling = {"max_tokens": each.max_tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        grade = each.grades[index]
        assert grade is not None, f"{each.name} has right answers"
        requests.append(Request(list(each.prompts[index]), sampling, 10 * arrival, None, probe=(each.name, grade)))
    return requests


def make_probes(tokenizer: Any, context: int) -> tuple[QuestionSet, ...]:
    """Needles of as much text as the context has room for, and quotes."""
    needles = needle_set(NeedleRequest((context - 64,)), tokenizer)
    return needles, quote_set(QuoteRequest(), tokenizer)


def soak(first: int, rounds: int, seconds: float, settings: Settings) -> dict[str, Any]:
    """Rounds from ``first`` on, until there are enough or the time is over; what happened, failures included."""
    counts: collections.Counter[str] = collections.Counter()
    failures, memory, device_memory, first_answer = [], [], [], None
    probes = Probes(settings.tokenizer)
    begin = time.monotonic()
    on_gpu = torch.cuda.is_available()
    # A process that has imported vLLM may not be fit to be forked into one that uses a GPU.
    context = multiprocessing.get_context("spawn") if on_gpu else fork_server()
    with ProcessPoolExecutor(1, context, start_reference, (replace(settings, probes=(), tokenizer=None),)) as reference:
        llm = make_engine(settings)
        engine = llm.llm_engine
        pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        for number in range(first, first + rounds):
            if time.monotonic() - begin > seconds:
                break
            requests = make_round(number, settings)
            counts["rounds"] += 1
            counts["requests"] += len(requests)
            try:
                run_round(engine, number, requests, counts)
                check_outputs(number, requests, counts, settings.tokenizer)
                left = pool.get_num_free_blocks()
                assert left == free, f"round {number}: {free - left} blocks were not freed"
                check_text(number, requests, reference, counts, probes)
                answer = requests[-1].output.outputs[0].token_ids
                first_answer = first_answer or answer
                # On a GPU the text may part at a near tie, which check_text judges.
                assert on_gpu or answer == first_answer, f"round {number}: {answer} was {first_answer} at first"
            except AssertionError as failure:
                failures.append(str(failure))
            memory.append(psutil.Process().memory_info().rss)
            device_memory.append(torch.cuda.memory_allocated() if on_gpu else 0)
        counts["preemptions"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    settled = min(max(SETTLED, len(memory) // 2), len(memory) - 1)
    report: dict[str, Any] = {"seconds": round(time.monotonic() - begin), **counts, **probes.report()}
    failures += probes.failures()
    for name, sizes, limit in (
        ("memory", memory, MEMORY_GROWTH),
        ("device memory", device_memory, DEVICE_MEMORY_GROWTH),
    ):
        growth = sizes[-1] - sizes[settled]
        if growth > limit:
            failures.append(f"{name} grew by {growth >> 20} MiB in {len(sizes)} rounds")
        report[f"{name} MiB"] = [each >> 20 for each in sizes[:: max(1, len(sizes) // 10)]]
        report[f"{name} grown MiB"] = growth >> 20
    return report | {"failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--rounds", type=int, default=1 << 62)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--profile", default="K8V8:plain", help="pair of all layers, or a profile for the tiny model")
    parser.add_argument("--speculative", action="store_true", help="draft tokens by n-gram")
    parser.add_argument("--model", help="folder of a model that needles and quotes are asked of (default: random)")
    parser.add_argument("--context", type=int, default=PROBE_CONTEXT, help="with --model, tokens of its requests")
    args = parser.parse_args()
    os.environ.update(SERVER_ENVIRONMENT, VLLM_LOGGING_LEVEL="ERROR")
    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            sizes = {"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
            settings = Settings(str(make_tiny_model(Path(folder) / "llama", **sizes)), args.profile, args.speculative)
        else:
            tokenizer = load_tokenizer(args.model)
            probes = make_probes(tokenizer, args.context)
            settings = Settings(args.model, args.profile, args.speculative, args.context, probes, tokenizer)
        report = soak(args.first, args.rounds, args.seconds, settings)
    print(json.dumps(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
