"""What KV connectors tell one engine's pages from another's by."""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from vllm_kvtuner.engine.config import DIGEST_KEY, uses_kvtuner


def tell_connectors_of_the_profile() -> None:
    """Keep what KV connectors store or send apart by profile.

    Symptom: an engine may load pages that another profile wrote, and answer nonsense. Cause: offloaded files and NIXL's
    handshake name the model and the cache's dtype, which is ``kvtuner`` for every profile. Connectors' modules are
    imported when one is asked for, so theirs are changed then. Can go when a dtype can tell more of itself.
    """
    folder = "vllm.distributed.kv_transfer.kv_connector.v1."
    changes = {
        (folder + "offloading_connector", "build_offloading_config"): _offloading_config_of_profile,
        (folder + "nixl.base_worker", "compute_nixl_compatibility_hash"): _handshake_of_profile,
    }
    original = KVConnectorFactory.get_connector_class

    @functools.wraps(original)
    def get_connector_class(kv_transfer_config: Any) -> Any:
        found = original(kv_transfer_config)
        for place, change in list(changes.items()):
            if (module := sys.modules.get(place[0])) is not None:
                setattr(module, place[1], change(getattr(module, place[1])))
                del changes[place]
        return found

    KVConnectorFactory.get_connector_class = get_connector_class


def _offloading_config_of_profile(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        built = original(config, *args, **kwargs)
        if not uses_kvtuner(config):
            return built
        dtype = f"{built.model.dtype}-{config.additional_config[DIGEST_KEY]}"
        return dataclasses.replace(built, model=dataclasses.replace(built.model, dtype=dtype))

    return build


def _handshake_of_profile(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def compute(config: VllmConfig, *args: Any, **kwargs: Any) -> str:
        found = original(config, *args, **kwargs)
        if not uses_kvtuner(config):
            return found
        return hashlib.sha256(f"{found} {config.additional_config[DIGEST_KEY]}".encode()).hexdigest()

    return compute
