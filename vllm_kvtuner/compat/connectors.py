"""What KV connectors tell one engine's pages from another's by; those that transfer them are in ``transfers``."""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm.config import VllmConfig

from vllm_kvtuner.compat.patching import when_connectors_import
from vllm_kvtuner.engine.config import DIGEST_KEY, uses_kvtuner


def tell_connectors_of_the_profile() -> None:
    """Keep what KV connectors store apart by profile.

    Symptom: an engine may load pages that another profile wrote, and answer nonsense. Cause: offloaded files name the
    model and the cache's dtype, which is ``kvtuner`` for every profile. Can go when a dtype can tell more of itself.
    """

    def change(module: ModuleType) -> None:
        module.build_offloading_config = _offloading_config_of_profile(module.build_offloading_config)  # type: ignore[attr-defined]

    when_connectors_import("vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector", change)


def _offloading_config_of_profile(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        built = original(config, *args, **kwargs)
        if not uses_kvtuner(config):
            return built
        dtype = f"{built.model.dtype}-{config.additional_config[DIGEST_KEY]}"
        return dataclasses.replace(built, model=dataclasses.replace(built.model, dtype=dtype))

    return build
