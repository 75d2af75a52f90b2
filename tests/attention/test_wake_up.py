"""After a sleep, kernels count from zero again."""

from types import SimpleNamespace

import torch

from vllm_kvtuner.attention.impl import KVTunerImpl
from vllm_kvtuner.kernels import choice
from vllm_kvtuner.kernels import layer as layer_module
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms


def test_waking_up_zeroes_the_counters_of_the_decode_kernel(monkeypatch):
    """Of packed pages and of the window, whatever the layer's transforms were when they were reserved."""
    scratch = SimpleNamespace(arrivals=torch.ones(3, dtype=torch.int32))
    monkeypatch.setattr(choice, "decode_kernel", lambda *_: choice.CUDA)
    monkeypatch.setattr(layer_module, "_cuda_workspace", lambda *_: scratch)
    kernels = layer_module.LayerKernels(4, 2, 64, 0.125, None, 0.0, 8, 1, torch.device("cpu"))
    kernels.reserve(PrecisionPair(4, 4), LayerTransforms(), False)
    kernels.forget()
    woken: list[int] = []
    implementation = object.__new__(KVTunerImpl)
    implementation.kernels = kernels
    implementation.recent_kernels = SimpleNamespace(kernels=SimpleNamespace(wake_up=lambda: woken.append(1)))
    implementation.wake_up()
    assert scratch.arrivals.tolist() == [0] * 3
    assert woken == [1]
