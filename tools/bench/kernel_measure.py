"""Runs the cases of ``kvtuner bench kernel`` one after the other on one card."""

import functools
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvtuner_tools.bench.kernel_inputs import attention_float64, copies_for, make_batch, make_transforms, new_tokens
from kvtuner_tools.bench.kernel_request import KernelRequest
from kvtuner_tools.bench.kernels import implementations
from kvtuner_tools.bench.kernels.base import CacheFormat, Calls, DecodeKernel, Unsupported
from kvtuner_tools.bench.kernels.packed import packed_format
from kvtuner_tools.bench.points import KernelPoint, LayerHeads, QueryTokens
from kvtuner_tools.bench.timing import time_calls


@dataclass(frozen=True)
class ErrorInputs:
    """A batch that kernels are compared on with float64: lengths of its requests, and scales of queries and keys."""

    lengths: tuple[int, ...]
    query_scale: float = 1.0
    key_scale: float = 1.0


ERROR_INPUTS = {
    "random": ErrorInputs((4096, 1, 17, 512, 1000)),
    "nearly_uniform": ErrorInputs((131072,), query_scale=0.01),
    "large_keys": ErrorInputs((4096, 1, 17, 512, 1000), key_scale=100.0),
}
"""Large keys reach about 300. Weights of the nearly uniform one are all within some percent of 1 / 131072."""
STORE_TOKENS = ((64, True), (16384, False))
"""Tokens of a store, and whether each belongs to a request of its own (decode)."""


ONE_TOKEN = QueryTokens((1,))


@dataclass(frozen=True)
class KernelCase:
    """One line of the result.

    Args:
        part: of ``kernel_request.PARTS``.
        heads: of the layer.
        block_size: tokens per block.
        implementation: its name.
        cache_format: what it stores.
        transforms: of ``points.TRANSFORMS``.
        point: the requests to decode.
        query_tokens: that they bring.
        tokens: tokens to store or gather.
        decode: whether stored tokens belong to a request each.
    """

    part: str
    heads: LayerHeads
    block_size: int
    implementation: str
    cache_format: CacheFormat
    transforms: str
    point: KernelPoint | None = None
    query_tokens: QueryTokens = ONE_TOKEN
    tokens: int = 0
    decode: bool = False

    def __str__(self) -> str:
        place = self.tokens if self.point is None else f"{self.heads} {self.point} {self.query_tokens}"
        return f"{self.part} {self.implementation} {self.cache_format.name} {place}"

    def head(self) -> dict[str, Any]:
        """What identifies it, as JSON."""
        where: dict[str, Any] = {"tokens": self.tokens}
        if self.point is not None:
            where = {
                "point": str(self.point),
                "requests": len(self.point.lengths),
                "tokens": sum(self.point.lengths),
                "query_tokens": str(self.query_tokens),
                "rows_per_kv_head": self.heads.group * self.query_tokens.most,
            }
        return {
            "implementation": self.implementation,
            "format": self.cache_format.name,
            "transforms": self.transforms,
            "nominal_bits": self.cache_format.nominal_bits,
            "stored_bits": self.cache_format.stored_bits(self.heads.head_size),
            "shape": str(self.heads),
            "block_size": self.block_size,
            **where,
        }


class RelativeError(NamedTuple):
    """How far a kernel's output lies from float64, over the largest output.

    Args:
        largest: of all numbers.
        rounding: the same if the kernel made no error, but that its output must be rounded to its dtype.
    """

    largest: float
    rounding: float


@dataclass(frozen=True)
class ErrorCase:
    """What a decode kernel's error depends on."""

    implementation: str
    heads: LayerHeads
    block_size: int
    cache_format: CacheFormat
    transforms: str
    query_tokens: QueryTokens
    device: torch.device

    def errors(self) -> dict[str, RelativeError]:
        """By name of ``ERROR_INPUTS``."""
        return {name: self.error(inputs) for name, inputs in ERROR_INPUTS.items()}

    def error(self, inputs: ErrorInputs) -> RelativeError:
        """Against float64 on the same stored bytes and queries.

        Raises:
            ArithmeticError: the kernel wrote something that is no number, or not all of its output.
        """
        lengths = [max(length, self.query_tokens.most) for length in inputs.lengths]
        batch = make_batch(
            self.heads,
            self.block_size,
            lengths,
            self.query_tokens,
            copies=1,
            device=self.device,
            query_scale=inputs.query_scale,
            key_scale=inputs.key_scale,
        )
        transforms = make_transforms(self.transforms, self.heads, max(lengths), self.device)
        launches = implementations.DECODE[self.implementation].build(batch, self.cache_format, transforms)
        launches.output.fill_(torch.nan)
        launches.calls[0]()
        keys, values = launches.rows()
        want = attention_float64(batch, launches.query, keys, values)
        largest, rounding = (
            ((got.double() - want).abs().max() / want.abs().max()).item()
            for got in (launches.output, want.to(launches.output.dtype))
        )
        if not math.isfinite(largest):
            raise ArithmeticError("the kernel's output holds numbers that are not finite")
        return RelativeError(largest, rounding)


class KernelMeter:
    """Plans and measures the cases of a request.

    Args:
        request: what to measure.
        device: the card.
        l2_bytes: size of its L2 cache.
        read_bandwidth: bytes per second that a plain kernel reads on it, now.
    """

    def __init__(self, request: KernelRequest, device: torch.device, l2_bytes: int, read_bandwidth: float) -> None:
        self.request = request
        self.device = device
        self.l2_bytes = l2_bytes
        self.read_bandwidth = read_bandwidth
        self._kernels = {
            name: kernel for name, kernel in implementations.DECODE.items() if name in request.implementations
        }
        self._errors: dict[ErrorCase, dict[str, RelativeError] | Exception] = {}

    def plan(self) -> tuple[list[KernelCase], list[dict[str, str]]]:
        """All cases, and implementation, part and reason of what cannot run here."""
        cases: list[KernelCase] = []
        skipped: list[dict[str, str]] = []
        for heads in self.request.shapes:
            for block_size in self.request.block_sizes:
                for part in ("decode", "layer"):
                    able = self._able(part, heads, block_size, skipped)
                    cases += self._decode_cases(part, able, heads, block_size)
                if "store" in self.request.parts:
                    cases += self._store_cases(heads, block_size, skipped)
                if "gather" in self.request.parts:
                    cases += self._gather_cases(heads, block_size, skipped)
        return cases, skipped

    def _able(
        self, part: str, heads: LayerHeads, block_size: int, skipped: list[dict[str, str]]
    ) -> dict[str, DecodeKernel]:
        if part not in self.request.parts:
            return {}
        able = {}
        for name, kernel in self._kernels.items():
            if reason := kernel.skip_reason(heads, block_size):
                _skip(skipped, name, part, reason)
            else:
                able[name] = kernel
        return able

    def _decode_cases(
        self, part: str, kernels: dict[str, DecodeKernel], heads: LayerHeads, block_size: int
    ) -> Iterator[KernelCase]:
        for point, query_tokens in itertools.product(self.request.points, self.request.query_tokens):
            for name, kernel in kernels.items():
                for cache_format in kernel.formats(self.request.pairs, heads.head_size):
                    for transforms in self.request.transforms if kernel.transformed else ("none",):
                        yield KernelCase(part, heads, block_size, name, cache_format, transforms, point, query_tokens)

    def _store_cases(self, heads: LayerHeads, block_size: int, skipped: list[dict[str, str]]) -> Iterator[KernelCase]:
        for name, kernel in implementations.STORE.items():
            if reason := kernel.skip_reason():
                _skip(skipped, name, "store", reason)
                continue
            for cache_format in kernel.formats(self.request.store_pairs, heads.head_size):
                for transforms in self.request.transforms if kernel.transformed else ("none",):
                    for tokens, decode in STORE_TOKENS:
                        yield KernelCase(
                            "store", heads, block_size, name, cache_format, transforms, tokens=tokens, decode=decode
                        )

    def _gather_cases(self, heads: LayerHeads, block_size: int, skipped: list[dict[str, str]]) -> Iterator[KernelCase]:
        for name, kernel in implementations.GATHER.items():
            if reason := kernel.skip_reason():
                _skip(skipped, name, "gather", reason)
                continue
            for pair in self.request.store_pairs:
                for transforms in self.request.transforms:
                    yield KernelCase(
                        "gather", heads, block_size, name, packed_format(pair, heads.head_size), transforms,
                        tokens=self.request.gather_tokens,
                    )  # fmt: skip

    def compare(self, cases: Sequence[KernelCase], jobs: int, done: Callable[[int, int], None]) -> None:
        """Find the error of every decode kernel of ``cases``, in ``jobs`` processes at once.

        Their compiled kernels are on disk then, so that compilation, which takes far longer than all the rest, takes
        place on many cores.

        Args:
            cases: of :meth:`plan`.
            jobs: processes.
            done: told how many of how many are known.
        """
        wanted = list(dict.fromkeys(self._error_case(case) for case in cases if case.point is not None))
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {case: pool.submit(case.errors) for case in wanted}
            for index, (case, future) in enumerate(futures.items()):
                done(index, len(wanted))
                try:
                    self._errors[case] = future.result()
                except Exception as error:  # a kernel can fail in any way; the others must still be measured
                    self._errors[case] = error

    def measure(self, case: KernelCase) -> dict[str, Any]:
        """The case's entry: ``us`` and what follows from it; or the reason in ``failure``, or in ``unsupported``."""
        torch.manual_seed(0)
        entry: dict[str, Any] = {**case.head(), "failure": None, "unsupported": None}
        try:
            measures = {"decode": self._decode, "layer": self._decode, "store": self._store, "gather": self._gather}
            entry |= measures[case.part](case)
        except Unsupported as reason:
            entry["unsupported"] = str(reason)
        except Exception as error:  # as in compare
            entry["failure"] = f"{type(error).__name__}: {error}"
        torch.cuda.empty_cache()
        return entry

    def _decode(self, case: KernelCase) -> dict[str, Any]:
        assert case.point is not None
        stored = sum(case.point.lengths) * case.heads.num_kv_heads * case.cache_format.content_bytes
        copies = copies_for(stored, self.l2_bytes)
        errors = self._case_errors(case)
        batch = make_batch(case.heads, case.block_size, case.point.lengths, case.query_tokens, copies, self.device)
        transforms = make_transforms(case.transforms, case.heads, max(case.point.lengths), self.device)
        launches = self._kernels[case.implementation].build(batch, case.cache_format, transforms)
        calls = launches.calls
        if case.part == "layer":
            calls = [
                functools.partial(_store_and_attend, store, attend)
                for store, attend in zip(launches.stores, launches.calls, strict=True)
            ]
        return {
            "copies": copies,
            **self._timed(calls, stored),
            "relative_errors": {name: error.largest for name, error in errors.items()},
            "rounding_errors": {name: error.rounding for name, error in errors.items()},
        }

    def _error_case(self, case: KernelCase) -> ErrorCase:
        return ErrorCase(
            implementation=case.implementation,
            heads=case.heads,
            block_size=case.block_size,
            cache_format=case.cache_format,
            transforms=case.transforms,
            query_tokens=case.query_tokens,
            device=self.device,
        )

    def _case_errors(self, case: KernelCase) -> dict[str, RelativeError]:
        wanted = self._error_case(case)
        if wanted not in self._errors:
            self._errors[wanted] = wanted.errors()
        errors = self._errors[wanted]
        if isinstance(errors, Exception):
            raise errors
        return errors

    def _store(self, case: KernelCase) -> dict[str, Any]:
        tokens = new_tokens(case.heads, case.block_size, case.tokens, case.decode, self.device)
        transforms = make_transforms(case.transforms, case.heads, max(case.tokens, 2048), self.device)
        calls = implementations.STORE[case.implementation].build(tokens, case.cache_format, transforms)
        return self._timed(calls, tokens.moved_bytes(case.cache_format.content_bytes))

    def _gather(self, case: KernelCase) -> dict[str, Any]:
        assert case.cache_format.pair is not None
        moved = case.tokens * case.heads.num_kv_heads * (case.cache_format.content_bytes + 4 * case.heads.head_size)
        copies = copies_for(moved, self.l2_bytes)
        batch = make_batch(case.heads, case.block_size, [case.tokens], ONE_TOKEN, copies, self.device)
        transforms = make_transforms(case.transforms, case.heads, case.tokens, self.device)
        calls = implementations.GATHER[case.implementation].build(batch, case.cache_format.pair, transforms)
        return self._timed(calls, moved)

    def _timed(self, calls: Calls, num_bytes: int) -> dict[str, Any]:
        timing = time_calls(calls, self.request.samples, self.request.sample_ms)
        rate = num_bytes / (timing.us * 1e-6)
        given = self.request.bandwidth
        return {
            "us": round(timing.us, 3),
            "us_min": round(timing.us_min, 3),
            "us_max": round(timing.us_max, 3),
            "bytes": num_bytes,
            "bytes_s": rate,
            "fraction_measured": rate / self.read_bandwidth,
            "fraction_given": None if given is None else rate / given,
        }


def _store_and_attend(store: Callable[[], None], attend: Callable[[], None]) -> None:
    store()
    attend()


def _skip(skipped: list[dict[str, str]], name: str, part: str, reason: str) -> None:
    entry = {"implementation": name, "part": part, "reason": reason}
    if entry not in skipped:
        skipped.append(entry)
