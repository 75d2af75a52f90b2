"""What layers have their kernels tested on: at once, before the first of them chooses, and what then serves."""

from types import SimpleNamespace

import pytest
import torch

from vllm_kvtuner.attention import impl
from vllm_kvtuner.attention.prefill import WorkspaceShape
from vllm_kvtuner.attention.window_cache import RecentCache
from vllm_kvtuner.attention.window_kernels import GpuWindow
from vllm_kvtuner.kernels import choice, gpu, trial
from vllm_kvtuner.kernels.contract import Span
from vllm_kvtuner.kernels.self_test_cases import random_transforms, transform_names
from vllm_kvtuner.kernels.self_test_errors import Errors
from vllm_kvtuner.pages.layout import PageLayout, PrecisionPair
from vllm_kvtuner.profile.model_shape import LayerShape
from vllm_kvtuner.profile.profile import LayerPrecision, RecentWindow, TransformSettings

CPU = torch.device("cpu")
WINDOW_BLOCK = 32
TRANSFORMS = TransformSettings(key_offset=True, key_equalization=True, key_hadamard=True)


@pytest.fixture
def layers(monkeypatch):
    """Constructs the implementations of a model as on a GPU, whose kernels choose without one."""
    contexts = {}
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float16),
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        speculative_config=None,
        use_v2_model_runner=True,
        cache_config=SimpleNamespace(block_size=64),
        compilation_config=SimpleNamespace(static_forward_context=contexts),
    )
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(impl, "recent_block_size", lambda config, window: WINDOW_BLOCK)
    monkeypatch.setattr(gpu, "_cuda_workspace", lambda *_: SimpleNamespace(arrivals=None))
    monkeypatch.setattr(gpu, "_triton_workspace", lambda *_: SimpleNamespace())
    monkeypatch.setattr(choice, "device_capability", lambda device: (9, 0))

    def on_gpu(self, span, cache):
        kernels = gpu.GpuKernels(self.shape, span, self.limits, CPU, cache is not None, self.dtype)
        window = None
        if cache is not None:
            packed = gpu.GpuKernels(self.shape, Span(cache.window.tokens), self.limits, CPU, True, self.dtype)
            window = GpuWindow(cache, kernels, packed)
        prefill = SimpleNamespace(workspace=lambda: WorkspaceShape(16, self.dtype, CPU))
        return impl.Served(kernels, prefill, window)

    monkeypatch.setattr(impl.KVTunerImpl, "_on_cpu", on_gpu)

    def construct(*precisions):
        contexts["a linear-attention layer"] = SimpleNamespace()
        for index, (pair, transforms, recent) in enumerate(precisions):
            precision = LayerPrecision(index, PrecisionPair.parse(pair), LayerShape(2, 64), transforms, recent)
            settings = impl.LayerSettings(precision, False)
            layer = impl.KVTunerImpl(4, 64, 0.125, num_kv_heads=2, settings=settings)
            if recent is not None:
                layer.take_window(RecentCache(f"{index}.recent", recent, 2, 64, torch.float16))
            contexts[f"layer {index}"] = SimpleNamespace(impl=layer)
        return [context.impl for context in contexts.values() if hasattr(context, "impl")]

    trial._verdict.cache_clear()
    yield construct
    trial._verdict.cache_clear()


@pytest.fixture
def asked(monkeypatch):
    """Cases that the CUDA kernels compute, all of them right, and in which order they are asked for."""
    calls = []

    def measure(case, device):
        calls.append(case)
        return Errors(0.5, 0.0, 0.0, 0.0, 0, 0.0)

    monkeypatch.setattr(gpu, "measure_cuda", measure)
    monkeypatch.setattr(gpu, "compile_cuda", trial.compile_as_they_run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    return calls


def test_the_first_layer_has_all_kinds_tested_and_no_other_is_asked_later(layers, asked):
    """Not when scratch is reserved, nor when statics are bound, nor by pages of the cache's own block size."""
    model = layers(
        ("K4V4", TransformSettings(), None),
        ("K4V2", TRANSFORMS, None),
        ("K4V4", TransformSettings(), None),
        ("K2V2", TransformSettings(), RecentWindow(40, 16, 4)),
        ("K2V2", TransformSettings(), RecentWindow(40, 8)),
    )
    model[0].process_weights_after_loading(torch.float16)
    assert [(str(case.layout.pair), case.layout.block_size, case.window_block_size) for case in asked] == [
        ("K4V4", 64, 0),
        ("K4V2", 64, 0),
        ("K2V2", 64, WINDOW_BLOCK),
        ("K2V2", 64, 0),
        ("K8V8", WINDOW_BLOCK, 0),
    ]
    assert {case.dtype for case in asked} == {torch.float16}
    assert [case.span for case in asked[2:]] == [Span(None, 40, 4), Span(None, 40), Span(40)]
    assert [case.write_lse for case in asked] == [False, False, True, True, True]
    assert asked[1].transforms == ("key_offset", "key_equalization", "key_hadamard")
    done = len(asked)
    for layer in model[1:]:
        layer.process_weights_after_loading(torch.float16)
    bound = random_transforms(asked[1].transforms, asked[1], CPU)
    model[1].bind_statics(bound)
    kernels = model[1].served.kernels
    for block_size in (16, 48):
        layout = PageLayout(PrecisionPair(4, 2), 64, block_size)
        assert kernels._choose(layout, bound, transform_names(bound)) == choice.CUDA
    assert len(asked) == done


def test_a_layer_that_is_switched_has_its_new_kernels_tested(layers, asked):
    (layer,) = layers(("K8V8", TransformSettings(), None))
    layer.process_weights_after_loading(torch.float16)
    layer.served.kernels._choose(PageLayout(PrecisionPair(2, 2), 64, 16), layer.transforms, ())
    assert [str(case.layout.pair) for case in asked] == ["K8V8", "K2V2"]


def test_no_kernel_is_tested_where_triton_serves_anyway(layers, asked, monkeypatch):
    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", "triton")
    (layer,) = layers(("K8V8", TransformSettings(), None))
    layer.process_weights_after_loading(torch.float16)
    assert not asked


def test_a_card_that_fails_reserves_tritons_scratch(layers, asked, monkeypatch):
    taken = []
    monkeypatch.setattr(gpu, "_cuda_workspace", lambda *_: pytest.fail("CUDA's scratch"))
    monkeypatch.setattr(gpu, "_triton_workspace", lambda *_: taken.append(1))
    wrong = Errors(0.5, 0.0, 1.0, 0.0, 0, 0.0)
    monkeypatch.setattr(gpu, "measure_cuda", lambda case, device: wrong)
    (layer,) = layers(("K8V8", TransformSettings(), None))
    layer.process_weights_after_loading(torch.float16)
    assert taken == [1]
    monkeypatch.setenv("KVTUNER_DECODE_KERNEL", "cuda")
    with pytest.raises(ValueError, match=r"^KVTUNER_DECODE_KERNEL is 'cuda', but the CUDA kernels failed"):
        layer.process_weights_after_loading(torch.float16)
