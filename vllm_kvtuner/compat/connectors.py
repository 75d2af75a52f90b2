"""What KV connectors tell one engine's pages from another's by; those that transfer them are in ``transfers``."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from vllm_kvtuner.compat.example_files import keep_whole_files
from vllm_kvtuner.compat.offloading import loads_sink_tokens
from vllm_kvtuner.compat.patching import when_connectors_import
from vllm_kvtuner.engine.checks import EXAMPLE
from vllm_kvtuner.engine.config import DIGEST_KEY, uses_kvtuner

LMCACHE = "LMCacheMPConnector"


def tell_connectors_of_the_profile() -> None:
    """Keep what KV connectors store apart by profile, and let offloading bring back sink tokens (compat/offloading.py).

    Symptom: an engine may load pages that another profile wrote, and answer nonsense. Cause: offloaded files name the
    model and the cache's dtype, which is ``kvtuner`` for every profile; LMCache names the model, and the example's
    files nothing but the tokens. Can go when a dtype can tell more of itself. The example also ends the engine over
    a file that is cut short (compat/example_files.py).
    """

    def change(module: Any) -> None:
        module.build_offloading_config = _offloading_config_of_profile(module.build_offloading_config)
        module.OffloadingConnectorScheduler = loads_sink_tokens(module.OffloadingConnectorScheduler)

    when_connectors_import("vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector", change)
    original = KVConnectorFactory.get_connector_class

    @functools.wraps(original)
    def get_connector_class(kv_transfer_config: Any) -> Any:
        return _of_profile(original(kv_transfer_config))

    KVConnectorFactory.get_connector_class = get_connector_class


@functools.cache
def _of_profile(connector: type[Any]) -> type[Any]:
    """A connector that files pages of engines with our cache by profile, where it would not."""
    name, original = connector.__name__, connector.__init__
    if name == LMCACHE:

        @functools.wraps(original)
        def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
            original(self, _named_by_profile(vllm_config), *args, **kwargs)

    elif name == EXAMPLE:

        @functools.wraps(original)
        def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if uses_kvtuner(vllm_config):
                self._storage_path = str(Path(self._storage_path) / vllm_config.additional_config[DIGEST_KEY])
                keep_whole_files(self)

    else:
        return connector
    return type(name, (connector,), {"__init__": init, "__module__": connector.__module__})


def _named_by_profile(config: VllmConfig) -> VllmConfig:
    """A configuration whose model's name tells the profile, for a connector that reads it and builds no model. LMCache
    takes no @ in it."""
    if not uses_kvtuner(config):
        return config
    renamed = copy.copy(config)
    renamed.model_config = copy.copy(config.model_config)
    renamed.model_config.model = f"{config.model_config.model}-kvtuner-{config.additional_config[DIGEST_KEY]}"
    return renamed


def _offloading_config_of_profile(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        built = original(config, *args, **kwargs)
        if not uses_kvtuner(config):
            return built
        dtype = f"{built.model.dtype}-{config.additional_config[DIGEST_KEY]}"
        return dataclasses.replace(built, model=dataclasses.replace(built.model, dtype=dtype))

    return build
