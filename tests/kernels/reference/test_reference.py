"""The reference: packing exactly, quantization within its bounds, attention against attention on plain tensors."""

import itertools

import pytest
import torch

from tests.helpers.paged_cache import (
    empty_cache,
    make_layout,
    random_cache,
    random_table,
    random_transforms,
    rotary_table,
    slots_of,
)
from vllm_kvtuner.kernels.reference import attention
from vllm_kvtuner.kernels.reference.attention import attention_ref, merge_segments_ref, paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import (
    gather_cache_ref,
    gather_rows_ref,
    read_back_ref,
    reshape_and_cache_ref,
    store_rows_ref,
)
from vllm_kvtuner.pages.codes import FP16_MAX, pack_codes, quantize_rows, unpack_codes
from vllm_kvtuner.pages.layout import QUANTIZED_BITS, QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.pages.views import page_parts

CPU = torch.device("cpu")
SEQ_LENS = [37, 1, 0, 16, 130]
QUERY_LENS = [3, 1, 1, 16, 2]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def back(codes, scale, minimum):
    return codes.float() * scale.float()[..., None] + minimum.float()[..., None]


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize("shape", [(64,), (1, 96), (7, 3, 128), (33, 256), (5, 80), (2, 8)])
def test_packing_is_exact(bits, shape):
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_packing_order():
    """Byte j holds dimensions j, j + D/n, ... from the low bits up."""
    assert pack_codes(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4).tolist() == [1 + 16 * 3, 2 + 16 * 4]
    codes = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0], dtype=torch.uint8)
    assert pack_codes(codes, 2).tolist() == [0 + 4 * 2 + 16 * 3 + 64 * 1, 1 + 4 * 3 + 16 * 2 + 64 * 0]


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize(("spread", "middle"), [(1.0, 0.0), (1e-3, 0.0), (1.0, 100.0), (9000.0, 0.0), (1e-6, 0.0)])
def test_rows_come_back_within_half_a_step(bits, spread, middle):
    rows = middle + spread * torch.randn(50, 64)
    codes, scale, minimum = quantize_rows(rows, bits)
    assert codes.dtype == torch.uint8
    assert scale.dtype == minimum.dtype == torch.float16
    assert int(codes.max()) <= 2**bits - 1
    # Rounding the scale to fp16 (2^-11, or 2^-25 below 2^-14) moves the last code, rounding the minimum all of them.
    levels, step, low = 2**bits - 1, scale.float()[:, None], minimum.float().abs()[:, None]
    bound = step / 2 + levels * (step * 2**-11).clamp(min=2**-25) + (low * 2**-11).clamp(min=2**-25)
    assert ((back(codes, scale, minimum) - rows).abs() <= bound * (1 + 1e-5)).all()
    assert (codes.amax(-1) >= levels - 3).all() or spread < 1e-5, "the range is used"


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@pytest.mark.parametrize("number", [0.0, 1.0, -3.5, 1e-9])
def test_constant_rows_get_scale_0(bits, number):
    codes, scale, minimum = quantize_rows(torch.full((2, 64), number), bits)
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(minimum, torch.full((2,), number).half())


def test_ranges_beyond_fp16_saturate():
    rows = torch.tensor([[-1e6, 1e6, 0.0, 5.0]])
    codes, scale, minimum = quantize_rows(rows, 2)
    assert scale.isfinite().all()
    assert minimum == -FP16_MAX
    assert codes.tolist() == [[0, 3, 1, 1]]


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_range_search_is_no_worse_in_any_row(bits):
    rows = torch.randn(200, 128) * (1 + 5 * (torch.rand(200, 128) > 0.99))
    errors = [(back(*quantize_rows(rows, bits, search)) - rows).square().sum(-1) for search in (False, True)]
    assert (errors[1] <= errors[0]).all()
    if bits == 8:
        assert torch.equal(errors[0], errors[1]), "8 bits are not searched"
    else:
        assert errors[1].sum() < (0.7 if bits == 2 else 0.95) * errors[0].sum()  # measured: 0.5 and 0.9


def gathered(cache, transforms, request):
    """All keys and values of one request in model space, fp32."""
    length = int(cache.seq_lens[request])
    rows = [torch.empty(length, cache.kv_cache.shape[1], cache.layout.head_size) for _ in range(2)]
    bounds, start = torch.tensor([0, length], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    table = cache.block_table[request : request + 1]
    gather_cache_ref(cache.kv_cache, table, bounds, start, *rows, cache.layout, transforms, num_tokens=length)
    return rows


def plain_attention(query, key, value, scale, window, soft_cap, skip=0):
    """Attention row by row in fp64, straight from its definition, and the log-sum-exp of each row."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full((query.shape[1], query.shape[0]), -torch.inf, dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for row, head in itertools.product(range(query.shape[0]), range(query.shape[1])):
        position = key.shape[0] - query.shape[0] + row
        first = 0 if window is None else max(0, position - window + 1)
        if position + 1 - skip <= first:
            continue
        keys, values = (x[first : position + 1 - skip, head // group].double() for x in (key, value))
        logits = keys @ query[row, head].double() * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        out[row, head] = torch.softmax(logits, 0) @ values
        lse[head, row] = torch.logsumexp(logits, 0)
    return out, lse


@pytest.mark.parametrize(
    ("window", "soft_cap", "skip"),
    [(None, 0.0, 0), (1, 0.0, 0), (20, 0.0, 0), (None, 3.0, 0), (20, 3.0, 0), (None, 0.0, 5), (20, 3.0, 17)],
)
@pytest.mark.parametrize("batch_tokens", [1, 80, 1 << 15], ids=["one_by_one", "some_together", "all_together"])
def test_attention_on_pages_and_on_plain_tensors(window, soft_cap, skip, batch_tokens, monkeypatch):
    monkeypatch.setattr(attention, "BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(attention, "SCORES_PER_SLICE", 300)
    rotary = rotary_table(48, True, 200, CPU)
    transforms = random_transforms(
        2, 96, CPU, rotary, offset=3.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    cache = random_cache(make_layout("K8V4", 96), SEQ_LENS, 2, CPU)
    query = torch.randn(sum(QUERY_LENS), 6, 96)
    starts = torch.tensor([0, *itertools.accumulate(QUERY_LENS)], dtype=torch.int32)
    scale = 96**-0.5
    output, lse = torch.full_like(query, torch.nan), torch.full((6, len(query)), torch.nan)
    paged_attention_ref(
        query, cache.kv_cache, cache.block_table, cache.seq_lens, starts, max(QUERY_LENS), scale, cache.layout,
        transforms, output, window, soft_cap, skip, lse,
    )  # fmt: skip
    for request, length in enumerate(SEQ_LENS):
        rows = slice(int(starts[request]), int(starts[request + 1]))
        if length == 0:
            assert not output[rows].any()
            assert (lse[:, rows] == -torch.inf).all()
            continue
        key, value = gathered(cache, transforms, request)
        want, want_lse = plain_attention(query[rows], key, value, scale, window, soft_cap, skip)
        torch.testing.assert_close(output[rows].double(), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(lse[:, rows].double(), want_lse, rtol=0, atol=1e-4)
        contiguous, contiguous_lse = torch.empty_like(query[rows]), torch.empty_like(lse[:, rows])
        attention_ref(query[rows], key, value, scale, contiguous, window, soft_cap, skip, contiguous_lse)
        torch.testing.assert_close(contiguous.double(), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(contiguous_lse.double(), want_lse, rtol=0, atol=1e-4)


def test_blocks_that_have_left_the_sliding_window_may_hold_anything():
    """They may be another request's by now, in another format."""
    cache = random_cache(make_layout("K4V4", 64), [100], 2, CPU)
    query, starts = torch.randn(1, 4, 64), torch.tensor([0, 1], dtype=torch.int32)
    outputs = []
    for byte in (None, 0xFF):  # as fp16 scales, NaN
        if byte is not None:
            cache.kv_cache[cache.block_table[0, :5].long()] = byte
        outputs.append(torch.empty_like(query))
        paged_attention_ref(
            query, cache.kv_cache, cache.block_table, cache.seq_lens, starts, 1, 0.125, cache.layout,
            LayerTransforms(), outputs[-1], 20,
        )  # fmt: skip
    assert torch.equal(*outputs)


@pytest.mark.parametrize("skip", [1, 7, 200])
def test_segments_merge_to_attention_over_all_tokens(skip):
    query, key, value = torch.randn(30, 4, 64), torch.randn(90, 2, 64), torch.randn(90, 2, 64)
    outputs, lses, whole = [torch.empty_like(query) for _ in range(2)], [torch.empty(4, 30) for _ in range(2)], None
    attention_ref(query, key, value, 0.125, outputs[0], skip_newest=skip, lse=lses[0])
    attention_ref(query, key, value, 0.125, outputs[1], sliding_window=skip, lse=lses[1])
    merged, whole = torch.empty_like(query), torch.empty_like(query)
    merge_segments_ref(tuple(outputs), tuple(lses), merged)
    attention_ref(query, key, value, 0.125, whole)
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-5)
    empty = torch.full((4, 30), -torch.inf)
    merge_segments_ref(tuple(outputs), (empty, empty), merged)
    assert not merged.any(), "padding"


def test_rows_come_back_as_they_were_stored():
    table, num_blocks = random_table(make_layout("K8V8", 64), SEQ_LENS, CPU)
    kv_cache = torch.full((num_blocks, 3, 16, 128), torch.nan, dtype=torch.bfloat16)
    key, value = torch.randn(2, sum(SEQ_LENS), 3, 64).bfloat16()
    slots = slots_of(table, SEQ_LENS, 16)
    store_rows_ref(key, value, kv_cache, slots)
    bounds = torch.tensor([0, *itertools.accumulate(SEQ_LENS)], dtype=torch.int32)
    keys, values = torch.empty(2, *key.shape)
    starts = torch.zeros(len(SEQ_LENS), dtype=torch.int32)
    gather_rows_ref(kv_cache, table, bounds, starts, keys, values, num_tokens=sum(SEQ_LENS))
    assert torch.equal(keys, key.float())
    assert torch.equal(values, value.float())
    before = kv_cache.clone()
    store_rows_ref(key, value, kv_cache, torch.full_like(slots, -1))
    assert torch.equal(before.nan_to_num(), kv_cache.nan_to_num())


@pytest.mark.parametrize("pair", [pair.name for pair in QUANTIZED_PAIRS])
def test_what_is_stored_comes_back(pair):
    """Store, then gather, through every transform: within half a step of each row, rotated back."""
    layout = make_layout(pair, 64)
    rotary = rotary_table(64, False, 200, CPU)
    transforms = random_transforms(
        3, 64, CPU, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    table, num_blocks = random_table(layout, SEQ_LENS, CPU)
    kv_cache = empty_cache(layout, num_blocks, 3, CPU)
    key, value = torch.randn(2, sum(SEQ_LENS), 3, 64)
    positions = torch.cat([torch.arange(length) for length in SEQ_LENS])
    slots = slots_of(table, SEQ_LENS, 16)
    reshape_and_cache_ref(key, value, kv_cache, slots, positions, layout, transforms)
    keys, values = torch.empty_like(key), torch.empty_like(value)
    bounds = torch.tensor([0, *itertools.accumulate(SEQ_LENS)], dtype=torch.int32)
    starts = torch.zeros(len(SEQ_LENS), dtype=torch.int32)
    gather_cache_ref(kv_cache, table, bounds, starts, keys, values, layout, transforms, num_tokens=sum(SEQ_LENS))
    at_once = read_back_ref(key, value, positions, layout.pair, transforms)
    for got, read_back in zip((keys, values), at_once, strict=True):
        torch.testing.assert_close(read_back, got, rtol=0, atol=1e-5)
    _, _, k_meta, v_meta = page_parts(kv_cache, layout)
    stretch = transforms.key_equalization.max()
    for got, want, meta, factor in ((keys, key, k_meta, stretch), (values, value, v_meta, 1.0)):
        # Half a step in each stored number is sqrt(64) / 2 steps at most in one number rotated back.
        step = meta[slots // 16, :, slots % 16, 0].float().max()
        assert (got - want).abs().max() <= 4.2 * factor * step
        assert (got - want).square().mean().sqrt() <= 0.35 * factor * step


def test_empty_slots_store_nothing():
    layout = make_layout("K4V4", 64)
    kv_cache = empty_cache(layout, 2, 1, CPU)
    before = kv_cache.clone()
    rows = torch.randn(3, 1, 64)
    reshape_and_cache_ref(rows, rows, kv_cache, torch.tensor([-1, -1]), None, layout, LayerTransforms())
    assert torch.equal(kv_cache, before)
    reshape_and_cache_ref(rows, rows, kv_cache, torch.tensor([-1, 20]), None, layout, LayerTransforms())
    changed = (kv_cache != before).any(-1).nonzero()
    assert set(changed[:, 0].tolist()) == {1}, "slot 20 lies in block 1"
