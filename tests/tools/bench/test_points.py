"""What the benchmarks' arguments name."""

import pytest

from kvtuner_tools.bench.points import KernelPoint, LayerHeads, LongPrefill, Point, QueryTokens, ThroughputPoint


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (Point, " 64x8192", Point(64, 8192)),
        (ThroughputPoint, "4096x512", ThroughputPoint(4096, 512)),
        (LongPrefill, "32768:8192", LongPrefill(32768, 8192)),
        (LongPrefill, "512:512", LongPrefill(512, 512)),
        (LayerHeads, "llama31_8b", LayerHeads(32, 8, 128)),
        (LayerHeads, "llama33_70b:tp8", LayerHeads(8, 1, 128)),
        (LayerHeads, "7/1/64", LayerHeads(7, 1, 64)),
        (LayerHeads, "64/8/64+sinks", LayerHeads(64, 8, 64, sinks=True)),
        (LayerHeads, "gpt_oss_20b", LayerHeads(64, 8, 64, sinks=True)),
        (QueryTokens, " 4", QueryTokens((4,))),
        (QueryTokens, "4+1", QueryTokens((1, 4))),
        (QueryTokens, "1+1+4", QueryTokens((1, 1, 4))),
        (QueryTokens, "4+4", QueryTokens((4,))),
    ],
)
def test_read_and_written_back(kind, text, expected):
    assert kind.parse(text) == expected
    assert kind.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["64", "x8", "0x8", "8x0", "8x8x8", "-1x8", "ax8"])
def test_points_of_another_form(text):
    for kind in (Point, ThroughputPoint, KernelPoint):
        with pytest.raises(ValueError, match="point is written"):
            kind.parse(text)


@pytest.mark.parametrize("text", ["32768", "8192:32768", "0:0", "8x4"])
def test_long_prefills_of_another_form(text):
    with pytest.raises(ValueError, match="a long prefill is written PROMPT:CHUNK"):
        LongPrefill.parse(text)


def test_requests_take_query_tokens_in_turn():
    mixed = QueryTokens.parse("1+4")
    assert str(mixed) == "1+4"
    assert mixed.most == 4
    assert mixed.of(4) == (4, 1, 4, 1)
    assert mixed.of(1) == (4,), "a single request brings the most, for which the kernel has room"
    assert QueryTokens.parse("1+1+4").of(6) == (4, 1, 1, 4, 1, 1)
    assert QueryTokens.parse("16").of(2) == (16, 16)


@pytest.mark.parametrize("text", ["", "0", "17", "1+17", "1+", "+4", "1-4", "a", "1,4"])
def test_query_tokens_of_another_form(text):
    with pytest.raises(ValueError, match=r"query tokens are 1 to 16, or several such as 1\+4 .*, but got"):
        QueryTokens.parse(text)


@pytest.mark.parametrize("text", ["llama", "32/8", "32/0/128", "30/8/128", "a/b/c"])
def test_shapes_of_another_form(text):
    with pytest.raises(ValueError, match=r"HEADS.*but got"):
        LayerHeads.parse(text)


def test_kernel_points():
    assert KernelPoint.parse("3x8").lengths == (8, 8, 8)
    mixed = KernelPoint.parse("mixed:64:256-16128")
    assert str(mixed) == "mixed:64:256-16128"
    assert len(mixed.lengths) == 64
    assert min(mixed.lengths) >= 256 and max(mixed.lengths) <= 16128
    assert len(set(mixed.lengths)) > 32
    assert KernelPoint.parse("mixed:64:256-16128") == mixed, "the same lengths in every run"
    assert KernelPoint.parse("mixed:2:7-7").lengths == (7, 7)
    for text in ("mixed:0:1-2", "mixed:4:9-3", "mixed:4:0-3", "mixed:4:3"):
        with pytest.raises(ValueError, match="mixed"):
            KernelPoint.parse(text)
