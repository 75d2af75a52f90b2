"""The CUDA gather_cache: every test of the portable kernel on a GPU, and its variants through the compiler."""

import pytest
import torch

from tests.helpers.paged_cache import make_layout, random_cache, random_transforms, rotary_table
from tests.kernels.triton import test_gather_cache as portable
from vllm_kvtuner.kernels.cuda import gather_cache as cuda
from vllm_kvtuner.kernels.cuda.build import compile_cubin
from vllm_kvtuner.kernels.cuda.rows import RowVariant, wide_lanes
from vllm_kvtuner.pages.layout import MAX_HEAD_SIZE

CPU = torch.device("cpu")
seed = portable.seed


@pytest.mark.gpu
class TestPortable:
    """The portable kernel's own tests."""

    @pytest.fixture(autouse=True)
    def cuda_kernel(self, monkeypatch):
        monkeypatch.setattr(portable, "gather_cache", cuda.gather_cache)

    test_every_pair = staticmethod(portable.test_every_pair)
    test_transforms_are_undone = staticmethod(portable.test_transforms_are_undone)
    test_far_positions = staticmethod(portable.test_far_positions)
    test_nothing_to_gather = staticmethod(portable.test_nothing_to_gather)
    test_long_prefixes = staticmethod(portable.test_long_prefixes)

    @pytest.mark.parametrize("head_size", range(32, MAX_HEAD_SIZE + 1, 32))
    @pytest.mark.parametrize("pair", ["K8V4", "K4V2", "K2V8"])
    def test_every_head_size(self, pair, head_size, device):
        transforms = random_transforms(3, head_size, device, key_hadamard=True)
        cache = random_cache(make_layout(pair, head_size, 32), portable.SEQ_LENS, 3, device)
        portable.check(cache, portable.SLICES, transforms, torch.float32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("pair", "head_size", "rotary_dim", "is_neox", "dtype"),
    [
        ("K8V8", 128, 0, True, torch.bfloat16),
        ("K4V4", 128, 128, True, torch.bfloat16),
        ("K4V2", 96, 48, True, torch.float16),
        ("K2V8", 256, 64, False, torch.float32),
    ],
)
def test_variants_compile(pair, head_size, rotary_dim, is_neox, dtype, arch):
    switches = dict(key_hadamard=True, value_hadamard=True) if rotary_dim else {}
    rotary = rotary_table(rotary_dim, is_neox, 16, CPU) if rotary_dim else None
    transforms = random_transforms(
        2, head_size, CPU, rotary, offset=float(rotary_dim), equalization=rotary is not None, **switches
    )
    variant = RowVariant(make_layout(pair, head_size), 2, dtype, wide_lanes(head_size))
    code = compile_cubin(cuda.source(transforms, variant), arch, None)
    assert b".text.gather_cache" in bytes(code.code)
