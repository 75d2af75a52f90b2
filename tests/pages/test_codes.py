"""Code formats: packing is exact, and quantization keeps its bounds."""

import pytest
import torch

from vllm_kvtuner.pages.codes import FP16_MAX, code_format
from vllm_kvtuner.pages.layout import QUANTIZED_BITS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize("shape", [(64,), (1, 96), (7, 3, 128), (33, 256), (5, 80), (2, 8)])
def test_packing_is_exact(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = code_format(bits).pack(codes)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert torch.equal(code_format(bits).unpack(packed), codes)


def test_packing_order():
    """Byte j holds dimensions j, j + D/n, ... from the low bits up."""
    assert code_format(4).pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8)).tolist() == [1 + 16 * 3, 2 + 16 * 4]
    codes = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    assert code_format(2).pack(codes).tolist() == [0 + 4 * 2 + 16 * 3 + 64 * 1, 1 + 4 * 3 + 16 * 2 + 64 * 0]


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize(("spread", "middle"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 100.0), (9000.0, 0.0), (1e-6, 0.0)])
def test_rows_come_back_within_half_a_step(bits, spread, middle):
    rows = middle + spread * torch.randn(50, 64)
    codes, scale, minimum = code_format(bits).quantize(rows)
    assert codes.dtype == torch.uint8
    assert scale.dtype == minimum.dtype == torch.float16
    assert int(codes.max()) <= 2**bits - 1
    # Rounding the scale to fp16 (2^-11, or 2^-25 below 2^-14) moves the last code, rounding the minimum all of them.
    levels, step, low = 2**bits - 1, scale.float()[:, None], minimum.float().abs()[:, None]
    bound = step / 2 + levels * (step * 2**-11).clamp(min=2**-25) + (low * 2**-11).clamp(min=2**-25)
    assert ((code_format(bits).round_trip(rows) - rows).abs() <= bound * (1 + 1e-5)).all()
    assert (codes.amax(-1) >= levels - 3).all() or spread < 1e-5, "the range is used"


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize("number", [0.0, 1.0, -3.5, 1e-9])
def test_constant_rows_get_scale_0(bits, number):
    codes, scale, minimum = code_format(bits).quantize(torch.full((2, 64), number))
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(minimum, torch.full((2,), number).half())


def test_ranges_beyond_fp16_saturate():
    rows = torch.tensor([[-1e6, 1e6, 0.0, 5.0]])
    codes, scale, minimum = code_format(2).quantize(rows)
    assert scale.isfinite().all()
    assert minimum == -FP16_MAX
    assert codes.tolist() == [[0, 3, 1, 1]]


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_range_search_is_no_worse_in_any_row(bits):
    rows = torch.randn(200, 128) * (1 + 5 * (torch.rand(200, 128) > 0.99))
    errors = [(code_format(bits).round_trip(rows, search) - rows).square().sum(-1) for search in (False, True)]
    assert (errors[1] <= errors[0]).all()
    if bits == 8:
        assert torch.equal(errors[0], errors[1]), "8 bits are not searched"
    else:
        assert errors[1].sum() < (0.7 if bits == 2 else 0.95) * errors[0].sum()  # measured: 0.5 and 0.9


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_a_round_trip_is_what_a_page_gives_back(bits):
    codes = code_format(bits)
    rows = torch.randn(7, 64)
    quantized, scale, minimum = codes.quantize(rows)
    meta = torch.stack([scale, minimum], dim=-1)
    assert torch.equal(codes.dequantize(codes.pack(quantized), meta), codes.round_trip(rows))
