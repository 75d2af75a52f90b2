"""Environment variables."""

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
