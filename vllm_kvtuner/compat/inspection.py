"""Whether the installed vLLM still has something that we rely on; found out by looking, without an engine."""

import functools
import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

ANY_KEYWORD = "**"
"""Among a seam's parameters: any further keyword is passed on."""


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare it by. One without, as source builds may have, counts as newer than all."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return (sys.maxsize,) if numbers is None else tuple(map(int, numbers[0].split(".")))


@dataclass(frozen=True)
class Seam:
    """Something of vLLM's that it may change in any version.

    Args:
        name: what it is to us.
        target: where it is looked for, as "module:name" or "module:Class.method".
        used_by: function or class of ours whose docstring says what it is needed for, below ``vllm_kvtuner``.
        parameters: of a function, in order, those that we pass, wrap or override; the object and class aside.
        exact: the function has no others, because ours would not take them.
        attributes: of a class, those of its objects that we read.
        since: first vLLM version with this seam; "" for all.
        before: first vLLM version without it; "" for none.
    """

    name: str
    target: str
    used_by: str
    parameters: tuple[str, ...] = ()
    exact: bool = False
    attributes: tuple[str, ...] = ()
    since: str = ""
    before: str = ""

    def is_in(self, version: str) -> bool:
        """Whether a vLLM version is to have it."""
        found = release(version)
        return not (self.since and found < release(self.since)) and not (self.before and found >= release(self.before))

    def problem(self) -> str | None:
        """What is wrong with it in the installed vLLM, in one line, or None."""
        try:
            found = self._found()
            wrong = self._wrong_parameters(found) or self._missing_attributes(found)
        except (AttributeError, ImportError) as error:
            wrong = f"{type(error).__name__}: {error}"
        if not wrong:
            return None
        return f"seam '{self.name}' is broken: {self.target}: {wrong} (see vllm_kvtuner.{self.used_by})"

    def _found(self) -> Any:
        module, _, path = self.target.partition(":")
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = inspect.getattr_static(found, name) if isinstance(found, type) else getattr(found, name)
            if isinstance(found, (classmethod, staticmethod)):
                found = found.__func__
        return found

    def _wrong_parameters(self, found: Any) -> str | None:
        if not self.parameters and not self.exact:
            return None
        if not callable(found):
            return f"is no function, but a {type(found).__name__}"
        # Through our own wrappers, where the plugin is loaded.
        parameters = inspect.signature(found).parameters.values()
        named = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        if named and named[0] in ("self", "cls"):
            del named[0]
        if ANY_KEYWORD in self.parameters and not any(each.kind == each.VAR_KEYWORD for each in parameters):
            return f"takes no further keywords, but only ({', '.join(named)})"
        wanted = [name for name in self.parameters if name != ANY_KEYWORD]
        ours = named if self.exact else [name for name in named if name in wanted]
        if ours == wanted:
            return None
        return f"must take ({', '.join(wanted)}){' alone' if self.exact else ''}, but takes ({', '.join(named)})"

    def _missing_attributes(self, found: Any) -> str | None:
        if missing := [name for name in self.attributes if not _has_attribute(found, name)]:
            return f"must have {', '.join(missing)}"
        return None


def _has_attribute(owner: type, name: str) -> bool:
    """Whether objects of a class have an attribute: a member, a field, or what some method of the class assigns."""
    if hasattr(owner, name):
        return True
    for each in owner.__mro__:
        if name in inspect.get_annotations(each):
            return True
        if each.__module__.startswith("vllm.") and re.search(rf"\bself\.{name}\b *[=:,]", _source(each)):
            return True
    return False


_source = functools.cache(inspect.getsource)
