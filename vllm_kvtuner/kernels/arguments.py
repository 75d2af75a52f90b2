"""A kernel's arguments: one list, from which both its C text and the structure that the host fills are made."""

import ctypes
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

HEADER = "arguments.cuh"
"""Name under which a source includes the generated text."""
SCALARS: dict[str, Any] = {
    "u64": ctypes.c_uint64,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "int": ctypes.c_int32,
    "float": ctypes.c_float,
}


class Field(NamedTuple):
    """One argument.

    Args:
        type: in C, a pointer, one of ``SCALARS``, or a structure that the C text declares.
        name: on both sides.
        comment: shape or unit, which the C text repeats.
        structure: the host's type of a structure.
    """

    type: str
    name: str
    comment: str
    structure: Any = None

    @property
    def host_type(self) -> Any:
        if self.structure is not None:
            return self.structure
        return ctypes.c_void_p if self.type.endswith("*") else SCALARS[self.type]


class Arguments:
    """All arguments of one kernel, in order."""

    def __init__(self, *fields: Field) -> None:
        self.fields = fields

    @cached_property
    def structure(self) -> Any:
        """The host's structure, made by field names; pointers are integers. What is not named is 0.

        ``offsets`` of the class is [fields] uint64, bytes from the structure's start.
        """
        members = [(field.name, field.host_type) for field in self.fields]
        structure: Any = type("Arguments", (ctypes.Structure,), {"_fields_": members})
        structure.offsets = np.array([getattr(structure, field.name).offset for field in self.fields], dtype=np.uint64)
        return structure

    @cached_property
    def declaration(self) -> str:
        """``struct Arguments``, the kernel's parameters as ARGUMENT_LIST, and their names as ARGUMENT_NAMES.

        A kernel takes its parameters one by one and puts them into the structure: members of a structure that is
        itself the parameter are loaded where they are used, so that what follows from them stays in loops.
        """
        parameters = ", ".join(f"{field.type} {field.name}" for field in self.fields)
        names = ", ".join(field.name for field in self.fields)
        macros = [f"#define ARGUMENT_LIST {parameters}", f"#define ARGUMENT_NAMES {names}"]
        return "\n".join([self.members("Arguments"), *macros, ""])

    def members(self, name: str) -> str:
        """The C text of the structure, without macros, for one that is a part of a kernel's arguments."""
        lines = [f"  {field.type} {field.name};  // {field.comment}" for field in self.fields]
        return "\n".join([f"struct {name} {{", *lines, "};"])
