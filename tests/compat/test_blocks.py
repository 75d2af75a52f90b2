"""Where our grouping and allocation take vLLM's place; what they do is tests/blocks'."""

from types import SimpleNamespace

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_kvtuner.compat import blocks


@pytest.mark.parametrize(("dtype", "installed"), [("kvtuner", True), ("auto", False)])
def test_a_schedulers_manager_allocates_where_needed(dtype, installed, monkeypatch):
    def init(self, config, manager):
        self.vllm_config, self.kv_cache_manager = config, manager

    manager = SimpleNamespace(allocate_slots="vLLM's", cache_blocks="vLLM's")
    monkeypatch.setattr(
        blocks, "methods_where_needed", lambda each: {"cache_blocks": "ours"} if each is manager else {}
    )
    monkeypatch.setattr(Scheduler, "__init__", init)
    blocks.allocate_where_needed()
    Scheduler(SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=dtype)), manager)
    assert manager.allocate_slots == "vLLM's"
    assert manager.cache_blocks == ("ours" if installed else "vLLM's")
