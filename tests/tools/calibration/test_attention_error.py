"""Errors of quantized attention: against attention on packed pages, by hand, and in order."""

from dataclasses import replace

import pytest
import torch

from kvtuner_tools.calibration.attention_error import AttentionMeter
from kvtuner_tools.calibration.key_statics import KeyStatics, PairLayout
from kvtuner_tools.calibration.rotation import apply_rotary, undo_rotary
from tests.helpers.capture import (  # noqa: F401 (a fixture)
    HEAD_SIZE,
    LAYER,
    NUM_HEADS,
    NUM_KV_HEADS,
    make_capture,
    one_thread,
    rotary_table,
)
from vllm_kvtuner.kernels.contract import AttentionShape, Pages, Queries, Span
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import reshape_and_cache_ref
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, PageLayout, PrecisionPair
from vllm_kvtuner.pages.transforms import LayerTransforms, RotaryTable
from vllm_kvtuner.profile.profile import RecentWindow

pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = rotary_table()
OFFSET = torch.linspace(-4, 4, NUM_KV_HEADS * HEAD_SIZE).view(NUM_KV_HEADS, HEAD_SIZE)
FACTORS = torch.linspace(0.5, 2, HEAD_SIZE // 2).repeat(NUM_KV_HEADS, 2)


def meter_of(capture, layer=LAYER, recent_window=None):
    rotary = capture.load_rotary(layer)
    return AttentionMeter(layer, capture.load_layer(layer), None if rotary is None else rotary.near, recent_window)


@pytest.mark.quick(1)
@pytest.mark.parametrize("pair", ["K4V2", "K2V8"])
@pytest.mark.parametrize(
    ("sliding_window", "recent_window", "sink_tokens", "sinks"),
    [
        (None, 0, 0, None), (50, 0, 0, None), (None, 20, 0, None), (50, 20, 0, None), (None, 20, 4, None),
        (50, 20, 4, (3.0, 1.0, 4.0, 2.0)), (None, 0, 0, (3.0, -1e30, 4.0, 2.0)),
    ],
)  # fmt: skip
def test_the_error_is_that_of_attention_on_packed_pages(
    tmp_path, pair, sliding_window, recent_window, sink_tokens, sinks
):
    layer = replace(LAYER, sliding_window=sliding_window, logits_soft_cap=20.0, sinks=sinks)
    sinks = torch.tensor(sinks or [-torch.inf] * NUM_HEADS)
    capture = make_capture(tmp_path, offset=OFFSET, layer=layer, num_windows=2)
    transforms = LayerTransforms(OFFSET, TABLE, FACTORS, True, True, True)
    recent = RecentWindow(recent_window, sink_tokens=sink_tokens) if recent_window else None
    errors = meter_of(capture, layer, recent).pair_errors(transforms)
    shape = AttentionShape(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, layer.scale, logits_soft_cap=20.0)
    span = Span(sliding_window, skip_newest=recent_window, skip_first=sink_tokens)

    layout, num_blocks = PageLayout(PrecisionPair.parse(pair), HEAD_SIZE, 16), 12
    square, norm = torch.zeros(2, NUM_KV_HEADS)
    for window in capture.load_layer(layer):
        cache = torch.zeros(num_blocks, NUM_KV_HEADS, 16, layout.content_bytes, dtype=torch.uint8)
        positions = torch.arange(window.key.shape[0])
        pages = Pages(cache, layout, transforms, sinks)
        reshape_and_cache_ref(window.key, window.value, positions, positions, pages)
        count = window.query.shape[0]
        output = torch.empty(count, NUM_HEADS, HEAD_SIZE)
        lse = torch.empty(NUM_HEADS, count)
        table = torch.arange(num_blocks, dtype=torch.int32).repeat(count, 1)
        lens, starts = (window.query_position + 1).int(), torch.arange(count + 1, dtype=torch.int32)
        paged_attention_ref(window.query, Queries(table, lens, starts, 1), pages, shape, span, output, lse)
        for row, position in enumerate(window.query_position.tolist()):
            begin = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
            for head in range(NUM_HEADS):
                seen, kv_head = slice(begin, position + 1), head // 2
                logits = 20 * torch.tanh(window.key[seen, kv_head] @ window.query[row, head] * layer.scale / 20)
                exact = torch.cat([logits, sinks[head : head + 1]]).softmax(0)[:-1] @ window.value[seen, kv_head]
                token = torch.arange(begin, position + 1)
                held = (token > position - recent_window) | (token < sink_tokens)
                packed, unpacked = lse[head, row].exp(), logits[held].exp()
                total = packed + unpacked.sum()
                got = output[row, head].nan_to_num() * packed / total
                got += unpacked / total @ window.value[seen, kv_head][held]
                square[kv_head] += (got - exact).square().sum()
                norm[kv_head] += exact.square().sum()
    parsed = PrecisionPair.parse(pair)
    torch.testing.assert_close(torch.tensor(errors.output_per_head[parsed]), (square / norm).sqrt(), rtol=1e-3, atol=0)
    assert errors.output[parsed] == pytest.approx(float((square.sum() / norm.sum()).sqrt()), rel=1e-3)


@pytest.mark.parametrize("positions", ["near", "far"])
def test_only_what_neither_window_nor_sinks_hold_is_quantized(tmp_path, positions):
    """The last query is token 188, so that a window of 175 and the first 14 hold all, wherever their text stands."""
    capture = make_capture(tmp_path, offset=OFFSET)

    def errors(tokens, sink_tokens=0):
        meter = meter_of(capture, LAYER, RecentWindow(tokens, sink_tokens=sink_tokens))
        if positions == "far":
            meter = meter.at_far_positions(capture.load_rotary(LAYER))
        return meter.pair_errors(LayerTransforms())

    alone, beside, everything = errors(175), errors(175, 13), errors(175, 14)
    for pair in QUANTIZED_PAIRS:
        assert alone.output[pair] > beside.output[pair] > 1e-6 > everything.output[pair]
    assert all(alone.score[bits] > beside.score[bits] > 1e-6 > everything.score[bits] for bits in alone.score)


def test_errors_grow_as_bits_shrink(tmp_path):
    meter = meter_of(make_capture(tmp_path, offset=OFFSET))
    for transforms in (LayerTransforms(), LayerTransforms(key_hadamard=True, value_hadamard=True)):
        keys, values, pairs = (each(transforms) for each in (meter.key_errors, meter.value_errors, meter.pair_errors))
        for errors in (keys, values, pairs.score):
            assert 0 < errors[8] < errors[4] / 4 and errors[4] < errors[2] / 2
        for pair in QUANTIZED_PAIRS:
            assert pairs.output[pair] >= 0.8 * max(keys[pair.k_bits], values[pair.v_bits])


def test_the_score_error_is_the_mean_distance_of_attention_weights(tmp_path):
    layer = replace(LAYER, num_heads=2, num_kv_heads=2, rotary=None, scale=1.0)
    capture = make_capture(tmp_path, layer=LAYER, num_windows=1, num_tokens=40)
    (window,) = capture.load_layer(LAYER)
    # Keys of two numbers apart by one step of 2 bits, and a query that sees 0 and 1: weights move by a known amount.
    key = torch.zeros(2, 2, HEAD_SIZE)
    key[:, :, 0], key[:, :, 1], key[1, :, 2] = 0.0, 3.0, 1.4
    query = torch.zeros(1, 2, HEAD_SIZE)
    query[:, :, 2] = 1.0
    window = replace(window, key=key, value=window.value[:2], query=query, query_position=torch.tensor([1]))
    errors = AttentionMeter(layer, [window], None).pair_errors(LayerTransforms())
    weights = [torch.tensor([0.0, logit]).softmax(0) for logit in (1.4, 1.0)]
    assert errors.score[2] == pytest.approx(float((weights[0] - weights[1]).abs().sum()), rel=1e-4)


def test_an_offset_found_after_rope_is_seen_to_fail_far_away(tmp_path):
    offset = torch.zeros(NUM_KV_HEADS, HEAD_SIZE)
    offset[:, [20, 25, 31]] = 15.0  # slow pairs: almost unmoved within a window
    capture = make_capture(tmp_path, offset=offset)
    windows, rows = capture.load_layer(LAYER), capture.load_rotary(LAYER)
    assert rows.far_position == 16384 - 192
    after_rope = torch.cat([window.key for window in windows]).mean(0)
    still = RotaryTable(torch.cat([torch.ones(192, 32), torch.zeros(192, 32)], dim=1), True)
    near = AttentionMeter(LAYER, windows, still)
    far = near.at_far_positions(rows)
    moved = AttentionMeter(LAYER, far.windows, still)
    wrong = LayerTransforms(key_offset=after_rope, key_hadamard=True)
    assert moved.key_errors(wrong)[4] > 3 * near.key_errors(wrong)[4]

    right, before = LayerTransforms(key_offset=offset, key_hadamard=True), meter_of(capture)
    assert before.at_far_positions(rows).key_errors(right)[4] == pytest.approx(before.key_errors(right)[4], rel=0.1)


@pytest.mark.parametrize(("rotary_dim", "is_neox"), [(64, True), (64, False), (32, True), (16, False)])
def test_rotation_is_undone_also_where_a_table_is_scaled(rotary_dim, is_neox):
    table = rotary_table(300, rotary_dim, is_neox)
    scaled = replace(table, cos_sin=(1.3 * table.cos_sin).bfloat16())
    rows, positions = torch.randn(50, 3, HEAD_SIZE), torch.randint(0, 300, (50,))
    rotated = apply_rotary(rows, positions, scaled)
    assert (rotated - rows)[..., :rotary_dim].abs().max() > 1
    assert torch.equal(rotated[..., rotary_dim:], rows[..., rotary_dim:])
    torch.testing.assert_close(undo_rotary(rotated, positions, scaled), rows, rtol=1e-5, atol=1e-5)
    first, second = (0, rotary_dim // 2) if is_neox else (0, 1)
    cos, sin = scaled.cos_sin[positions, 0].float(), scaled.cos_sin[positions, rotary_dim // 2].float()
    torch.testing.assert_close(rotated[:, 1, first], rows[:, 1, first] * cos - rows[:, 1, second] * sin)


def test_means_before_rope_are_found(tmp_path):
    capture = make_capture(tmp_path, offset=OFFSET, num_windows=6)
    statics = KeyStatics.of(capture.load_layer(LAYER), capture.load_rotary(LAYER).near)
    deviation = (6 * 191) ** -0.5
    assert (statics.mean - OFFSET).abs().max() < 5 * deviation
    assert (statics.variance - 1).abs().max() < 0.3


def test_first_tokens_do_not_enter_the_statics(tmp_path):
    capture = make_capture(tmp_path, num_windows=2)
    windows, rows = capture.load_layer(LAYER), capture.load_rotary(LAYER)
    for window in windows:
        window.key[0] = 1e6
    assert KeyStatics.of(windows, rows.near).variance.max() < 2


@pytest.mark.parametrize("is_neox", [True, False])
def test_factors_are_equal_within_pairs_and_least_in_the_product(is_neox):
    generator = torch.Generator().manual_seed(0)
    variance, query_square = (torch.rand(2, NUM_KV_HEADS, HEAD_SIZE, generator=generator) + 0.05).square()
    statics = KeyStatics(torch.zeros_like(variance), variance, query_square)
    layout = PairLayout(32, is_neox)
    first, second = RotaryTable(torch.zeros(1, 32), is_neox).pairs()
    factors = statics.factors(layout)
    for each in factors.values():
        assert torch.equal(each[:, first], each[:, second])
        torch.testing.assert_close(each.log().mean(1), torch.zeros(NUM_KV_HEADS), rtol=0, atol=1e-5)

    def product(each):
        return (variance / each.square()).sum(1) * (query_square * each.square()).sum(1)

    best = product(factors["keys and queries"])
    assert (best < 0.9 * product(torch.ones_like(variance))).all()
    for _ in range(20):
        nudge = torch.exp(0.1 * torch.randn(NUM_KV_HEADS, HEAD_SIZE, generator=generator))
        nudge[:, second] = nudge[:, first]
        assert (best <= product(factors["keys and queries"] * nudge)).all()


def test_dead_channels_get_finite_factors():
    variance = torch.ones(1, HEAD_SIZE)
    variance[0, [3, 35]] = 0.0
    for dead in (variance, torch.zeros(1, HEAD_SIZE)):
        statics = KeyStatics(dead, dead, torch.ones(1, HEAD_SIZE))
        for factors in statics.factors(PairLayout(HEAD_SIZE, True)).values():
            assert torch.isfinite(factors).all() and (factors > 0).all()
