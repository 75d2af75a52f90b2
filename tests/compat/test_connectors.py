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

    def named(name, *which):
        """What a connector of this name, which files by the model's name and in a folder, files pages under."""

        class Connector:
            def __init__(self, vllm_config, role, kv_cache_config=None):
                self._storage_path, self.model = "pages", vllm_config.model_config.model

        Connector.__name__ = name
        given = config(*which)
        given.model_config = SimpleNamespace(model="model")
        made = connectors._of_profile(Connector)(given, "role")
        assert given.model_config.model == "model" and isinstance(made, Connector)
        return made.model, made._storage_path

    assert named("ExampleConnector", "kvtuner", "a") == ("model", "pages/a")
    assert named("ExampleConnector", "auto", "a") == ("model", "pages")
    assert named("LMCacheMPConnector", "kvtuner", "a") == ("model-kvtuner-a", "pages")
    assert named("LMCacheMPConnector", "auto", "a") == ("model", "pages")
    assert named("NixlConnector", "kvtuner", "a") == ("model", "pages")

    assert offloaded("auto", "a") is built.model
    assert offloaded("kvtuner", "a") == OffloadingModelConfig("model", "kvtuner-a")
