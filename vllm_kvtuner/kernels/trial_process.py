"""The process of its own in which the CUDA kernels compute on a card for the first time (trial.py)."""

import json
import pickle
import sys

from vllm_kvtuner.kernels import gpu
from vllm_kvtuner.kernels.trial import try_cases


def main() -> None:
    """Read cases and a device, run the kernels, and print what came of it as the last line."""
    cases, device = pickle.load(sys.stdin.buffer)
    answer: dict[str, str | None] = {"failure": None, "refused": None}
    try:
        _, answer["failure"] = try_cases(cases, device, gpu.measure_cuda, gpu.compile_cuda)
    except ValueError as error:
        answer["refused"] = str(error)
    print(json.dumps(answer))
