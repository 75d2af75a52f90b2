"""What self-tests compile is known beforehand, compiled side by side, and fails by the name of its case."""

import threading
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import cuda_emulator
from vllm_kvtuner.kernels import choice, gpu, trial
from vllm_kvtuner.kernels.contract import AttentionShape, BatchLimits, Span
from vllm_kvtuner.kernels.cuda import build, keep_rows
from vllm_kvtuner.kernels.self_test_cases import Case
from vllm_kvtuner.kernels.self_test_errors import Errors
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair
from vllm_kvtuner.profile.profile import TRANSFORM_KEYS

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
WINDOW = {"span": Span(None, 40, 4), "write_lse": True, "window_block_size": 32}
PATIENCE = 60.0
"""Seconds after which a compilation that waits for another one gives up, on however busy a machine."""


def case(pair="K4V4", head_size=64, limits=(20, 3), soft_cap=0.0, **fields):
    layout = PageLayout(PrecisionPair.parse(pair), head_size, 16)
    return Case(layout, AttentionShape(8, 2, head_size, head_size**-0.5, soft_cap), BatchLimits(*limits), **fields)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A Hopper whose kernels compute nothing; the sources that launchers have asked for."""
    asked = []

    def nothing(source, block, shared_bytes, device):
        asked.append(source)
        return SimpleNamespace(max_ctas=3, block=block, launch=lambda *arguments, **options: None)

    cuda_emulator.put_under_launchers(monkeypatch, nothing)
    monkeypatch.setenv("KVTUNER_KERNEL_CACHE", str(tmp_path / "kernels"))
    monkeypatch.setattr(choice, "device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    trial._verdict.cache_clear()
    yield asked
    trial._verdict.cache_clear()


@pytest.fixture
def compiler(monkeypatch):
    """Stands for compile_cubin, on two CPUs: what it is asked and, where it is set, what it does."""
    stand_in = SimpleNamespace(sources=[], act=lambda source: None)

    def compile_cubin(source, arch, cache):
        assert arch == "sm_90"
        stand_in.sources.append(source)
        stand_in.act(source)

    monkeypatch.setattr(build, "compile_cubin", compile_cubin)
    monkeypatch.setattr(build, "cpus", lambda: 2)
    return stand_in


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "tested",
    [
        case(),
        case("K2V2", transforms=TRANSFORM_KEYS, limits=(3, 16)),
        case("K4V2", transforms=("key_hadamard", "key_round_feedback"), **WINDOW),
        case("K8V4", 128, span=Span(100), soft_cap=30.0, limits=(300, 1), dtype=torch.float16),
        case("K4V2", 96),
    ],
    ids=["plain", "all transforms", "packed late", "capped in a sliding window", "decoded by another kernel"],
)
def test_all_that_a_self_test_runs_is_known_beforehand(card, compiler, tested):
    assert gpu.compile_cuda([tested], CPU) == {}
    gpu.measure_cuda(tested, CPU)
    assert set(compiler.sources) == set(card)
    assert len(compiler.sources) == len(set(compiler.sources)), "each once"


def test_compilations_overlap_and_tests_follow(card, compiler):
    """The first waits until the second has begun; what two cases share is compiled once."""
    together = threading.Barrier(2)
    compiler.act = lambda source: len(compiler.sources) > 2 or together.wait(PATIENCE)
    cases = [case(), case("K2V2"), case(limits=(20, 2))]

    def measure(tested, device):
        measured.append((tested, len(compiler.sources)))
        return Errors(0.5, 0.0, 0.0, 0.0, 0, 0.0)

    measured = []
    assert trial.prove(cases, DEVICE, measure, gpu.compile_cuda).failure is None
    number = len(set(compiler.sources))
    assert number == len(compiler.sources)
    assert measured == [(each, number) for each in cases], "nothing runs before all is compiled"


def test_what_does_not_compile_fails_by_the_name_of_its_case(card, compiler):
    def refuse(source):
        if source.stem == "gather_cache" and dict(source.macros)["K_BITS"] == 2:
            raise RuntimeError("no such\ninstruction")

    def measure(tested, device):
        measured.append(tested)
        return Errors(0.5, 0.0, 0.0, 0.0, 0, 0.0)

    compiler.act, measured = refuse, []
    verdict = trial.prove([case(), case("K2V2"), case("K8V8")], DEVICE, measure, gpu.compile_cuda)
    assert verdict.failure == "K2V2 of head size 64: RuntimeError: no such instruction"
    assert measured == [case()] and verdict.passed == {case().kind}


def test_a_full_disk_is_the_users_error(card, compiler):
    def refuse(source):
        raise ValueError("KVTUNER_KERNEL_CACHE: no room")

    compiler.act = refuse
    with pytest.raises(ValueError, match=r"^KVTUNER_KERNEL_CACHE: no room$"):
        trial.prove([case()], DEVICE, lambda *_: pytest.fail("it runs"), gpu.compile_cuda)


def test_what_was_compiled_side_by_side_is_taken_from_the_disk(card, monkeypatch):
    sources = [keep_rows.source(64, heads, torch.bfloat16, 16) for heads in (1, 2)]
    assert build.compile_side_by_side([*sources, sources[0]], DEVICE) == {}
    assert len(build.kernel_cache()) == 2
    for source in sources:
        assert f".text.{source.stem}".encode() in bytes(build.compile_cubin(source, "sm_90", build.kernel_cache()).code)
    assert len(build.kernel_cache()) == 2
