"""How vLLM's functions are replaced."""

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


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
