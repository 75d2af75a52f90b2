"""After a sleep, kernels count from zero again."""

from types import SimpleNamespace

import torch

from vllm_kvtuner.attention.impl import KVTunerImpl, Served
from vllm_kvtuner.kernels import choice, gpu
from vllm_kvtuner.kernels.contract import AttentionShape, BatchLimits, Span
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms


def test_waking_up_zeroes_the_counters_of_the_decode_kernel(monkeypatch):
    """Of packed pages and of the window, whatever the layer's transforms were when they were reserved."""
    scratch = SimpleNamespace(arrivals=torch.ones(3, dtype=torch.int32))
    monkeypatch.setattr(choice, "decode_kernel", lambda *_: choice.CUDA)
    monkeypatch.setattr(gpu, "_cuda_workspace", lambda *_: scratch)
    kernels = gpu.GpuKernels(AttentionShape(4, 2, 64, 0.125), Span(), BatchLimits(8, 1), torch.device("cpu"))
    kernels.reserve(PrecisionPair(4, 4), LayerTransforms(), ())
    kernels.forget()
    woken: list[int] = []
    window = SimpleNamespace(packed=SimpleNamespace(wake_up=lambda: woken.append(1)))
    implementation = object.__new__(KVTunerImpl)
    implementation.served = Served(kernels, None, window)
    implementation.wake_up()
    assert scratch.arrivals.tolist() == [0] * 3
    assert woken == [1]
