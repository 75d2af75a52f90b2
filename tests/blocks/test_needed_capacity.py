"""A budget by need is compared with the memory that vLLM really has."""

from types import SimpleNamespace

import pytest

from vllm_kvtuner.blocks import capacity


@pytest.fixture
def pool(monkeypatch):
    """A pool without windows in which 64 requests of 32,768 tokens fit; and an engine's configuration by its spec."""

    def fitting(config, _):
        return 0, 64.0 * 32768 / config.model_config.max_model_len

    monkeypatch.setattr(capacity, "get_kv_cache_capacity", fitting)

    def make(asked):
        additional = {} if asked is None else {"kvtuner_auto": [asked, "K4V4", "built from weights"]}
        model = SimpleNamespace(max_model_len=131072)
        return SimpleNamespace(model_config=model, additional_config=additional, max_in_flight_tokens=8192)

    return make


@pytest.mark.parametrize(
    "asked", [None, "auto", "auto:3.5", "hf://org/repo", "auto:fit=32768x64", "auto:fit=16384x128,calibrate"]
)
def test_what_fits_is_served(pool, asked):
    config = pool(asked)
    capacity.check_capacity(config, SimpleNamespace(kv_cache_groups=[], num_blocks=100))
    assert config.model_config.max_model_len == 131072


def test_a_need_that_does_not_fit_is_refused(pool):
    with pytest.raises(
        ValueError, match="auto:fit=32768x65: the KV cache must hold 65 requests of 32,768 tokens"
    ) as told:
        capacity.check_capacity(pool("auto:fit=32768x65"), SimpleNamespace(kv_cache_groups=[], num_blocks=100))
    assert "but got room for 64.0 of them" in str(told.value)
