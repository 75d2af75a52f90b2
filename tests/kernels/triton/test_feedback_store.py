"""The store with round feedback against the reference: the error that counts, codes, and bytes it must not touch.

Where a number is within rounding of the middle between two codes, kernels may take the other code than the reference,
and channels before it follow. So rows are compared by what their errors cost, and by most of their codes. Tests call
this module's ``reshape_and_cache``, so that another implementation can take its place.
"""

import dataclasses
import math

import pytest
import torch

from tests.helpers.paged_cache import make_layout, random_transforms, rotary_table
from tests.kernels.triton.test_reshape_and_cache import empty_pages, parts_of, random_slots, stored, tokens
from tests.pages.test_feedback import random_feedback, weighted_error
from vllm_kvtuner.kernels.contract import WindowRows
from vllm_kvtuner.kernels.reference.rows import reshape_and_cache_ref, store_rows_ref
from vllm_kvtuner.kernels.triton.reshape_and_cache import reshape_and_cache
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import FEEDBACK_BITS, FP16_MAX
from vllm_kvtuner.pages.transforms import KEY, VALUE, LayerTransforms, rotate_values, transform_keys

TOTAL_LIMIT = 0.03
"""By how much the weighted error of a test's rows together may differ from the reference's: one of some 20 rows that
takes another code at a tie counts by a hundredth."""
ROW_LIMIT = 3.0
"""How many times the reference's the weighted error of one row may be: a code that lies between two moves others."""
SAME_CODES = 0.98
"""Codes that must be the reference's, at least."""
RANGES = {1: (0.9,), 2: (0.8, 1.0), 3: (0.75, 0.9, 1.05)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def feedback(head_size, heads, ranges, device):
    known = random_feedback(head_size, RANGES[ranges], heads)
    return RoundFeedback(known.factors.to(device), known.ranges)


def sides_of(pages, slots, key, value, positions=None):
    """Per side: what is stored, the rows that were to be, the round feedback or None."""
    transforms, layout = pages.transforms, pages.layout
    rows = transform_keys(key, positions, transforms), rotate_values(value, transforms)
    feedbacks = transforms.feedback(KEY, layout.k_bits), transforms.feedback(VALUE, layout.v_bits)
    return list(zip(stored(pages, slots), rows, feedbacks, strict=True))


def check_against_reference(pages, slots, key, value, positions=None):
    """What stands at ``slots``, all of which were stored, against what the reference stores."""
    layout, transforms, (blocks, heads) = pages.layout, pages.transforms, pages.kv_cache.shape[:2]
    want = empty_pages(layout, blocks, heads, key.device, transforms)
    reshape_and_cache_ref(key, value, slots, positions, want)
    for (ours, rows, known), (theirs, _, _) in zip(
        sides_of(pages, slots, key, value, positions), sides_of(want, slots, key, value, positions), strict=True
    ):
        same = ours.format.unpack(ours.codes) == theirs.format.unpack(theirs.codes)
        assert same.float().mean() >= SAME_CODES, same.float().mean()
        if known is None:
            # The Hadamard matrix moves minimum and maximum by fp32's rounding.
            torch.testing.assert_close(ours.meta, theirs.meta, rtol=2**-10, atol=1e-5)
            continue
        errors = [
            weighted_error(rows.cpu(), side.format.dequantize(side.codes, side.meta).cpu(), known.factors.cpu())
            for side in (ours, theirs)
        ]
        assert abs(errors[0].sum() / errors[1].sum() - 1) <= TOTAL_LIMIT, errors[0].sum() / errors[1].sum()
        assert (errors[0] <= ROW_LIMIT * errors[1] + 1e-9).all(), (errors[0] / errors[1]).max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "ranges", "which"),
    [
        ("K4V4", 1, "both"),
        ("K4V2", 3, "both"),
        ("K2V2", 2, "both"),
        ("K2V4", 1, "both"),
        ("K8V4", 2, "both"),
        ("K2V8", 3, "both"),
        ("K4V2", 1, "keys"),
        ("K4V2", 2, "values"),
    ],
)
def test_the_weighted_error_is_the_references(pair, ranges, which, device):
    """Of an odd number of tokens and KV heads, at permuted slots."""
    layout = make_layout(pair, 64, 32)
    known = [feedback(64, 3, ranges, device) for _ in range(2)]
    transforms = LayerTransforms(
        key_feedback=known[0] if which != "values" else None, value_feedback=known[1] if which != "keys" else None
    )
    key, value = tokens(37, 3, 64, torch.bfloat16, device)
    slots = random_slots(37, 4 * 32, device)
    pages = empty_pages(layout, 4, 3, device, transforms)
    reshape_and_cache(key, value, slots, None, pages)
    check_against_reference(pages, slots, key, value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_size", "dtype"),
    [(32, torch.float32), (96, torch.float16), (128, torch.bfloat16), (160, torch.bfloat16), (256, torch.bfloat16)],
)
def test_every_head_size(head_size, dtype, device):
    check_head_size(head_size, dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [80, 512])
def test_head_sizes_that_this_kernel_alone_serves(head_size, device):
    check_head_size(head_size, torch.bfloat16, device, num_tokens=7)


def check_head_size(head_size, dtype, device, num_tokens=21):
    known = feedback(head_size, 1, 1, device)
    transforms = LayerTransforms(value_hadamard=True, key_feedback=known, value_feedback=known)
    key, value = tokens(num_tokens, 1, head_size, dtype, device)
    slots = random_slots(num_tokens, 2 * 16, device)
    pages = empty_pages(make_layout("K4V2", head_size), 2, 1, device, transforms)
    reshape_and_cache(key, value, slots, None, pages)
    check_against_reference(pages, slots, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["K4V4", "K2V2"])
def test_codes_are_the_references_where_nothing_is_near_a_tie(pair, device):
    """Byte for byte: rows are whole steps above a whole minimum and coefficients whole, but for a quarter each, so that
    every sum is exact and none ends in a half."""
    size, heads = 128, 2
    bits = int(pair[1])
    levels = 2**bits - 1
    coefficients = torch.randint(-1, 2, (heads, size, size)).triu(1) * (torch.rand(heads, size, size) < 0.1)
    known = RoundFeedback((coefficients + torch.eye(size)).half().to(device), {bits: (1.0,)})
    key, value = (torch.randint(0, levels + 1, (33, heads, size)).float() for _ in range(2))
    for rows in (key, value):
        # A quarter of a step away from codes, in a few channels only: errors are 0 or a quarter, and few add up.
        rows += 0.25 * (torch.rand(rows.shape) < 0.01)
        rows.clamp_(0, levels)[..., 0] = 0.0
        rows[..., 1] = levels
    pages, want = (
        empty_pages(
            make_layout(pair, size), 3, heads, device, LayerTransforms(key_feedback=known, value_feedback=known)
        )
        for _ in range(2)
    )
    slots = random_slots(33, 48, device)
    key, value = key.to(device), value.to(device)
    reshape_and_cache(key, value, slots, None, pages)
    reshape_and_cache_ref(key, value, slots, None, want)
    assert torch.equal(pages.kv_cache, want.kv_cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "head_size", "rotary_dim", "is_neox"),
    [("K4V4", 128, 128, True), ("K2V8", 96, 48, True), ("K2V2", 64, 64, False), ("K4V2", 64, None, True)],
    ids=["neox", "partial", "interleaved", "unrotated"],
)
def test_transforms(pair, head_size, rotary_dim, is_neox, device):
    rotary = None if rotary_dim is None else rotary_table(rotary_dim, is_neox, 4096, device)
    transforms = random_transforms(
        2, head_size, device, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    known = feedback(head_size, 2, 1, device)
    transforms = dataclasses.replace(transforms, key_feedback=known, value_feedback=known, range_search=True)
    key, value = tokens(35, 2, head_size, torch.float32, device)
    positions = torch.randint(0, 4096, (35,), device=device)
    slots = random_slots(35, 48, device)
    pages = empty_pages(make_layout(pair, head_size), 3, 2, device, transforms)
    reshape_and_cache(key, value, slots, positions, pages)
    check_against_reference(pages, slots, key, value, positions)


@pytest.mark.slow
def test_untouched_bytes_stay(device):
    """Of other tokens, of what lies between blocks, and of tokens without a slot or beyond the last."""
    layout = make_layout("K4V2", 64)
    known = feedback(64, 2, 2, device)
    key, value = tokens(9, 2, 64, torch.bfloat16, device)
    slots = torch.tensor([5, -1, 17, 16, 63, -1, 40], device=device)
    pages = empty_pages(layout, 5, 2, device, LayerTransforms(key_feedback=known, value_feedback=known))
    storage = pages.kv_cache._base
    before = storage.clone()
    reshape_and_cache(key, value, slots, None, pages)
    kept = slots >= 0
    check_against_reference(pages, slots[kept], key[:7][kept], value[:7][kept])
    block, offset = slots[kept] // 16, slots[kept] % 16
    after = storage.clone()
    for memory in (before, after):
        for part in parts_of(memory[:, :2], layout):
            part[block, :, offset] = 0
    assert torch.equal(after, before)
    reshape_and_cache(key, value, torch.full((9,), -1, device=device), None, pages)
    reshape_and_cache(key, value, slots[:0], None, pages)
    for part in parts_of((after := storage.clone())[:, :2], layout):
        part[block, :, offset] = 0
    assert torch.equal(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["both", "keys", "values"])
def test_a_recent_window_keeps_the_rows(which, device):
    """As they are, and a token in either, both or none."""
    layout = make_layout("K4V2", 64)
    known = feedback(64, 3, 1, device)
    transforms = LayerTransforms(
        key_hadamard=True,
        key_feedback=known if which != "values" else None,
        value_feedback=known if which != "keys" else None,
    )
    key, value = tokens(13, 3, 64, torch.bfloat16, device)
    slots = random_slots(13, 4 * 16, device)
    window_slots = random_slots(15, 4 * 32, device)
    slots[[2, 5]] = window_slots[[5, 7]] = -1
    pages, plain = (empty_pages(layout, 4, 3, device, transforms) for _ in range(2))
    memory = torch.full((4, 5, 32, 2 * 64), 7.0, device=device, dtype=torch.bfloat16)
    rows, want = memory[:, 1:4], memory.clone()
    reshape_and_cache(key, value, slots, None, pages, WindowRows(rows, window_slots))
    store_rows_ref(key, value, WindowRows(want[:, 1:4], window_slots[:13]))
    assert torch.equal(memory, want)
    reshape_and_cache(key, value, slots, None, plain)
    assert torch.equal(pages.kv_cache, plain.kv_cache)


@pytest.mark.slow
def test_constant_rows_get_scale_0(device):
    known = feedback(64, 1, 3, device)
    key, value = (torch.full((2, 1, 64), number, device=device) for number in (3.0, 0.0))
    pages = empty_pages(
        make_layout("K4V2", 64), 1, 1, device, LayerTransforms(key_feedback=known, value_feedback=known)
    )
    slots = torch.tensor([3, 8], device=device)
    reshape_and_cache(key, value, slots, None, pages)
    keys, values = stored(pages, slots)
    assert not keys.codes.any() and not values.codes.any()
    assert torch.equal(keys.meta, torch.tensor([0.0, 3.0], dtype=torch.float16, device=device).expand_as(keys.meta))
    assert not values.meta.any()


@pytest.mark.slow
@pytest.mark.parametrize("huge", [7e4, 3e38, math.inf])
def test_huge_rows_saturate(huge, device):
    known = feedback(64, 2, 2, device)
    key = torch.randn(20, 2, 64, device=device)
    key[:, :, 3], key[:, :, 40] = huge, -huge
    pages = empty_pages(
        make_layout("K4V4", 64), 2, 2, device, LayerTransforms(key_feedback=known, value_feedback=known)
    )
    slots = random_slots(20, 32, device)
    reshape_and_cache(key, key, slots, None, pages)
    want = empty_pages(pages.layout, 2, 2, device, pages.transforms)
    reshape_and_cache_ref(key, key, slots, None, want)
    for ours, theirs in zip(stored(pages, slots), stored(want, slots), strict=True):
        read = ours.format.dequantize(ours.codes, ours.meta)
        assert read.isfinite().all()
        assert (read[:, :, 3] > 3e4).all() and (read[:, :, 40] < -3e4).all()
        errors = [
            weighted_error(
                key.clamp(-FP16_MAX, FP16_MAX).cpu(),
                side.format.dequantize(side.codes, side.meta).cpu(),
                known.factors.cpu(),
            ).sum()
            for side in (ours, theirs)
        ]
        assert errors[0] <= 1.1 * errors[1]


@pytest.mark.slow
def test_rows_with_nan_read_as_nan(device):
    """They alone, as the reference has it: a fault of the model shows."""
    known = feedback(64, 2, 3, device)
    key, value = tokens(35, 2, 64, torch.float32, device)
    key[7, 1, 63] = value[33, 0, 0] = math.nan
    pages = empty_pages(
        make_layout("K4V2", 64), 3, 2, device, LayerTransforms(key_feedback=known, value_feedback=known)
    )
    slots = random_slots(35, 48, device)
    reshape_and_cache(key, value, slots, None, pages)
    for side, rows in zip(stored(pages, slots), (key, value), strict=True):
        read = side.format.dequantize(side.codes, side.meta)
        assert torch.equal(read.isnan(), rows.isnan().any(-1, keepdim=True).expand_as(read))


@pytest.mark.slow
@pytest.mark.parametrize("bits", FEEDBACK_BITS)
def test_the_best_range_is_taken(bits, device):
    """No other range of the three gives a row much less of the error that counts, and each serves some rows."""
    known = feedback(32, 2, 3, device)
    key, value = tokens(16, 2, 32, torch.float32, device)
    slots = random_slots(16, 48, device)

    def read(ranges):
        one = RoundFeedback(known.factors, {bits: ranges})
        pages = empty_pages(
            make_layout(f"K{bits}V{bits}", 32), 3, 2, device, LayerTransforms(key_feedback=one, value_feedback=one)
        )
        reshape_and_cache(key, value, slots, None, pages)
        side = stored(pages, slots)[1]
        return weighted_error(value.cpu(), side.format.dequantize(side.codes, side.meta).cpu(), known.factors.cpu())

    alone = torch.stack([read((factor,)) for factor in RANGES[3]])
    assert (read(RANGES[3]) <= alone.amin(0) * 1.01 + 1e-9).float().mean() >= 0.9
    assert (alone.argmin(0).flatten().bincount() > 0).sum() > 1, "no range serves all rows"


@pytest.mark.gpu
@pytest.mark.parametrize("pair", ["K4V4", "K4V2", "K2V2"])
def test_a_long_prefill(pair, device):
    rotary = rotary_table(128, True, 8192, device)
    transforms = random_transforms(
        8, 128, device, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    known = feedback(128, 8, 3, device)
    transforms = dataclasses.replace(transforms, key_feedback=known, value_feedback=known)
    key, value = tokens(3001, 8, 128, torch.bfloat16, device)
    slots, positions = random_slots(3001, 3200, device), torch.randint(0, 8192, (3001,), device=device)
    pages = empty_pages(make_layout(pair, 128), 200, 8, device, transforms)
    reshape_and_cache(key, value, slots, positions, pages)
    check_against_reference(pages, slots, key, value, positions)
