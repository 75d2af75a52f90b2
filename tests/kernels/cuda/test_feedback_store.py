"""The CUDA store with round feedback: lane by lane on a CPU, on a card (``gpu``), and through the compiler."""

import dataclasses

import pytest
import torch

from tests.helpers import cuda_emulator
from tests.helpers.cubin import instructions, resource_usage
from tests.helpers.paged_cache import make_layout, random_transforms, rotary_table
from tests.kernels.cuda.test_build import SHARED_BYTES_OF_A_CTA
from tests.kernels.triton import test_feedback_store as portable
from vllm_kvtuner.kernels.cuda import feedback_store
from vllm_kvtuner.kernels.cuda import reshape_and_cache as cuda
from vllm_kvtuner.kernels.cuda.build import compile_cubin
from vllm_kvtuner.kernels.cuda.rows import RowVariant, StoreVariant, wide_lanes
from vllm_kvtuner.pages.feedback import RoundFeedback

CPU = torch.device("cpu")
seed = portable.seed


class _Portable:
    """The portable kernel's own tests, by the variant for few rows and the one for many."""

    @pytest.fixture(autouse=True, params=["few_rows", "many_rows"])
    def cuda_kernel(self, request, monkeypatch):
        monkeypatch.setattr(cuda, "MANY_ROWS", 0 if request.param == "many_rows" else 1 << 62)
        monkeypatch.setattr(portable, "reshape_and_cache", cuda.reshape_and_cache)

    test_weighted_error = staticmethod(portable.test_the_weighted_error_is_the_references)
    test_every_head_size = staticmethod(portable.test_every_head_size)
    test_exact = staticmethod(portable.test_codes_are_the_references_where_nothing_is_near_a_tie)
    test_transforms = staticmethod(portable.test_transforms)
    test_untouched_bytes = staticmethod(portable.test_untouched_bytes_stay)
    test_window = staticmethod(portable.test_a_recent_window_keeps_the_rows)
    test_constant_rows = staticmethod(portable.test_constant_rows_get_scale_0)
    test_huge_rows = staticmethod(portable.test_huge_rows_saturate)
    test_nan = staticmethod(portable.test_rows_with_nan_read_as_nan)
    test_ranges = staticmethod(portable.test_the_best_range_is_taken)


@pytest.mark.quick(1)
@pytest.mark.skipif(cuda_emulator.available() is not None, reason=str(cuda_emulator.available()))
class TestEmulated(_Portable):
    @pytest.fixture
    def device(self, monkeypatch):
        cuda_emulator.install(monkeypatch)
        return CPU


@pytest.mark.gpu
class TestOnACard(_Portable):
    test_a_long_prefill = staticmethod(portable.test_a_long_prefill)


def feedback(head_size, ranges):
    factors = torch.eye(head_size).half().expand(8, -1, -1)
    return RoundFeedback(factors, {2: (1.0,) * ranges, 4: (1.0,) * ranges})


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize(
    ("pair", "head_size", "ranges", "dtype", "transformed", "many_rows"),
    [
        ("K4V2", 128, (3, 3), torch.bfloat16, True, True),
        ("K4V4", 128, (1, 1), torch.bfloat16, True, False),
        ("K4V4", 128, (1, 0), torch.bfloat16, False, True),
        ("K2V2", 256, (3, 2), torch.float16, True, True),
        ("K8V4", 64, (0, 3), torch.float32, False, False),
    ],
)
def test_variants_compile(pair, head_size, ranges, dtype, transformed, many_rows, arch):
    """Without spills, and within the shared memory that a CTA can have there; ``-rP`` shows the registers."""
    rotary = rotary_table(head_size, True, 16, CPU)
    switches = dict(key_hadamard=True, value_hadamard=True)
    transforms = random_transforms(8, head_size, CPU, rotary, 5.0 * transformed, transformed, **switches)
    keys, values = (feedback(head_size, count) if count else None for count in ranges)
    transforms = dataclasses.replace(transforms, key_feedback=keys, value_feedback=values)
    rows = RowVariant(make_layout(pair, head_size), 8, dtype, wide_lanes(head_size) if many_rows else 32)
    store = StoreVariant(rows, window_block_size=32 if dtype == torch.bfloat16 else 0)
    variant = feedback_store.FeedbackVariant(store, ranges)
    cubin = bytes(compile_cubin(feedback_store.source(transforms, variant), arch, None).code)
    usage, found = resource_usage(cubin), instructions(cubin)
    print(f"{arch}: {usage['REG']} registers, {variant.shared_bytes} bytes of shared memory")
    assert (usage["STACK"], usage["LOCAL"], found["LDL"], found["STL"]) == (0, 0, 0, 0)
    assert variant.shared_bytes <= SHARED_BYTES_OF_A_CTA[arch]
    assert found["HMMA"]


def test_tables_hold_every_coefficient_once():
    """And fill up with zeros, so that what a lane reads is what the arithmetic takes."""
    size, count = 64, 64 * 63 // 2
    above = torch.zeros(size, size)
    above[tuple(torch.triu_indices(size, size, 1))] = 1.0 + torch.randperm(count) % 2048
    factors = (above + 0.5 * torch.eye(size))[None].half()
    tables = feedback_store.FeedbackTables.of(RoundFeedback(factors, {2: (0.8, 1.1)}), 2)
    triangles = tables.triangles[:, :, : feedback_store.BLOCK * 9]
    got = torch.cat([triangles[triangles > 0], tables.fragments.flatten().float()]).sort().values
    assert torch.equal(got, factors.float().triu(1)[factors.triu(1) > 0].sort().values)
    assert (tables.triangles[:, :, -16:] == 0.25).all()
    assert torch.equal(tables.ranges, torch.tensor([[0.8 / 3, 0.1], [1.1 / 3, -0.05]]))
