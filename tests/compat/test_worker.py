"""What a worker tells the implementations of its layers."""

from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvtuner.attention.impl import KVTunerImpl
from vllm_kvtuner.compat import worker as seams_of_worker


class Told(KVTunerImpl):
    """Notes what it is told; constructed without an engine."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def warm_up(self, kv_cache: object) -> None:
        self.calls.append(kv_cache)

    def wake_up(self) -> None:
        self.calls.append("awake")


def worker_with(impl, dtype="kvtuner"):
    layers = {"a": SimpleNamespace(impl=impl, kv_cache="cache"), "b": SimpleNamespace(), "c": SimpleNamespace(impl=1)}
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=dtype),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )
    return SimpleNamespace(vllm_config=config)


@pytest.mark.parametrize(
    ("dtype", "tags", "woken"),
    [
        ("kvtuner", ["kv_cache"], 0),
        ("kvtuner", ["weights"], 1),
        ("kvtuner", ["kv_cache", "weights"], 1),
        ("kvtuner", None, 1),
        ("auto", None, 0),
    ],
)
def test_layers_hear_of_waking_up_once_their_memory_is_there(dtype, tags, woken, monkeypatch):
    """Called itself: only a GPU's worker sleeps. Memory of a tag that still sleeps is not touched."""
    monkeypatch.setattr(Worker, "wake_up", lambda self, tags=None: None)
    seams_of_worker.wake_kernels_up()
    impl = Told()
    Worker.wake_up(worker_with(impl, dtype), tags)
    assert impl.calls == ["awake"] * woken


@pytest.mark.parametrize(("dtype", "calls"), [("kvtuner", ["cache", "vLLM's"]), ("auto", ["vLLM's"])])
def test_layers_are_warmed_up_before_graphs_are_captured(dtype, calls, monkeypatch):
    impl = Told()
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: impl.calls.append("vLLM's") or 3)
    seams_of_worker.warm_kernels_up()
    assert Worker.compile_or_warm_up_model(worker_with(impl, dtype)) == 3
    assert impl.calls == calls
