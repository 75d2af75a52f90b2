"""Limits of a process: its time, its memory, and its end."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, time
from pathlib import Path
from kvtuner_tools.architectures.processes import LimitedProcesses

if __name__ == "__main__":
    log = Path(sys.argv[1])
    processes = LimitedProcesses(5.0, 200 << 20, "psutil", log)
    name = "VLLM_LOGGING_LEVEL"
    print(processes.call(abs, -3), os.environ.get(name), processes.call(os.getenv, name))
    for function, argument in ((time.sleep, 60), (bytearray, 400 << 20), (os._exit, 3), (int, "x")):
        try:
            found = processes.call(function, argument)
            print("no limit", type(found))
        except Exception as error:
            print(type(error).__name__, error)
    processes.call(print, "heard")
    print(log.read_text().strip())
"""


@pytest.mark.slow
def test_limits(tmp_path):
    """In a process of its own, since all of a process's are forked from one server."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "log")]
    # Engines of other tests may have set it in this process.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        "3 None ERROR",
        "TimeoutError no answer within 5 s",
        "MemoryError more than 209,715,200 bytes of memory",
        "ChildProcessError the process ended with status 3",
        "RuntimeError ValueError: invalid literal for int() with base 10: 'x'",
        "heard",
    ]
