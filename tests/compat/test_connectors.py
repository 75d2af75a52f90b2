"""What KV connectors tell one profile's pages from another's by; test_transfers.py has those that move pages."""

import inspect
from dataclasses import dataclass
from types import SimpleNamespace

from vllm_kvtuner.compat import connectors


def test_connectors_keep_profiles_apart(monkeypatch):
    """What an offloading connector files pages under."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector
    from vllm.v1.kv_offload.config import OffloadingModelConfig

    @dataclass(frozen=True)
    class Built:
        model: OffloadingModelConfig

    built = Built(OffloadingModelConfig("model", "kvtuner"))
    monkeypatch.setattr(offloading_connector, "build_offloading_config", lambda config, caches: built)
    # Without the seam that other tests of this process may have installed.
    original = inspect.unwrap(KVConnectorFactory.get_connector_class)
    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", original)
    connectors.tell_connectors_of_the_profile()
    asked = SimpleNamespace(kv_connector="OffloadingConnector", kv_connector_module_path=None)
    for _ in range(2):  # as the scheduler does, and the worker
        KVConnectorFactory.get_connector_class(asked)

    def config(dtype, digest):
        cache = SimpleNamespace(cache_dtype=dtype)
        return SimpleNamespace(cache_config=cache, additional_config={"kvtuner_digest": digest})

    def offloaded(*which):
        return offloading_connector.build_offloading_config(config(*which), None).model

    assert offloaded("auto", "a") is built.model
    assert offloaded("kvtuner", "a") == OffloadingModelConfig("model", "kvtuner-a")
