"""What an engine with FlashInfer's backend needs to decode by XQA, and why it is refused, by vLLM's own answers."""

import importlib.util
import os
import shutil
from types import SimpleNamespace

import pytest
import vllm.utils.flashinfer as vllm_flashinfer

from kvtuner_tools.cache_setting import CacheSetting
from kvtuner_tools.engines.flashinfer import CUBIN, decode_environment

XQA = CacheSetting.parse("fp8@FLASHINFER")
COMPILER = ("nvcc", "ninja")
REMEMBERED = ("has_flashinfer", "has_flashinfer_cubin", "has_nvidia_artifactory", "supports_trtllm_attention")


class Machine:
    """A card, the packages and programs beside it, and whether FlashInfer's server can be reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability = 90
        self.packages: tuple[str, ...] = ("flashinfer",)
        self.programs: tuple[str, ...] = COMPILER
        self.server = False
        card = SimpleNamespace(
            is_device_capability=lambda which: self.capability == which,
            is_device_capability_family=lambda which: self.capability // 10 == which // 10,
        )
        monkeypatch.setattr("vllm.platforms.current_platform", card)
        monkeypatch.setattr(vllm_flashinfer, "current_platform", card)
        monkeypatch.setattr(vllm_flashinfer.requests, "get", self._get)
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: (
                name in self.packages or None if name.startswith("flashinfer") else find_spec(name, *rest)
            ),
        )
        monkeypatch.setattr(shutil, "which", lambda path: path if os.path.basename(path) in self.programs else None)
        for name in ("CUDA_HOME", "CUDA_PATH", "VLLM_BATCH_INVARIANT"):
            monkeypatch.delenv(name, raising=False)
        # What the function sets is taken back after the test.
        monkeypatch.setenv(CUBIN, "0")
        del os.environ[CUBIN]

    def _get(self, *_: object, **__: object) -> SimpleNamespace:
        if not self.server:
            raise ConnectionError
        return SimpleNamespace(status_code=200)


def forget() -> None:
    """As in a new process."""
    for name in REMEMBERED:
        getattr(vllm_flashinfer, name).cache_clear()


@pytest.fixture
def machine(monkeypatch):
    forget()
    yield Machine(monkeypatch)
    forget()


@pytest.mark.parametrize("capability", [90, 120, 121])
def test_where_flashinfer_compiles_xqa_vllm_is_told_so(machine, capability):
    machine.capability = capability
    usable = vllm_flashinfer.has_flashinfer()
    assert not vllm_flashinfer.supports_trtllm_attention()
    forget()

    assert decode_environment(XQA) == {CUBIN: "1"}

    assert vllm_flashinfer.supports_trtllm_attention()
    assert usable and vllm_flashinfer.has_flashinfer(), "nothing else of vLLM sees another FlashInfer"


def test_vllm_is_told_nothing_that_it_finds_itself(machine, monkeypatch):
    machine.packages = ("flashinfer", "flashinfer_cubin")
    assert decode_environment(XQA) == {}
    forget()
    machine.packages = ("flashinfer",)
    monkeypatch.setenv(CUBIN, "1")
    assert decode_environment(XQA) == {}, "the user's own"


@pytest.mark.parametrize(
    ("setting", "capability"), [("fp8", 90), ("fp8@FLASH_ATTN", 90), ("fp8@FLASHINFER", 80), ("fp8@FLASHINFER", 89)]
)
def test_other_backends_and_cards_need_nothing(machine, setting, capability):
    machine.capability, machine.packages = capability, ()
    assert decode_environment(CacheSetting.parse(setting)) == {}


@pytest.mark.parametrize(
    ("packages", "programs", "reason"),
    [
        ((), COMPILER, "FlashInfer is not installed"),
        (("flashinfer",), ("ninja",), "FlashInfer compiles XQA at its first use, but nvcc is missing"),
        (("flashinfer", "flashinfer_cubin"), ("nvcc",), "FlashInfer compiles XQA at its first use, but ninja is"),
    ],
)
def test_what_xqa_lacks_is_said(machine, packages, programs, reason):
    machine.packages, machine.programs = packages, programs
    with pytest.raises(ValueError, match=f"fp8@FLASHINFER: vLLM must decode by XQA, but {reason}"):
        decode_environment(XQA)


def test_compiled_kernels_without_a_compiler_do_not_turn_flashinfer_on_elsewhere(machine):
    machine.packages, machine.programs = ("flashinfer", "flashinfer_jit_cache"), ()
    with pytest.raises(ValueError, match=r"finds neither the package flashinfer-cubin nor NVIDIA's.*; install it"):
        decode_environment(XQA)
    forget()
    machine.server = True
    assert decode_environment(XQA) == {}
    assert not vllm_flashinfer.has_flashinfer()


def test_users_variables_are_kept_and_named(machine, monkeypatch):
    monkeypatch.setenv(CUBIN, "0")
    with pytest.raises(ValueError, match=r"server that has its kernels, and VLLM_HAS_FLASHINFER_CUBIN is '0'"):
        decode_environment(XQA)
    forget()
    monkeypatch.setenv(CUBIN, "1")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="must decode by XQA, but VLLM_BATCH_INVARIANT turns that off"):
        decode_environment(XQA)


def test_what_cannot_be_compiled_must_be_installed(machine):
    """Compute capability 10.x has another kernel, which is in flashinfer-cubin and on the server alone."""
    machine.capability = 100
    with pytest.raises(ValueError, match="must decode by TensorRT-LLM's kernels, but finds neither"):
        decode_environment(XQA)
    forget()
    machine.packages = ("flashinfer", "flashinfer_cubin")
    assert decode_environment(XQA) == {}
