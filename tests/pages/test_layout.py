"""Byte layout of a page against literal tables; no torch."""

from fractions import Fraction

import pytest

from vllm_kvtuner.pages.layout import (
    ALIGNMENT,
    QUANTIZED_PAIRS,
    PageLayout,
    PrecisionPair,
    content_bytes,
    mean_bits,
    recent_block_size,
    recent_blocks,
    stored_bits,
    unsupported_head_size,
)

HEAD_SIZES = (64, 96, 128, 256)
CONTENT_BYTES = {
    "K8V8": (136, 200, 264, 520),
    "K8V4": (104, 152, 200, 392),
    "K8V2": (88, 128, 168, 328),
    "K4V8": (104, 152, 200, 392),
    "K4V4": (72, 104, 136, 264),
    "K4V2": (56, 80, 104, 200),
    "K2V8": (88, 128, 168, 328),
    "K2V4": (56, 80, 104, 200),
    "K2V2": (40, 56, 72, 136),
    "K16V16": (256, 384, 512, 1024),
}
"""Bytes per token and KV head at each of HEAD_SIZES, counted by hand."""

STORED_BITS_AT_128 = {
    "K8V8": 8.25,
    "K8V4": 6.25,
    "K8V2": 5.25,
    "K4V8": 6.25,
    "K4V4": 4.25,
    "K4V2": 3.25,
    "K2V8": 5.25,
    "K2V4": 3.25,
    "K2V2": 2.25,
    "K16V16": 16,
}


@pytest.mark.parametrize("name", CONTENT_BYTES)
def test_content_bytes_are_the_table(name):
    pair = PrecisionPair.parse(name)
    assert tuple(content_bytes(pair, head_size) for head_size in HEAD_SIZES) == CONTENT_BYTES[name]


def test_tables_name_all_pairs():
    pairs = {pair.name for pair in QUANTIZED_PAIRS}
    assert pairs | {"K16V16"} == set(CONTENT_BYTES) == set(STORED_BITS_AT_128)
    assert len(QUANTIZED_PAIRS) == 9


@pytest.mark.parametrize("name", CONTENT_BYTES)
def test_a_pair_reads_its_own_name(name):
    assert PrecisionPair.parse(name.lower()).name == name


@pytest.mark.parametrize("name", STORED_BITS_AT_128)
def test_stored_bits_are_the_table(name):
    assert stored_bits(PrecisionPair.parse(name), 128) == STORED_BITS_AT_128[name]


def test_overhead_of_scales_by_head_size():
    pair = PrecisionPair(4, 4)
    assert [float(stored_bits(pair, size)) for size in (64, 128, 256)] == [4.5, 4.25, 4.125]


@pytest.mark.parametrize("pair", QUANTIZED_PAIRS, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("block_size", [16, 48, 128])
def test_parts_follow_each_other_aligned(pair, head_size, block_size):
    page = PageLayout(pair, head_size, block_size)
    parts = [
        (page.k_codes_offset, block_size * head_size * pair.k_bits // 8),
        (page.v_codes_offset, block_size * head_size * pair.v_bits // 8),
        (page.k_meta_offset, block_size * 4),
        (page.v_meta_offset, block_size * 4),
    ]
    end = 0
    for offset, size in parts:
        assert offset == end
        assert offset % ALIGNMENT == 0
        end = offset + size
    assert end == page.chunk_bytes == block_size * page.content_bytes
    assert page.chunk_bytes % ALIGNMENT == 0


def test_offsets_of_one_page_in_bytes():
    page = PageLayout(PrecisionPair(8, 2), head_size=128, block_size=32)
    offsets = (page.k_codes_offset, page.v_codes_offset, page.k_meta_offset, page.v_meta_offset)
    assert offsets == (0, 4096, 5120, 5248)
    assert page.chunk_bytes == 5376


@pytest.mark.parametrize(
    ("head_size", "bits", "fits"),
    [
        *((16, 2, True), (48, 2, True), (80, 2, True), (100, 8, True), (112, 2, True), (256, 8, True), (512, 2, True)),
        *((0, 8, False), (20, 2, False), (72, 2, False), (100, 4, False), (264, 8, False), (384, 8, False)),
    ],
)
def test_which_rows_pack(head_size, bits, fits):
    assert (unsupported_head_size(head_size, bits) is None) == fits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PrecisionPair(16, 16), 128, 16), "quantized pair"),
        ((PrecisionPair(4, 2), 72, 16), "head_size 72 with K4V2"),
        ((PrecisionPair(4, 4), 128, 24), "multiple of 16, but got 24"),
        ((PrecisionPair(4, 4), 128, 0), "multiple of 16, but got 0"),
    ],
)
def test_pages_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        PageLayout(*arguments)


def test_pairs_are_read_and_written():
    assert PrecisionPair.parse(" k8v4 ") == PrecisionPair(8, 4)
    assert str(PrecisionPair(8, 4)) == "K8V4"
    assert PrecisionPair(8, 4).nominal_bits == 6
    assert PrecisionPair(8, 4).is_quantized
    assert not PrecisionPair(16, 16).is_quantized


@pytest.mark.parametrize("text", ["K3V4", "K8", "K8V4x", "8,4", "K16V4", "K4V16", "", None, 84])
def test_pairs_that_do_not_exist(text):
    with pytest.raises(ValueError, match="but got"):
        PrecisionPair.parse(text)


def test_mean_bits_weigh_layers_by_what_they_cache():
    layers = [(PrecisionPair(8, 4), 8, 128), (PrecisionPair(4, 2), 8, 128), (PrecisionPair(16, 16), 16, 128)]
    nominal, stored = mean_bits(layers)
    assert nominal == (6 + 3 + 2 * 16) / 4
    total = sum(heads * content_bytes(pair, size) for pair, heads, size in layers)
    bf16 = sum(heads * 4 * size for _, heads, size in layers)
    assert stored == float(Fraction(16 * total, bf16))
    with pytest.raises(ValueError, match="at least one layer"):
        mean_bits([])


@pytest.mark.parametrize(
    ("block_size", "token_bytes", "expected"),
    [
        pytest.param(128, 3 * 256, 32, id="K4V4 beside 16 bits at head size 64: 36 tokens fit"),
        pytest.param(128, 3 * 136, 64, id="K4V4 beside 8 bits"),
        pytest.param(96, 3 * 256, 16, id="24 is no multiple of 16"),
        pytest.param(16, 3 * 256, 16, id="less than 16 tokens fit"),
        pytest.param(64, 3 * 72, 64, id="no more than a packed page holds"),
    ],
)
def test_recent_windows_take_blocks_that_one_of_the_pool_holds(block_size, token_bytes, expected):
    assert recent_block_size(block_size, block_size * 3 * 72, token_bytes) == expected


@pytest.mark.parametrize(("tokens", "block_size", "fresh"), [(1, 16, 1), (32, 16, 1), (33, 16, 1), (40, 32, 100)])
def test_recent_blocks_is_what_the_worst_place_of_a_window_spans(tokens, block_size, fresh):
    spans = []
    for first_fresh in range(1000, 1000 + block_size):
        first, last = first_fresh - tokens + 1, first_fresh + fresh - 1
        spans.append(last // block_size - first // block_size + 1)
    # Rounded up before the block that a part takes is added, as vLLM counts.
    assert max(spans) <= recent_blocks(tokens, block_size, fresh) <= max(spans) + 1
