"""What Triton's compiler asks of the sources before it compiles, which its interpreter does not ask."""

import os
import subprocess
import sys

import pytest

CODE = """
import importlib, pkgutil
from triton.runtime.jit import JITFunction
import vllm_kvtuner.kernels.triton as room

for module in pkgutil.iter_modules(room.__path__):
    for name, function in vars(importlib.import_module(f"{room.__name__}.{module.name}")).items():
        if isinstance(function, JITFunction):
            assert function.cache_key, name  # goes through all that the function names
            print(name)
"""


@pytest.mark.slow
def test_functions_name_only_what_can_be_compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"store_rows", "code_slice"} <= set(done.stdout.split()), done.stdout
