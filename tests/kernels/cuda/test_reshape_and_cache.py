"""The CUDA reshape_and_cache: every test of the portable kernel on a GPU, and its variants through the compiler."""

import pytest
import torch

from tests.helpers.paged_cache import make_layout, random_transforms, rotary_table
from tests.kernels.triton import test_reshape_and_cache as portable
from vllm_kvtuner.kernels.cuda import reshape_and_cache as cuda
from vllm_kvtuner.kernels.cuda.build import compile_cubin
from vllm_kvtuner.kernels.cuda.rows import RowVariant, StoreVariant, row_lanes, unsupported, wide_lanes
from vllm_kvtuner.kernels.reference.rows import reshape_and_cache_ref
from vllm_kvtuner.pages.layout import MAX_HEAD_SIZE, QUANTIZED_BITS
from vllm_kvtuner.pages.transforms import LayerTransforms

CPU = torch.device("cpu")
seed = portable.seed


@pytest.fixture(params=["few_rows", "many_rows"])
def rows(request, monkeypatch):
    """The variant for few rows or the one for many, whatever a test stores."""
    monkeypatch.setattr(cuda, "MANY_ROWS", 0 if request.param == "many_rows" else 1 << 62)


@pytest.mark.gpu
@pytest.mark.usefixtures("rows")
class TestPortable:
    """The portable kernel's own tests."""

    @pytest.fixture(autouse=True)
    def cuda_kernel(self, monkeypatch):
        monkeypatch.setattr(portable, "reshape_and_cache", cuda.reshape_and_cache)

    test_every_pair = staticmethod(portable.test_every_pair_stores_what_the_reference_stores)
    test_recent_window = staticmethod(portable.test_a_recent_window_keeps_the_rows)
    test_untouched_bytes = staticmethod(portable.test_untouched_bytes_stay)
    test_nothing_to_store = staticmethod(portable.test_nothing_to_store)
    test_constant_rows = staticmethod(portable.test_constant_rows_get_scale_0)
    test_transforms = staticmethod(portable.test_transforms)
    test_range_search = staticmethod(portable.test_range_search_beats_min_max_at_2_bits)
    test_offsets_beyond_32_bits = staticmethod(portable.test_offsets_beyond_32_bits)
    test_a_long_prefill = staticmethod(portable.test_a_long_prefill)


@pytest.mark.gpu
@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("head_size", range(32, MAX_HEAD_SIZE + 1, 32))
@pytest.mark.parametrize("pair", ["K8V4", "K4V2", "K2V8"])
def test_bytes_are_the_references(pair, head_size, device):
    """Offset and equalization take the reference's roundings; more tiles than warps, and a ragged last one."""
    layout = make_layout(pair, head_size, 32)
    rotary = rotary_table(head_size // 2, True, 4096, device)
    transforms = random_transforms(8, head_size, device, rotary, offset=5.0, equalization=True)
    key, value = portable.tokens(2003, 8, head_size, torch.bfloat16, device)
    slots = portable.random_slots(2003, 2016, device)
    slots[::7] = -1
    positions = torch.randint(0, 4096, (2003,), device=device)
    positions[::7] = 1 << 40  # of tokens that are not stored
    got, want = (portable.empty_pages(layout, 63, 8, device, transforms) for _ in range(2))
    cuda.reshape_and_cache(key, value, slots, positions, got)
    reshape_and_cache_ref(key, value, slots, positions, want)
    assert torch.equal(got.kv_cache, want.kv_cache)


@pytest.mark.quick(1)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("many_rows", [False, True], ids=["few_rows", "many_rows"])
@pytest.mark.parametrize(
    ("pair", "head_size", "rotary_dim", "is_neox", "dtype"),
    [
        ("K8V8", 128, 0, True, torch.bfloat16),
        ("K4V4", 128, 128, True, torch.bfloat16),
        ("K4V2", 96, 48, True, torch.float16),
        ("K2V8", 256, 64, False, torch.float32),
    ],
)
def test_variants_compile(pair, head_size, rotary_dim, is_neox, dtype, many_rows, arch):
    switches = dict(key_hadamard=True, value_hadamard=True, range_search=True) if rotary_dim else {}
    rotary = rotary_table(rotary_dim, is_neox, 16, CPU) if rotary_dim else None
    transforms = random_transforms(
        2, head_size, CPU, rotary, offset=float(rotary_dim), equalization=rotary is not None, **switches
    )
    most_lanes = wide_lanes(head_size) if many_rows else 32
    variant = StoreVariant(
        RowVariant(make_layout(pair, head_size), 2, dtype, most_lanes),
        window_block_size=32 if dtype == torch.bfloat16 else 0,
    )
    code = compile_cubin(cuda.source(transforms, variant), arch, None)
    assert b".text.reshape_and_cache" in bytes(code.code)


@pytest.mark.parametrize("head_size", range(32, MAX_HEAD_SIZE + 1, 32))
def test_every_served_head_size_has_lanes(head_size):
    assert unsupported(make_layout("K8V8", head_size), LayerTransforms()) is None
    for bits in QUANTIZED_BITS:
        for most in (wide_lanes(head_size), 32):
            lanes = row_lanes(head_size, bits, most)
            # The kernels hold at most 4 rows in a warp, and codes that share a byte in one lane.
            assert lanes in (8, 16, 32)
            assert (head_size * bits // 8) % lanes == 0


def test_other_head_sizes_are_left_to_triton():
    assert "head_size 80 is no multiple of 32" in unsupported(make_layout("K8V8", 80), LayerTransforms())
    assert "head_size 512 is above 256" in unsupported(make_layout("K8V8", 512), LayerTransforms())
