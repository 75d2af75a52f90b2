"""When workers are asked whether loaded weights ask for other key offsets."""

from types import SimpleNamespace

import pytest
from vllm.v1.engine.core import EngineCore

from vllm_kvtuner.compat import weights


@pytest.fixture
def core(monkeypatch):
    """An engine core whose calls are noted; ``changed`` is what its two workers answer."""
    calls = []
    core = SimpleNamespace(vllm_config=None, calls=calls, changed=[False, False])

    def workers(method, *args):
        calls.append("renew" if method is weights.renew_transforms else method)
        return core.changed

    def forget(reset_running_requests=False):
        calls.append(("forget", reset_running_requests))

    core.model_executor = SimpleNamespace(collective_rpc=workers)
    core.scheduler = SimpleNamespace(reset_prefix_cache=forget)
    monkeypatch.setattr(EngineCore, "collective_rpc", lambda self, method, timeout=None: calls.append(method) or 7)
    for name in ("step", "step_with_batch_queue"):
        monkeypatch.setattr(EngineCore, name, lambda self: calls.append("step") or 8)
    monkeypatch.setattr(weights, "follows_weights", lambda config: True)
    weights.renew_what_follows_weights()
    return core


@pytest.mark.parametrize("step", ["step", "step_with_batch_queue"])
def test_before_the_next_step_after_any_call(core, step):
    for _ in range(2):  # as trainers that send weights in pieces
        assert EngineCore.collective_rpc(core, "update_weights_from_ipc") == 7
    for _ in range(2):
        assert getattr(EngineCore, step)(core) == 8
    assert core.calls == ["update_weights_from_ipc"] * 2 + ["renew", "step", "step"]


@pytest.mark.parametrize("method", ["reload_weights", "finish_weight_update"])
def test_at_once_behind_the_end_of_an_update(core, method):
    core.changed = [False, True]
    EngineCore.collective_rpc(core, method, None)
    EngineCore.step(core)
    assert core.calls == [method, "renew", ("forget", True), "step"]


def test_not_where_nothing_follows_weights(core, monkeypatch):
    monkeypatch.setattr(weights, "follows_weights", lambda config: False)
    EngineCore.collective_rpc(core, "reload_weights")
    EngineCore.step(core)
    assert core.calls == ["reload_weights", "step"]
