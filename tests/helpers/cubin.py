"""What a compiled kernel takes of a card, read from its cubin without one."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True)
    assert re.search(r"\b(?:I|H|HG)MMA\b", result.stdout), "no machine code of an attention kernel"
    return len(re.findall(r"\b(?:LDL|STL)\b", result.stdout))
