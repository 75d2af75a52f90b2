"""Environment variables."""

from pathlib import Path

import pytest

from vllm_kvtuner import envs


def test_defaults(monkeypatch):
    monkeypatch.delenv("KVTUNER_PROFILE", raising=False)
    monkeypatch.delenv("KVTUNER_PREFILL_WORKSPACE_TOKENS", raising=False)
    assert envs.profile() is None
    assert envs.prefill_workspace_tokens() == 65536


def test_values_are_read_at_the_call(monkeypatch):
    monkeypatch.setenv("KVTUNER_PROFILE", "K8V4")
    monkeypatch.setenv("KVTUNER_PREFILL_WORKSPACE_TOKENS", "4096")
    assert envs.profile() == "K8V4"
    assert envs.prefill_workspace_tokens() == 4096
    monkeypatch.setenv("KVTUNER_PROFILE", "")
    assert envs.profile() is None


@pytest.mark.parametrize("text", ["0", "-1", "64k", "1.5", "", "²"])
def test_bad_numbers(monkeypatch, text):
    monkeypatch.setenv("KVTUNER_PREFILL_WORKSPACE_TOKENS", text)
    with pytest.raises(ValueError, match="KVTUNER_PREFILL_WORKSPACE_TOKENS must be a positive integer, but got '"):
        envs.prefill_workspace_tokens()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "~/.cache/vllm_kvtuner/kernels"),
        ({"XDG_CACHE_HOME": "/var/cache"}, "/var/cache/vllm_kvtuner/kernels"),
        ({"XDG_CACHE_HOME": "", "KVTUNER_KERNEL_CACHE": ""}, "~/.cache/vllm_kvtuner/kernels"),
        ({"XDG_CACHE_HOME": "/var/cache", "KVTUNER_KERNEL_CACHE": "~/mine"}, "~/mine"),
    ],
    ids=["home", "XDG", "empty", "own"],
)
def test_the_kernel_cache_lies_in_the_users_cache_folder(monkeypatch, variables, folder):
    for name in ("XDG_CACHE_HOME", "KVTUNER_KERNEL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert envs.kernel_cache() == Path(folder).expanduser()


def test_the_decode_kernel_is_one_of_two(monkeypatch):
    monkeypatch.delenv("KVTUNER_DECODE_KERNEL", raising=False)
    assert envs.decode_kernel() is None
    for name, kernel in (("", None), ("cuda", "cuda"), ("triton", "triton")):
        monkeypatch.setenv("KVTUNER_DECODE_KERNEL", name)
        assert envs.decode_kernel() == kernel
    for name in ("CUDA", "fa3", "cuda "):
        monkeypatch.setenv("KVTUNER_DECODE_KERNEL", name)
        with pytest.raises(ValueError, match=f"^KVTUNER_DECODE_KERNEL must be cuda or triton, but got '{name}'$"):
            envs.decode_kernel()


def test_the_kernels_of_a_cpu_are_one_of_two(monkeypatch):
    monkeypatch.delenv("KVTUNER_CPU_KERNELS", raising=False)
    assert envs.cpu_kernels() is None
    for name, kernels in (("", None), ("compiled", "compiled"), ("reference", "reference")):
        monkeypatch.setenv("KVTUNER_CPU_KERNELS", name)
        assert envs.cpu_kernels() == kernels
    monkeypatch.setenv("KVTUNER_CPU_KERNELS", "avx2")
    with pytest.raises(ValueError, match=r"^KVTUNER_CPU_KERNELS must be compiled or reference, but got 'avx2'$"):
        envs.cpu_kernels()
