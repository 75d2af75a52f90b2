"""reshape_and_cache: the bytes it writes against the reference, and the bytes it must not touch.

Tests call this module's ``reshape_and_cache``, so that another implementation can take its place.
"""

import pytest
import torch

from tests.helpers.paged_cache import POISON_BYTE, empty_cache, make_layout, random_transforms, rotary_table
from vllm_kvtuner.kernels.contract import Pages, WindowRows
from vllm_kvtuner.kernels.reference.rows import reshape_and_cache_ref, store_rows_ref
from vllm_kvtuner.kernels.triton.reshape_and_cache import reshape_and_cache
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import LayerTransforms, rotate_values, transform_keys
from vllm_kvtuner.pages.views import page_sides

HEAD_SIZES = (64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_POSITION = 4096


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tokens(num_tokens, num_kv_heads, head_size, dtype, device):
    """Keys and values as slices of one fused projection: token strides larger than a token."""
    fused = torch.randn(num_tokens, 3, num_kv_heads, head_size, device=device)
    fused[:, 1] += 2 * torch.randn(num_kv_heads, head_size, device=device)
    fused = fused.to(dtype)
    return fused[:, 1], fused[:, 2]


def random_slots(num_tokens, num_slots, device):
    return torch.randperm(num_slots)[:num_tokens].to(device)


def empty_pages(layout, num_blocks, num_kv_heads, device, transforms=None):
    """Poisoned pages, whose neighbours in memory are another layer's."""
    return Pages(empty_cache(layout, num_blocks, num_kv_heads, device), layout, transforms or LayerTransforms())


def stored(pages, slots):
    """Keys and values at ``slots``: two sides, codes [tokens, num_kv_heads, row bytes] and meta [tokens, ..., 2]."""
    block, offset = slots // pages.layout.block_size, slots % pages.layout.block_size
    sides = page_sides(pages.kv_cache, pages.layout)
    return [side._replace(codes=side.codes[block, :, offset], meta=side.meta[block, :, offset]) for side in sides]


def parts_of(kv_cache, layout):
    """Codes and meta of keys and of values, of every chunk."""
    return [part for side in page_sides(kv_cache, layout) for part in (side.codes, side.meta)]


def check_rows(side, rows):
    """Dequantized rows lie within half a step of what was stored, and their meta spans the row.

    Beyond half a step, the fp16 rounding of the scale moves the last code by up to levels steps * 2^-11, that of the
    minimum moves all by 2^-11 |minimum|.
    """
    scale, minimum = side.meta.float().unbind(-1)
    levels = side.format.levels
    torch.testing.assert_close(minimum, rows.amin(-1), rtol=2**-10, atol=1e-6)
    torch.testing.assert_close(scale, (rows.amax(-1) - rows.amin(-1)) / levels, rtol=2**-10, atol=1e-6)
    bound = scale * (0.5 + levels * 2**-11) + minimum.abs() * 2**-11 + 1e-5
    error = (side.format.dequantize(side.codes, side.meta) - rows).abs()
    assert (error <= bound[..., None]).all(), (error / bound[..., None]).max()


@pytest.mark.quick(1)
@pytest.mark.parametrize("index", range(len(QUANTIZED_PAIRS)), ids=[pair.name for pair in QUANTIZED_PAIRS])
def test_every_pair_stores_what_the_reference_stores(index, device):
    layout = make_layout(QUANTIZED_PAIRS[index].name, HEAD_SIZES[index % 4], (16, 32, 48)[index % 3])
    key, value = tokens(11, 3, layout.head_size, DTYPES[index % 3], device)
    slots = random_slots(11, 4 * layout.block_size, device)
    got, want = (empty_pages(layout, 4, 3, device) for _ in range(2))
    reshape_and_cache(key, value, slots, None, got)
    reshape_and_cache_ref(key, value, slots, None, want)

    for ours, theirs, rows in zip(stored(got, slots), stored(want, slots), (key, value), strict=True):
        check_rows(ours, rows.float())
        assert torch.equal(ours.meta, theirs.meta), "scale and minimum take no rounding but fp16's"
        # A compiler may fuse a multiply and an add, which moves a number that lies between two codes.
        apart = ours.format.unpack(ours.codes).int() - theirs.format.unpack(theirs.codes).int()
        assert apart.abs().max() <= 1
        assert (apart != 0).float().mean() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("pair", "head_size"), [("K8V8", 64), ("K4V2", 96), ("K2V8", 128), ("K2V2", 256)])
def test_a_recent_window_keeps_the_rows(pair, head_size, dtype, device):
    """As they are, whatever becomes of them in the packed pages, and a token in either, both or none."""
    layout = make_layout(pair, head_size)
    key, value = tokens(13, 3, head_size, dtype, device)
    slots = random_slots(13, 4 * layout.block_size, device)
    window_slots = random_slots(15, 4 * 32, device)  # one for each of what a CUDA graph pads the batch to
    slots[[2, 5]] = window_slots[[5, 7]] = -1
    transforms = LayerTransforms(key_hadamard=True, value_hadamard=True)
    pages, plain = (empty_pages(layout, 4, 3, device, transforms) for _ in range(2))
    # Neighbours in memory are another layer's.
    memory = torch.full((4, 5, 32, 2 * head_size), 7.0, device=device).to(dtype)
    rows, want = memory[:, 1:4], memory.clone()
    reshape_and_cache(key, value, slots, None, pages, WindowRows(rows, window_slots))
    store_rows_ref(key, value, WindowRows(want[:, 1:4], window_slots[:13]))
    assert torch.equal(memory, want)
    reshape_and_cache(key, value, slots, None, plain)
    assert torch.equal(pages.kv_cache, plain.kv_cache)


def test_untouched_bytes_stay(device):
    layout = make_layout("K4V2", 64)
    key, value = tokens(9, 2, 64, torch.bfloat16, device)
    slots = torch.tensor([5, -1, 17, 16, 63, -1, 40], device=device)  # tokens 7 and 8 are padding
    pages = empty_pages(layout, 5, 2, device)
    storage = pages.kv_cache._base
    before = storage.clone()
    reshape_and_cache(key, value, slots, None, pages)

    kept = slots >= 0
    block, offset = slots[kept] // 16, slots[kept] % 16
    want = before.clone()
    reshape_and_cache_ref(key[:7], value[:7], slots, None, pages._replace(kv_cache=want[:, :2]))
    for part in parts_of(want[:, :2], layout):
        part[block, :, offset] = 0
    after = storage.clone()
    for part in parts_of(after[:, :2], layout):
        assert part[block, :, offset].any(), "the kept tokens are written"
        part[block, :, offset] = 0
    assert torch.equal(after, want)


def test_nothing_to_store(device):
    key, value = tokens(3, 2, 64, torch.bfloat16, device)
    pages = empty_pages(make_layout("K8V8", 64), 2, 2, device)
    before = pages.kv_cache.clone()
    for slots in (torch.empty(0, dtype=torch.int64), torch.full((3,), -1)):
        reshape_and_cache(key, value, slots.to(device), None, pages)
    assert torch.equal(pages.kv_cache, before)


def test_constant_rows_get_scale_0(device):
    key, value = (torch.full((2, 1, 64), number, device=device) for number in (3.0, 0.0))
    pages = empty_pages(make_layout("K4V8", 64), 1, 1, device)
    slots = torch.tensor([3, 8], device=device)
    reshape_and_cache(key, value, slots, None, pages)
    keys, values = stored(pages, slots)
    assert not keys.codes.any() and not values.codes.any()
    assert torch.equal(keys.meta, torch.tensor([0.0, 3.0], dtype=torch.float16, device=device).expand_as(keys.meta))
    assert not values.meta.any()


@pytest.mark.quick(1)
@pytest.mark.parametrize("range_search", [False, True], ids=["min_max", "range_search"])
@pytest.mark.parametrize(
    ("pair", "head_size", "rotary_dim", "is_neox"),
    [("K4V4", 128, 128, True), ("K2V8", 96, 48, True), ("K8V2", 64, 64, False), ("K4V2", 64, None, True)],
    ids=["neox", "partial", "interleaved", "unrotated"],
)
def test_transforms(pair, head_size, rotary_dim, is_neox, range_search, device):
    check_transforms(pair, head_size, rotary_dim, is_neox, range_search, device)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("pair", "head_size", "rotary_dim", "range_search"),
    [("K2V4", 80, 80, True), ("K4V2", 112, 56, True), ("K2V8", 512, 128, False), ("K4V2", 512, None, True)],
)
def test_head_sizes_that_this_kernel_alone_serves(pair, head_size, rotary_dim, range_search, device):
    check_transforms(pair, head_size, rotary_dim, True, range_search, device)


def check_transforms(pair, head_size, rotary_dim, is_neox, range_search, device):
    """Against the reference's bytes, or with a range search its errors; bytes of no token stay."""
    rotary = None if rotary_dim is None else rotary_table(rotary_dim, is_neox, MAX_POSITION, device)
    transforms = random_transforms(
        2, head_size, device, rotary, offset=5.0, equalization=True,
        key_hadamard=True, value_hadamard=True, range_search=range_search,
    )  # fmt: skip
    key, value = tokens(7, 2, head_size, torch.float32, device)
    slots = random_slots(7, 32, device)
    positions = torch.tensor([0, 1, 4095, 3000, 17, 2048, 999], device=device)
    got, want = (empty_pages(make_layout(pair, head_size), 2, 2, device, transforms) for _ in range(2))
    reshape_and_cache(key, value, slots, positions, got)
    for part in parts_of(got.kv_cache._base, got.layout):
        rows = part.view(torch.uint8).clone()
        rows[slots // 16, :2, slots % 16] = POISON_BYTE
        assert (rows == POISON_BYTE).all(), "bytes of other tokens and of a neighbour"

    transformed = (transform_keys(key, positions, transforms), rotate_values(value, transforms))
    if not range_search:
        for side, rows in zip(stored(got, slots), transformed, strict=True):
            check_rows(side, rows)
        return
    reshape_and_cache_ref(key, value, slots, positions, want)
    for *sides, rows in zip(stored(got, slots), stored(want, slots), transformed, strict=True):
        # Two ranges may be equally good but for rounding, so errors are compared, not bytes.
        errors = [(side.format.dequantize(side.codes, side.meta) - rows).square().sum(-1) for side in sides]
        torch.testing.assert_close(errors[0], errors[1], rtol=1e-3, atol=1e-6)


def test_range_search_beats_min_max_at_2_bits(device):
    layout = make_layout("K2V2", 128)
    key, value = tokens(8, 2, 128, torch.float32, device)
    slots = random_slots(8, 16, device)
    errors = []
    for range_search in (False, True):
        pages = empty_pages(layout, 1, 2, device, LayerTransforms(range_search=range_search))
        reshape_and_cache(key, value, slots, None, pages)
        _, values = stored(pages, slots)
        errors.append((values.format.dequantize(values.codes, values.meta) - value).square().sum(-1))
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.7 * errors[0].sum()  # measured: 0.5 for Gaussian rows


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device):
    layout = make_layout("K8V8", 128, 256)
    num_blocks = (5 << 30) // (9 * layout.chunk_bytes)
    kv_cache = torch.empty(num_blocks, 9, 256, layout.content_bytes, dtype=torch.uint8, device=device)[:, :8]
    pages = Pages(kv_cache, layout, LayerTransforms())
    key, value = tokens(40, 8, 128, torch.bfloat16, device)
    slots = torch.arange(num_blocks * 256 - 40, num_blocks * 256, device=device)
    reshape_and_cache(key, value, slots, None, pages)
    for side, rows in zip(stored(pages, slots), (key, value), strict=True):
        check_rows(side, rows.float())


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(QUANTIZED_PAIRS)), ids=[pair.name for pair in QUANTIZED_PAIRS])
def test_a_long_prefill(index, device):
    pair, head_size = QUANTIZED_PAIRS[index].name, HEAD_SIZES[index % 4]
    rotary = rotary_table(head_size, True, 8192, device)
    transforms = random_transforms(
        8, head_size, device, rotary, offset=5.0, equalization=True, key_hadamard=True, value_hadamard=True
    )
    key, value = tokens(3001, 8, head_size, torch.bfloat16, device)
    slots, positions = random_slots(3001, 3200, device), torch.randint(0, 8192, (3001,), device=device)
    pages = empty_pages(make_layout(pair, head_size), 200, 8, device, transforms)
    reshape_and_cache(key, value, slots, positions, pages)
    keys, values = stored(pages, slots)
    check_rows(keys, transform_keys(key, positions, transforms))
    check_rows(values, rotate_values(value, transforms))
