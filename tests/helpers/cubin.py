"""What a compiled kernel takes of a card, read from its cubin without one."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?UP?T?\w*\s+|@!?P\w+\s+)?([A-Z][A-Z0-9]+)", re.MULTILINE)


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers per thread (REG), bytes of stack (STACK) and local memory (LOCAL), and others, of its one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    (line,) = re.findall(r"REG:.*", result.stdout)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}


def local_memory_instructions(cubin: bytes) -> int:
    """Loads and stores of local memory, where registers that do not fit are spilled to."""
    found = instructions(cubin)
    assert found["IMMA"] or found["HMMA"] or found["HGMMA"], "no machine code of an attention kernel"
    return found["LDL"] + found["STL"]


def instructions(cubin: bytes) -> collections.Counter[str]:
    """How often each instruction of the machine code stands there, by its name without modifiers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True)
    return collections.Counter(INSTRUCTION.findall(result.stdout))
