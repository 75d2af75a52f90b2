"""What a layer's GPU kernels say of themselves, without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.paged_cache import empty_cache, make_layout
from vllm_kvtuner.kernels import choice, gpu
from vllm_kvtuner.kernels.contract import AttentionShape, BatchLimits, Pages, Span
from vllm_kvtuner.pages.transforms import LayerTransforms

CPU = torch.device("cpu")


@pytest.mark.parametrize("failure", [None, "wrong numbers"])
def test_what_decodes_is_named_once_it_is_chosen(failure, monkeypatch):
    """After the card's self-test: it, not the rules alone, decides."""
    monkeypatch.delenv("KVTUNER_DECODE_KERNEL", raising=False)
    monkeypatch.setattr(choice, "device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "prove", lambda cases, device: SimpleNamespace(failure=failure))
    monkeypatch.setattr(gpu, "_cuda_workspace", lambda *_: None)
    monkeypatch.setattr(gpu, "_triton_workspace", lambda *_: None)
    served = []
    module = SimpleNamespace(paged_attention=lambda *_, **__: None)
    monkeypatch.setattr(gpu, "_decode_module", lambda kernel: served.append(kernel) or module)
    kernels = gpu.GpuKernels(AttentionShape(4, 2, 64, 0.125), Span(), BatchLimits(8, 1), CPU)
    layout = make_layout("K4V4", 64)
    pages = Pages(empty_cache(layout, 2, 2, CPU), layout, LayerTransforms())
    assert kernels.decode_kernel is None
    query = torch.zeros(1, 4, 64)
    kernels.attend(query, kernels.dummy_queries(1, 1), pages, query.clone())
    assert [kernels.decode_kernel] == served == ["cuda" if failure is None else "triton"]
    kernels.forget()
    assert kernels.decode_kernel is None
