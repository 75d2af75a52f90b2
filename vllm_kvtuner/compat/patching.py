"""How vLLM's functions are replaced."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory


def after(owner: type, name: str, action: Callable[..., None]) -> None:
    """Run ``action(result, *arguments)`` after each call of a method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action(result, *args, **kwargs)
        return result

    setattr(owner, name, method)


def replace_in_core(owner: ModuleType, function: Callable[..., Any]) -> None:
    """Put a function in place of that of its name, which the engine core calls."""
    setattr(owner, function.__name__, function)
    # In the engine core's own process the caller has been imported, and holds the function, before plugins load.
    if core := sys.modules.get("vllm.v1.engine.core"):
        setattr(core, function.__name__, function)


def when_connectors_import(module: str, change: Callable[[ModuleType], None]) -> None:
    """Run ``change(module)`` once, when a connector has been asked for whose modules include that one.

    Connectors' modules are imported when one is asked for, and may need packages that are not installed.
    """
    original = KVConnectorFactory.get_connector_class
    changed = False

    @functools.wraps(original)
    def get_connector_class(kv_transfer_config: Any) -> Any:
        nonlocal changed
        found = original(kv_transfer_config)
        if not changed and (imported := sys.modules.get(module)) is not None:
            changed = True
            change(imported)
        return found

    KVConnectorFactory.get_connector_class = get_connector_class
