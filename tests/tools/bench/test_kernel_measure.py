"""Cases of the kernel benchmark: their plan, errors and entries; times need a GPU."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from kvtuner_tools.bench import kernel_measure
from kvtuner_tools.bench.kernel_measure import ErrorCase, ErrorInputs, KernelMeter
from kvtuner_tools.bench.kernels import vllm
from kvtuner_tools.bench.kernels.base import Unsupported
from kvtuner_tools.bench.kernels.packed import TritonKernel, packed_format
from kvtuner_tools.bench.points import TRANSFORMS, QueryTokens
from kvtuner_tools.bench.timing import Timing
from tests.helpers.kernel_bench import HEADS, request_of
from vllm_kvtuner.pages.layout import PrecisionPair

FEW = ErrorInputs((70, 1, 17))
BF16_ERROR = 8e-3
"""Over the largest output: twice what bf16 rounds it by, with the interpreter's truncation."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize("query_tokens", ["1", "3", "1+3"])
@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_error_of_the_triton_kernel(transforms, query_tokens, device):
    cache_format = packed_format(PrecisionPair(4, 2), 64)
    tokens = QueryTokens.parse(query_tokens)
    error = ErrorCase("triton", HEADS, 16, cache_format, transforms, tokens, device).error(FEW)
    assert 1e-4 < error.largest < BF16_ERROR
    assert 1e-4 < error.rounding < 2**-8
    assert error.largest < 2 * error.rounding + 1e-3, "little but rounding, for which the interpreter truncates"


@pytest.mark.slow
def test_a_wrong_kernel_has_a_large_error(device, monkeypatch):
    """Here one that leaves a row out, and one that reads another request's blocks."""
    case = ErrorCase("triton", HEADS, 16, packed_format(PrecisionPair(8, 8), 64), "none", QueryTokens((1,)), device)
    build = TritonKernel.build

    def partial(self, *arguments):
        launches = build(self, *arguments)
        return replace(launches, calls=(lambda: launches.output[1:].zero_(),))

    monkeypatch.setattr(TritonKernel, "build", partial)
    with pytest.raises(ArithmeticError, match="not finite"):
        case.error(FEW)

    def misled(self, batch, *arguments):
        launches = build(self, batch, *arguments)
        rows = launches.rows()
        batch.block_tables[0][:] = batch.block_tables[0].flip(0)
        return replace(launches, rows=lambda: rows)

    monkeypatch.setattr(TritonKernel, "build", misled)
    assert case.error(FEW).largest > 0.05


def test_what_cannot_run_here_is_skipped_with_the_reason(device, monkeypatch):
    if device.type == "cpu":
        meter = KernelMeter(request_of(), device, 1, 1.0)
        cases, skipped = meter.plan()
        assert {case.implementation for case in cases} == {"triton"}
        reasons = {(entry["part"], entry["implementation"]): entry["reason"] for entry in skipped}
        assert reasons == {
            ("decode", "fa3_bf16"): "needs an NVIDIA GPU",
            ("decode", "fa3_fp8"): "needs an NVIDIA GPU",
            ("decode", "xqa_bf16"): "needs an NVIDIA GPU",
            ("decode", "xqa_fp8"): "needs an NVIDIA GPU",
            ("decode", "int4_per_token_head"): "needs an NVIDIA GPU",
            ("decode", "cuda"): "needs an NVIDIA GPU",
            ("layer", "fa3_bf16"): "needs an NVIDIA GPU",
            ("layer", "fa3_fp8"): "needs an NVIDIA GPU",
            ("layer", "xqa_bf16"): "needs an NVIDIA GPU",
            ("layer", "xqa_fp8"): "needs an NVIDIA GPU",
            ("layer", "int4_per_token_head"): "needs an NVIDIA GPU",
            ("layer", "cuda"): "needs an NVIDIA GPU",
            ("store", "reshape_and_cache_flash auto"): "needs an NVIDIA GPU",
            ("store", "reshape_and_cache_flash fp8"): "needs an NVIDIA GPU",
            ("store", "cuda"): "needs an NVIDIA GPU",
            ("gather", "cuda"): "needs an NVIDIA GPU",
        }
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    assert vllm.vllm_skip_reason() == "vLLM is not installed"


def test_a_plan_holds_every_case_once(device):
    request = request_of(
        "--shape=4/2/64", "--shape=7/1/64", "--points=1x4,2x8", "--pairs=K4V4,K2V2", "--store-pairs=K8V8",
        "--transforms=none,all", "--implementations=triton", "--query-tokens=1,4",
    )  # fmt: skip
    cases, _ = KernelMeter(request, device, 1, 1.0).plan()

    for part in ("decode", "layer"):
        chosen = [case for case in cases if case.part == part]
        assert len(chosen) == len(set(chosen)) == 2 * 2 * 2 * 2 * 2
        assert {str(case.query_tokens) for case in chosen} == {"1", "4"}
    ours = [case for case in cases if case.part == "store" and case.implementation == "triton"]
    assert len(ours) == 2 * 2 * 2
    assert sum(case.part == "gather" for case in cases) == 2 * 2


@pytest.fixture
def fixed_time(monkeypatch):
    """Calls are made once and take 10 us."""

    def once(calls, samples, sample_ms):
        for call in calls:
            call()
        return Timing(10.0, 9.0, 12.0)

    monkeypatch.setattr(kernel_measure, "time_calls", once)
    monkeypatch.setattr(
        kernel_measure, "ERROR_INPUTS", {"random": ErrorInputs((20, 1)), "large_keys": ErrorInputs((20,), 1, 100)}
    )


@pytest.mark.slow
def test_entries(device, fixed_time):
    request = request_of(
        "--shape=4/2/64", "--points=2x40", "--pairs=K4V4", "--store-pairs=K4V4", "--implementations=triton",
        "--gather-tokens=64", "--bandwidth=2e9",
    )  # fmt: skip
    meter = KernelMeter(request, device, l2_bytes=1, read_bandwidth=4e9)
    cases = {case.part: case for case in meter.plan()[0] if case.implementation == "triton" and not case.tokens > 64}

    decode, layer, store, gather = (meter.measure(cases[part]) for part in ("decode", "layer", "store", "gather"))

    assert [entry["failure"] for entry in (decode, layer, store, gather)] == [None] * 4
    assert layer == decode, "at the same bytes"
    assert decode["bytes"] == 2 * 40 * 2 * 72
    assert decode["bytes_s"] == pytest.approx(decode["bytes"] / 10e-6)
    assert decode["fraction_measured"] == pytest.approx(decode["bytes_s"] / 4e9)
    assert decode["fraction_given"] == pytest.approx(decode["bytes_s"] / 2e9)
    assert (decode["nominal_bits"], decode["stored_bits"]) == (4.0, 4.5)
    assert (decode["requests"], decode["tokens"], decode["copies"]) == (2, 80, 2)
    assert (decode["query_tokens"], decode["rows_per_kv_head"]) == ("1", 2)
    assert "query_tokens" not in store
    assert set(decode["relative_errors"]) == {"random", "large_keys"}
    assert all(0 < error < BF16_ERROR for error in decode["relative_errors"].values())
    assert set(decode["rounding_errors"]) == set(decode["relative_errors"])
    assert store["bytes"] == 64 * 2 * (256 + 72) and gather["bytes"] == 64 * 2 * (256 + 72)
    json.dumps([decode, layer, store, gather], allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize(("query_tokens", "newest_of"), [("1", (1, 1, 1)), ("3", (3, 3, 3)), ("1+3", (3, 1, 3))])
def test_a_layer_stores_the_tokens_of_its_queries_and_attends_to_them(
    query_tokens, newest_of, device, fixed_time, monkeypatch
):
    """In every copy of the cache, the newest tokens and no others, before attention."""
    request = request_of("--shape=4/2/64", "--points=mixed:3:4-40", "--pairs=K8V8", "--implementations=triton",
                         "--parts=decode,layer", f"--query-tokens={query_tokens}")  # fmt: skip
    build, made = TritonKernel.build, []

    def keeping(self, batch, cache_format, transforms):
        launches = build(self, batch, cache_format, transforms)
        made.append((batch, launches, [rows.clone() for rows in launches.rows()]))
        return launches

    monkeypatch.setattr(TritonKernel, "build", keeping)
    meter = KernelMeter(request, device, l2_bytes=1, read_bandwidth=4e9)
    alone, layer = meter.plan()[0]
    assert [meter.measure(case)["failure"] for case in (alone, layer)] == [None, None]

    # The batches before these were compared with float64.
    for (batch, launches, before), newest in zip(made[-2:], ((0, 0, 0), newest_of), strict=True):
        ends = batch.seq_lens.cumsum(0).tolist()
        stored = {end - 1 - back for end, count in zip(ends, newest, strict=True) for back in range(count)}
        for old, new in zip(before, launches.rows(), strict=True):
            changed = (old != new).flatten(1).any(1).nonzero().flatten().tolist()
            assert set(changed) == stored
    got = launches.output.double()
    launches.output.zero_()
    launches.calls[-1]()
    assert torch.equal(launches.output.double(), got), "it attended after the last copy's tokens were there"


@pytest.mark.slow
def test_a_kernel_that_fails_costs_no_other_its_entry(device, fixed_time, monkeypatch):
    request = request_of("--shape=4/2/64", "--points=1x40", "--pairs=K4V4,K2V2", "--implementations=triton",
                         "--parts=decode")  # fmt: skip
    meter = KernelMeter(request, device, 1, 1.0)
    build = TritonKernel.build

    def broken(self, batch, cache_format, transforms):
        if cache_format.name == "K4V4":
            raise RuntimeError("no such kernel")
        return build(self, batch, cache_format, transforms)

    monkeypatch.setattr(TritonKernel, "build", broken)
    failed, measured = (meter.measure(case) for case in meter.plan()[0])
    assert failed["failure"] == "RuntimeError: no such kernel"
    assert "us" not in failed
    assert measured["us"] == 10


def test_what_a_kernel_says_it_does_not_serve_is_no_failure(device, fixed_time, monkeypatch):
    request = request_of("--shape=4/2/64", "--points=1x40", "--pairs=K4V4", "--implementations=triton",
                         "--parts=decode")  # fmt: skip
    meter = KernelMeter(request, device, 1, 1.0)

    def refuse(self, *arguments):
        raise Unsupported("head_size 64 is too small")

    monkeypatch.setattr(TritonKernel, "build", refuse)
    entry = meter.measure(meter.plan()[0][0])
    assert (entry["failure"], entry["unsupported"]) == (None, "head_size 64 is too small")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_errors_are_found_in_other_processes(device, fixed_time):
    """Here a failure, which costs the kernel its entries and no other kernel anything."""
    request = request_of("--shape=4/2/64", "--points=1x40,2x40", "--pairs=K4V4", "--implementations=triton,cuda",
                         "--parts=decode")  # fmt: skip
    meter = KernelMeter(request, device, 1, 1.0)
    mine = meter.plan()[0]
    cuda = [replace(case, implementation="cuda") for case in mine]
    counts = []

    meter.compare(cuda, 1, lambda index, total: counts.append((index, total)))

    assert counts == [(0, 1)], "one comparison for both points"
    assert all(meter.measure(case)["failure"] for case in cuda)
    assert [meter.measure(case)["failure"] for case in mine] == [None, None]
