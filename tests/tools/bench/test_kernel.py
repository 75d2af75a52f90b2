"""``kvtuner bench kernel``: its inputs, implementations and bookkeeping; times need a GPU."""

import argparse
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtuner_tools import bench
from kvtuner_tools.bench import kernel, kernel_measure
from kvtuner_tools.bench.kernel import report, table
from kvtuner_tools.bench.kernel_inputs import (
    attention_float64,
    copies_for,
    make_batch,
    new_tokens,
    newest_tokens,
    token_places,
)
from kvtuner_tools.bench.kernel_measure import ErrorCase, ErrorInputs, KernelMeter
from kvtuner_tools.bench.kernel_request import KernelRequest, parse_request
from kvtuner_tools.bench.kernels import vllm
from kvtuner_tools.bench.kernels.base import CacheFormat, Unsupported
from kvtuner_tools.bench.kernels.implementations import DECODE
from kvtuner_tools.bench.kernels.packed import TritonKernel, packed_format
from kvtuner_tools.bench.points import IMPLEMENTATIONS, TRANSFORMS, LayerHeads
from kvtuner_tools.bench.read_bandwidth import BYTES, CONFIGS, STEPS, read_sums
from kvtuner_tools.bench.timing import Timing
from vllm_kvtuner.kernels.contract import Span
from vllm_kvtuner.kernels.reference.attention import attention_ref
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, PrecisionPair

HEADS = LayerHeads(4, 2, 64)
FEW = ErrorInputs((70, 1, 17))
BF16_ERROR = 8e-3
"""Over the largest output: twice what bf16 rounds it by, with the interpreter's truncation."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def request_of(*words: str) -> KernelRequest:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parse_request(parser.parse_args(["kernel", *words]))


def test_defaults():
    request = request_of()

    assert request.shapes == (LayerHeads(32, 8, 128),)
    assert request.pairs == QUANTIZED_PAIRS
    assert [str(point) for point in request.points] == ["64x8192", "8x32000", "1x131072", "mixed:64:256-16128"]
    assert (request.implementations, request.block_sizes, request.transforms) == (IMPLEMENTATIONS, (16,), ("none",))


def test_every_option():
    request = request_of(
        "--shape=7/1/64", "--shape=llama31_8b", "--block-size=16,64", "--points=1x4,mixed:3:8-9", "--pairs=K4V2,k8v8",
        "--store-pairs=K2V2", "--implementations=cuda,fa3_fp8", "--transforms=none,all", "--parts=decode",
        "--query-tokens=4", "--bandwidth=4.37e12",
    )  # fmt: skip

    assert request.shapes == (LayerHeads(7, 1, 64), LayerHeads(32, 8, 128))
    assert request.block_sizes == (16, 64)
    assert request.pairs == (PrecisionPair(4, 2), PrecisionPair(8, 8))
    assert request.implementations == ("cuda", "fa3_fp8")
    assert (request.transforms, request.parts, request.query_tokens) == (("none", "all"), ("decode",), 4)
    assert request.bandwidth == 4.37e12


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--implementations=cuda,fa2", "--implementations must be of .*, but got fa2"),
        ("--transforms=some", "--transforms must be of none, hadamard, offset, all, but got some"),
        ("--pairs=K16V16", "pairs must be of .*, but got K16V16"),
        ("--block-size=24", "--block-size must be multiples of 16, but got '24'"),
        ("--query-tokens=17", "--query-tokens must be 1 to 16"),
        ("--samples=0", "--samples must be positive, but got 0"),
        ("--jobs=0", "--jobs must be positive, but got 0"),
        ("--bandwidth=-1", "--bandwidth must be positive, but got -1"),
    ],
)
def test_values_that_options_do_not_take(word, message):
    with pytest.raises(ValueError, match=message):
        request_of(word)


def test_queries_longer_than_a_context_are_refused():
    with pytest.raises(ValueError, match="at most the shortest context, but got 8"):
        request_of("--points=4x64,1x7", "--query-tokens=8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="bench kernel must run on a GPU"):
        kernel.run(argparse.Namespace(**vars(_arguments())))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernel.add_arguments(parser)
    return parser.parse_args([])


def test_copies_share_no_block_and_leave_out_block_0(device):
    batch = make_batch(HEADS, 16, [1, 16, 17, 100], 1, 3, device)

    used = [table[table > 0] for table in batch.block_tables]
    assert [len(blocks) for blocks in used] == [1 + 1 + 2 + 7] * 3
    assert sorted(torch.cat(used).tolist()) == list(range(1, batch.num_blocks))
    assert (batch.block_tables[0] > 0).sum(1).tolist() == [1, 1, 2, 7]
    block, offset = token_places(batch)
    assert len(block) == sum(batch.lengths)
    assert len(set(zip(block.tolist(), offset.tolist(), strict=True))) == len(block)
    assert block[-1] == batch.block_tables[0][3, 6] and offset[-1] == 99 % 16


def test_copies_together_exceed_the_l2_cache():
    assert copies_for(stored_bytes=10**9, l2_bytes=50 << 20) == 2
    assert copies_for(stored_bytes=38 * 10**6, l2_bytes=50 << 20) * 38e6 >= 6 * (50 << 20)
    assert copies_for(stored_bytes=100, l2_bytes=50 << 20) == 256


def test_float64_attention_is_the_reference(device):
    batch = make_batch(HEADS, 16, [40, 3], 3, 1, device)
    keys, values = torch.randn(2, 43, 2, 64, device=device)
    query = batch.query.float()

    got = attention_float64(batch, query, keys, values)

    want = torch.empty_like(query)
    attention_ref(query[:3], keys[:40], values[:40], batch.attention_shape, Span(), want[:3])
    attention_ref(query[3:], keys[40:], values[40:], batch.attention_shape, Span(), want[3:])
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.quick(2)
@pytest.mark.parametrize("query_tokens", [1, 3])
@pytest.mark.parametrize("transforms", TRANSFORMS)
def test_error_of_the_triton_kernel(transforms, query_tokens, device):
    cache_format = packed_format(PrecisionPair(4, 2), 64)
    error = ErrorCase("triton", HEADS, 16, cache_format, transforms, query_tokens, device).error(FEW)
    assert 1e-4 < error.largest < BF16_ERROR
    assert 1e-4 < error.rounding < 2**-8
    assert error.largest < 2 * error.rounding + 1e-3, "little but rounding, for which the interpreter truncates"


def test_a_wrong_kernel_has_a_large_error(device, monkeypatch):
    """Here one that leaves a row out, and one that reads another request's blocks."""
    case = ErrorCase("triton", HEADS, 16, packed_format(PrecisionPair(8, 8), 64), "none", 1, device)
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


def test_formats_count_every_stored_byte():
    formats = {
        name: {kind.name: kind for kind in kernel.formats(QUANTIZED_PAIRS, 128)} for name, kernel in DECODE.items()
    }

    assert formats["fa3_bf16"] == {"bf16": CacheFormat("bf16", 16.0, 512)}
    assert formats["fa3_fp8"] == {"fp8": CacheFormat("fp8", 8.0, 256)}
    assert formats["int4_per_token_head"] == {"int4": CacheFormat("int4", 4.0, 136)}
    assert formats["int4_per_token_head"]["int4"].stored_bits(128) == 4.25
    for name in ("triton", "cuda"):
        assert list(formats[name]) == [pair.name for pair in QUANTIZED_PAIRS]
        assert formats[name]["K8V8"].content_bytes == 264
        assert formats[name]["K4V2"].stored_bits(128) == 3.25


def test_stores_move_their_input_and_what_they_store(device):
    tokens = new_tokens(HEADS, 16, 20, False, device)

    assert tokens.moved_bytes(72) == 20 * 2 * (2 * 64 * 2 + 72)
    assert all(slots.unique().numel() == 20 for slots in tokens.slot_mappings)
    first = tokens.slot_mappings[0]
    assert torch.equal(first[:16] // 16, first[:1].expand(16) // 16) and first[16] // 16 != first[0] // 16
    decode = new_tokens(HEADS, 16, 20, True, device)
    assert (decode.slot_mappings[0] // 16).unique().numel() == 20, "every request has a block of its own"
    assert max(int(slots.max()) for slots in decode.slot_mappings) < 16 * decode.num_blocks


def test_the_read_kernel_reads_everything(device):
    source = torch.randint(0, 100, (1 << 15,), dtype=torch.int32, device=device)
    sums = read_sums(source, block=2048, num_warps=4)
    assert torch.equal(sums, source.view(-1, 2048 * STEPS).sum(1, dtype=torch.int32))
    assert all(BYTES % (4 * STEPS * block) == 0 for block, _ in CONFIGS)


def test_names_are_those_of_the_arguments():
    assert tuple(DECODE) == IMPLEMENTATIONS


def test_what_cannot_run_here_is_skipped_with_the_reason(device, monkeypatch):
    if device.type == "cpu":
        meter = KernelMeter(request_of(), device, 1, 1.0)
        cases, skipped = meter.plan()
        assert {case.implementation for case in cases} == {"triton"}
        reasons = {(entry["part"], entry["implementation"]): entry["reason"] for entry in skipped}
        assert reasons == {
            ("decode", "fa3_bf16"): "needs an NVIDIA GPU",
            ("decode", "fa3_fp8"): "needs an NVIDIA GPU",
            ("decode", "int4_per_token_head"): "needs an NVIDIA GPU",
            ("decode", "cuda"): "needs an NVIDIA GPU",
            ("layer", "fa3_bf16"): "needs an NVIDIA GPU",
            ("layer", "fa3_fp8"): "needs an NVIDIA GPU",
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
        "--transforms=none,all", "--implementations=triton",
    )  # fmt: skip
    cases, _ = KernelMeter(request, device, 1, 1.0).plan()

    for part in ("decode", "layer"):
        chosen = [case for case in cases if case.part == part]
        assert len(chosen) == len(set(chosen)) == 2 * 2 * 2 * 2
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
    assert set(decode["relative_errors"]) == {"random", "large_keys"}
    assert all(0 < error < BF16_ERROR for error in decode["relative_errors"].values())
    assert set(decode["rounding_errors"]) == set(decode["relative_errors"])
    assert store["bytes"] == 64 * 2 * (256 + 72) and gather["bytes"] == 64 * 2 * (256 + 72)
    json.dumps([decode, layer, store, gather], allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("query_tokens", [1, 3])
def test_a_layer_stores_the_tokens_of_its_queries_and_attends_to_them(query_tokens, device, fixed_time, monkeypatch):
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
    for (batch, launches, before), newest in zip(made[-2:], (0, query_tokens), strict=True):
        stored = {end - 1 - back for end in batch.seq_lens.cumsum(0).tolist() for back in range(newest)}
        for old, new in zip(before, launches.rows(), strict=True):
            changed = (old != new).flatten(1).any(1).nonzero().flatten().tolist()
            assert set(changed) == stored
    got = launches.output.double()
    launches.output.zero_()
    launches.calls[-1]()
    assert torch.equal(launches.output.double(), got), "it attended after the last copy's tokens were there"


def test_newest_tokens_have_slots_in_every_copy(device):
    batch = make_batch(HEADS, 16, [5, 16, 33], 2, 3, device)

    newest = newest_tokens(batch)

    assert newest.positions.tolist() == [3, 4, 14, 15, 31, 32]
    for blocks_of, slots in zip(batch.block_tables, newest.slot_mappings, strict=True):
        blocks = [blocks_of[0, 0]] * 2 + [blocks_of[1, 0]] * 2 + [blocks_of[2, 1], blocks_of[2, 2]]
        assert slots.tolist() == [16 * int(block) + at for block, at in zip(blocks, (3, 4, 14, 15, 15, 0), strict=True)]


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


def test_report(capsys):
    entry = {
        "implementation": "cuda", "format": "K4V4", "transforms": "none", "nominal_bits": 4.0, "stored_bits": 4.25,
        "shape": "32/8/128", "block_size": 16, "point": "64x8192", "us": 140.0, "bytes": 570_425_344,
        "fraction_measured": 0.9, "fraction_given": None, "relative_errors": {"random": 2e-3},
        "rounding_errors": {"random": 1e-3},
        "failure": None, "unsupported": None,
    }  # fmt: skip
    result = {
        "device": "a card", "bandwidth": {"measured_bytes_s": 4.37e12}, "shapes": ["32/8/128"], "seconds": 99.0,
        "skipped": [{"implementation": "fa3_fp8", "part": "decode", "reason": "vLLM is not installed"}],
        "decode": [entry, {**entry, "failure": "RuntimeError: no", "us": None, "format": "K2V2"}],
        "layer": [], "store": [], "gather": [],
    }  # fmt: skip

    assert report(result) == 1
    out, err = capsys.readouterr()
    assert "| 64x8192 |           cuda |   K4V4 |       none |            4 |        4.25 | 570.4 | 140.0 |" in out
    assert "90.0" in out and "4.37 TB/s" in out and "2.0e-03 / 1.0e-03" in out
    assert "skipped fa3_fp8 (decode): vLLM is not installed" in err
    assert "cuda K2V2 64x8192: RuntimeError: no" in err
    assert report({**result, "decode": [entry, {**entry, "unsupported": "too narrow"}]}) == 0
    assert "unsupported cuda K4V4: too narrow" in capsys.readouterr().err
    assert "32/8/128 block 16" in table({**result, "shapes": ["32/8/128", "7/1/64"]})


@pytest.mark.gpu
def test_on_a_card(tmp_path):
    """Every implementation that runs here measures, stays below what memory allows, and is right."""
    out, picture = tmp_path / "out.json", None
    words = [f"--out={out}"]
    if importlib.util.find_spec("matplotlib"):
        picture = tmp_path / "picture.png"
        words.append(f"--picture={picture}")
    parser = argparse.ArgumentParser()
    kernel.add_arguments(parser)

    status = kernel.run(
        parser.parse_args(
            [
                "--points=64x4096,mixed:8:256-4096", "--pairs=K8V8,K4V2", "--store-pairs=K4V4", "--gather-tokens=8192",
                "--transforms=none,all", "--samples=3", "--sample-ms=2", *words,
            ]
        )
    )  # fmt: skip

    result = json.loads(out.read_text())
    assert status == 0, [entry["failure"] for entry in result["decode"] + result["layer"]]
    decode, layer = ({(e["implementation"], e["format"], e["point"], e["transforms"]) for e in result[part]}
                     for part in ("decode", "layer"))  # fmt: skip
    assert layer == decode
    # The slowest card this is meant for reads hundreds of GB/s; no kernel can read what it has not got.
    assert 1e11 < result["bandwidth"]["measured_bytes_s"] < 2e13
    for entry in result["decode"] + result["layer"]:
        assert 0 < entry["fraction_measured"] < 1.15
        limit = {"fp8": 0.1, "int4": 3e-2}.get(entry["format"], 1e-2)
        assert entry["relative_errors"]["random"] < limit, (entry["implementation"], entry["format"])
        assert entry["copies"] * entry["bytes"] > 2 * result["bandwidth"]["l2_bytes"]
    skipped = {entry["implementation"] for entry in result["skipped"] if entry["part"] == "decode"}
    assert {entry["implementation"] for entry in result["decode"]} == set(IMPLEMENTATIONS) - skipped
    assert {entry["tokens"] for entry in result["store"]} == {64, 16384}
    assert picture is None or Path(picture).stat().st_size > 10_000
