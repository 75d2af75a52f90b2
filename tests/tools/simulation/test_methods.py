"""Each method's arithmetic against plain loops, or numbers worked out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvtuner_tools.calibration.rotation import apply_rotary, undo_rotary
from kvtuner_tools.simulation.fp8 import Fp8
from kvtuner_tools.simulation.kivi import Kivi
from kvtuner_tools.simulation.kvarn import KVarN, balancing_factors, round_tiles
from kvtuner_tools.simulation.kvquant import KvQuant, weighted_means
from kvtuner_tools.simulation.lorc import Lorc, progressive_shares
from kvtuner_tools.simulation.methods import NAMES, parse_method
from kvtuner_tools.simulation.oscar import Oscar, round_clipped
from kvtuner_tools.simulation.pruning import H2O, SnapKv
from kvtuner_tools.simulation.qaq import Qaq, largest_weights, round_rows, sensitivity
from kvtuner_tools.simulation.saw import Saw
from kvtuner_tools.simulation.think import Think, weakest_channels
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape

from .conftest import GROUP, HEADS, SIZE, make_rows

CLOSE = {"atol": 2e-5, "rtol": 1e-5}
"""fp32 against float64, of numbers below 20."""


def nearest_between(numbers: list[float], bits: int) -> list[float]:
    """Numbers between their minimum and maximum, which stay in fp16 with the step."""
    low, high = min(numbers), max(numbers)
    minimum, step = float(np.float16(low)), float(np.float16(np.float32((high - low) / (2**bits - 1))))
    return [minimum + step * min(max(round((each - minimum) / step), 0), 2**bits - 1) for each in numbers]


def test_fp8(layer, rows):
    """e4m3 has 3 bits of mantissa and ends at 448."""
    sample = torch.tensor([1.0, 1.06, 1.07, 17.0, 500.0, -0.3]).repeat(1, HEADS, 6)[..., :SIZE]
    given = replace(rows, key=sample, value=sample, query=rows.query[:1])
    plain = Fp8()
    read = plain.view(layer, plain.prepare(layer, [given]), given)
    assert read.key[0, 0, :6].tolist() == pytest.approx([1.0, 1.0, 1.125, 16.0, 448.0, -0.3125])
    assert read.storage.bits == 8
    scaled = Fp8("scaled")
    scales = scaled.prepare(layer, [given])
    assert scales == pytest.approx((500 / 448, 500 / 448))
    assert scaled.view(layer, scales, given).key[0, 0, 4].item() == pytest.approx(500, abs=1e-3)


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi(layer, rows, bits):
    view = Kivi(bits, 64).view(layer, None, rows)

    for start, head, channel in ((0, 0, 3), (224, 1, 31)):
        group = rows.key[start : start + 32, head, channel].tolist()
        read = view.key[start : start + 32, head, channel]
        torch.testing.assert_close(read, torch.tensor(nearest_between(group, bits)), **CLOSE)
    read = nearest_between(rows.value[299, 1].tolist(), bits)
    torch.testing.assert_close(view.value[299, 1], torch.tensor(read), **CLOSE)
    # Keys wait for 64 of their kind: of 130 tokens 128 are packed, and all 64 of 64.
    assert view.exact_keys[129].tolist() == [False] * 128 + [True] * 172
    assert view.exact_keys[62].all() and not view.exact_keys[63, :64].any()
    assert view.exact_values[129, :130].tolist() == [False] * 66 + [True] * 64
    assert view.storage.bits == bits + 1
    assert view.storage.exact_tokens == (31.5 + 64) / 2


def test_kvquant(layer):
    texts = [make_rows(200, seed) for seed in (1, 2)]
    method = KvQuant(3)
    statics = method.prepare(layer, texts)
    rows = make_rows(150, 3)

    view = method.view(layer, statics, rows)

    before = [undo_rotary(each.key, each.positions, layer.rotary) for each in (*texts, rows)]
    seen = torch.cat(before[:2]).flatten(1).numpy()
    low, high = np.percentile(seen, [0.5, 99.5], axis=0)
    np.testing.assert_allclose(statics.low, low, atol=1e-4)
    key = np.empty((150, HEADS * SIZE))
    for token in range(150):
        for channel, number in enumerate(before[2][token].flatten().tolist()):
            if low[channel] <= number <= high[channel]:
                middle, half = (high[channel] + low[channel]) / 2, (high[channel] - low[channel]) / 2
                distances = [abs((number - middle) / half - level) for level in statics.keys.levels.tolist()]
                number = statics.keys.levels[int(np.argmin(distances))].item() * half + middle
            key[token, channel] = number
    turned = apply_rotary(torch.from_numpy(key).float().view_as(rows.key), rows.positions, layer.rotary)
    # A number between two levels may take the other one in float64, and outliers are rounded to fp16.
    assert (turned - view.key).abs().median() < 1e-5
    assert ((turned - view.key).abs() > 5e-3).float().mean() < 2e-3

    token = rows.value[7].flatten().tolist()
    ends = np.percentile(token, [0.5, 99.5])
    inside = [number for number in token if ends[0] < number < ends[1]]
    middle, half = (max(inside) + min(inside)) / 2, (max(inside) - min(inside)) / 2
    levels = statics.values.levels.tolist()
    read = [
        min((level * half + middle for level in levels), key=lambda level: abs(level - number))
        if ends[0] < number < ends[1]
        else float(np.float16(number))
        for number in token
    ]
    np.testing.assert_allclose(view.value[7].flatten(), read, atol=1e-4)
    assert view.exact_keys[:, 0].all() and not view.exact_keys[:, 1:].any()
    outliers = (len(token) - len(inside)) / len(token)
    assert view.storage.bits == pytest.approx(3 + 16 * (outliers + 0.015) + 16 / len(token), abs=0.3)


def test_kvquant_normalizes_two_bits(layer):
    """Q-Norm: mean and deviation of what is read are those of the numbers."""
    rows = make_rows(400, 1)
    statics = KvQuant(2).prepare(layer, [rows])
    keys = undo_rotary(rows.key, rows.positions, layer.rotary).flatten(1)
    normalized = (keys - (statics.high + statics.low) / 2) / ((statics.high - statics.low) / 2)
    numbers = normalized[normalized.abs() <= 1]
    read = statics.keys.round(numbers)
    assert read.mean().item() == pytest.approx(numbers.mean().item(), abs=1e-4)
    assert read.std().item() == pytest.approx(numbers.std().item(), rel=1e-3)


def test_weighted_means():
    """Two heaps; the heavy number draws its centroid."""
    numbers = torch.tensor([0.0, 1.0, 10.0, 12.0])
    assert weighted_means(numbers, torch.tensor([1.0, 1.0, 3.0, 1.0]), 2).tolist() == [0.5, 10.5]


def test_qaq_bits(layer, rows):
    """By the paper's formulas, token by token."""
    rows = replace(rows, query=rows.query[:60], key=rows.key[:60], value=rows.value[:60])
    used = largest_weights(layer, rows)
    position, head = 20, 1
    weights = []
    for query in range(20, 25):
        for group in range(GROUP):
            logits = rows.key[: query + 1, head] @ rows.query[query, head * GROUP + group] * layer.scale
            weights.append(logits.softmax(0)[position].item())
    assert used[position, head].item() == pytest.approx(max(weights), rel=1e-4)

    a = used[:, head].double()
    matrix = torch.diag(a) - a[:, None] * a[None]
    torch.testing.assert_close(sensitivity(used)[:, head].double(), matrix.abs().amax(1), atol=1e-6, rtol=1e-4)

    row = rows.value[5, 0]
    error = 0.07
    read, stored = round_rows(row[None, None], torch.full((1, 1), error))
    ordered = sorted(row.tolist())
    kept = ordered[1:-1]  # of 32 numbers, one at each end stays as it is
    bits = math.ceil(math.log2((kept[-1] - kept[0]) / (2 * error) + 1))
    step = float(np.float16((kept[-1] - kept[0]) / 2**bits))
    mean = float(np.float16(sum(kept) / len(kept)))
    for number, got in zip(row.tolist(), read[0, 0].tolist(), strict=True):
        code = min(max(round((number - mean) / step), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
        assert got == pytest.approx(number if number in (ordered[0], ordered[-1]) else mean + code * step, abs=1e-4)
    assert stored == pytest.approx(bits + 36 / 32 + 32 * 2 / 32)


def test_qaq_gives_attended_tokens_more_bits(layer, rows):
    method = Qaq(4.0, 2.5)
    statics = method.prepare_all([layer], {0: [rows]})[0]
    storage = method.view(layer, statics, rows).storage
    # Of 32 numbers a row, with two outliers.
    assert storage.bits == pytest.approx((4.0 + 2.5) / 2 + 36 / 32 + 32 * 2 / 32, abs=0.02)
    assert statics.query == rows.query.abs().max()
    error = torch.tensor([[0.001], [1.0]])
    read, _ = round_rows(rows.value[:2, :1], error)
    errors = (read - rows.value[:2, :1]).abs().mean(-1)[:, 0]
    assert errors[0] < 0.02 < errors[1]


def test_think(layer, rows):
    rows = replace(rows, prompt_tokens=200)
    view = Think(0.4).view(layer, None, rows)

    pruned = weakest_channels(layer, rows, 0.4)
    for head in range(HEADS):
        norms = []
        for channel in range(SIZE):
            keys = rows.key[:200, head, channel].double()
            total = 0.0
            for group in range(GROUP):
                queries = rows.query[168:200, head * GROUP + group, channel].double()
                total += float(torch.outer(queries, keys).norm())
            norms.append(total)
        assert set(pruned[head].nonzero()[:, 0].tolist()) == set(np.argsort(norms)[:12].tolist())
    assert not view.key[:168][:, pruned].any()
    assert torch.equal(view.key[168:], rows.key[168:])
    assert torch.equal(view.key[:, ~pruned], rows.key[:, ~pruned])
    assert view.storage.bits == pytest.approx(16 * (1 + 20 / 32) / 2)
    with_kivi = Think(0.4, 4).view(layer, None, rows)
    assert with_kivi.storage.bits == pytest.approx(5 * (1 + 20 / 32) / 2)
    assert not with_kivi.exact_keys[250, :168].any() and with_kivi.exact_keys[250, 260]


def test_lorc(layer, rows):
    """Rows from weights of a rank come back whole at that rank, and less so below it."""
    torch.manual_seed(0)
    hidden = torch.randn(rows.num_tokens, 48)
    key_weight = torch.randn(HEADS * SIZE, 16) @ torch.randn(16, 48)
    value_weight = torch.randn(HEADS * SIZE, 16) @ torch.randn(16, 48)
    bias = torch.randn(HEADS * SIZE)
    before = (hidden @ key_weight.T + bias).view_as(rows.key)
    given = replace(
        rows,
        key=apply_rotary(before, rows.positions, layer.rotary),
        value=(hidden @ value_weight.T).view_as(rows.value),
    )
    known = replace(layer, weights=lambda: (key_weight, value_weight, bias))
    errors = []
    for share in (16 / 64, 8 / 64):
        method = Lorc(share)
        view = method.view(known, method.prepare_all([known], {})[0], given)
        assert view.storage.bits == pytest.approx(16 * share)
        scale = given.value.square().mean()
        errors.append(float((view.value - given.value).square().mean() / scale))
        errors.append(float((view.key - given.key).square().mean() / scale))
    assert max(errors[:2]) < 1e-5 and min(errors[2:]) > 0.05


def test_lorc_ranks_fall_with_depth():
    shares = progressive_shares([1.0, 2.0, 1.0, 2.0], 0.5)
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) / 4 == pytest.approx(0.5)
    # Multiplied up from a layer to the last: logs of 6, 5, 3 and 2.
    assert (shares[0] - shares[1]) / (shares[0] - shares[3]) == pytest.approx(0.25)
    assert shares[0] == pytest.approx(0.625)


def test_snapkv(layer, rows):
    rows = replace(rows, prompt_tokens=200)
    view = SnapKv(0.3).view(layer, None, rows)

    for head in range(HEADS):
        scores = [0.0] * 168
        for query in range(168, 200):
            for group in range(GROUP):
                logits = rows.key[: query + 1, head] @ rows.query[query, head * GROUP + group] * layer.scale
                for token, weight in enumerate(logits.softmax(0)[:168].tolist()):
                    scores[token] += weight
        pooled = [max(scores[max(0, token - 3) : token + 4]) for token in range(168)]
        kept = view.visible[head, 250, :168].nonzero()[:, 0].tolist()
        assert len(kept) == 60 - 32
        least = min(pooled[token] for token in kept)
        assert all(pooled[token] <= least + 1e-6 for token in range(168) if token not in kept)
    assert view.visible[:, 250, 168:].all()
    assert view.storage.bits == pytest.approx(16 * 0.3)


def test_h2o(layer, rows):
    rows = replace(rows, query=rows.query[:60], key=rows.key[:60], value=rows.value[:60], prompt_tokens=50)
    view = H2O(0.8).view(layer, None, rows)

    for head in range(HEADS):
        scores = [0.0] * 60
        for query in range(50):
            for group in range(GROUP):
                logits = rows.key[: query + 1, head] @ rows.query[query, head * GROUP + group] * layer.scale
                for token, weight in enumerate(logits.softmax(0).tolist()):
                    scores[token] += weight
        older = sorted(range(50 - 20), key=lambda token: scores[token])
        kept = set(range(50)) - set(older[:10])
        for now in range(50, 60):
            kept |= {now}
            assert set(view.visible[head, now].nonzero()[:, 0].tolist()) == kept
            order = sorted(kept)
            for group in range(GROUP):
                logits = rows.key[order, head] @ rows.query[now, head * GROUP + group] * layer.scale
                for token, weight in zip(order, logits.softmax(0).tolist(), strict=True):
                    scores[token] += weight
            kept -= {min((token for token in kept if token <= now - 20), key=lambda token: scores[token])}


def test_pruning_with_another_method(layer, rows):
    rows = replace(rows, prompt_tokens=200)
    view = SnapKv(0.5, Kivi(4)).view(layer, None, rows)
    assert torch.equal(view.key, Kivi(4).view(layer, None, rows).key)
    assert view.storage.bits == pytest.approx(2.5)
    assert view.visible is not None


@pytest.mark.parametrize("bits", [2, 4])
def test_kvarn_tiles(bits):
    """One tile, step by step in float64."""
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(8, 128, generator=generator) * torch.linspace(0.5, 6, 8)[:, None]
    columns, rows = balancing_factors(tile)

    given = tile.double().numpy()

    def spread(current: np.ndarray) -> float:
        by_column, by_row = current.std(0, ddof=1), current.std(1, ddof=1)
        return by_column.max() / by_column.min() + by_row.max() / by_row.min()

    column_log, row_log = np.zeros((1, 128)), np.zeros((8, 1))
    best, least = (column_log, row_log), spread(given)
    for _ in range(16):
        current = given / np.exp(column_log) / np.exp(row_log)
        column_log = np.clip(column_log + np.log(current.std(0, ddof=1, keepdims=True)), -0.3, 10)
        current = given / np.exp(column_log) / np.exp(row_log)
        row_log = np.clip(row_log + np.log(current.std(1, ddof=1, keepdims=True)), -0.3, 10)
        current = given / np.exp(column_log) / np.exp(row_log)
        if spread(current) <= least:
            best, least = (column_log, row_log), spread(current)
    np.testing.assert_allclose(columns, np.exp(best[0]), rtol=1e-3)
    np.testing.assert_allclose(rows, np.exp(best[1]), rtol=1e-3)
    assert spread((tile / columns / rows).double().numpy()) < spread(given)

    read = round_tiles(tile, bits)
    balanced = tile / columns / rows
    step = (balanced.amax(1) - balanced.amin(1)) / (2**bits - 1)
    worst = (step / 2)[:, None] * rows * columns * 1.02 + 0.02  # half a step, and fp16
    assert ((read - tile).abs() <= worst).all()


@pytest.mark.slow
def test_kvarn(layer, rows):
    view = KVarN(4, 2).view(layer, None, rows)
    assert view.storage.bits == pytest.approx(3 + 16 * ((2 * 32 + 128) + (2 * 128 + 32)) / (2 * 128 * 32))
    assert view.exact_keys[299].tolist() == [True] * 128 + [False] * 128 + [True] * 44
    turned = rows.key[128:256] @ rotation(SIZE)
    read = view.key[128:256] @ rotation(SIZE)
    torch.testing.assert_close(read[:, 1].T, round_tiles(turned[:, 1].T, 4), **CLOSE)
    turned, read = rows.value[128:256] @ rotation(SIZE), view.value[128:256] @ rotation(SIZE)
    torch.testing.assert_close(read[:, 1], round_tiles(turned[:, 1], 2), **CLOSE)


def rotation(size: int) -> torch.Tensor:
    """Sylvester's matrix by the parity of common bits."""
    entries = [[(-1) ** bin(row & column).count("1") for column in range(size)] for row in range(size)]
    return torch.tensor(entries) / size**0.5


@pytest.mark.slow
def test_oscar(layer, rows):
    method = Oscar()
    turns = method.prepare(layer, [rows])

    moment = np.zeros((SIZE, SIZE))
    for token in range(rows.num_tokens):
        for head in range(layer.num_heads):
            query = rows.query[token, head].double().numpy()
            moment += np.outer(query, query) / layer.num_heads
    weighted = np.zeros((SIZE, SIZE))
    for token in range(rows.num_tokens):
        for head in range(HEADS):
            key, value = rows.key[token, head].double().numpy(), rows.value[token, head].double().numpy()
            weighted += key @ moment @ key * np.outer(value, value)
    for turn, matrix in zip(turns, (moment, weighted), strict=True):
        basis = (turn @ rotation(SIZE).T).double().numpy()
        diagonal = basis.T @ matrix @ basis
        np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-4 * np.abs(matrix).max())
        np.testing.assert_allclose(basis.T @ basis, np.eye(SIZE), atol=1e-5)

    row = rows.value[3, 0] @ turns[1]
    limit = sorted(row.abs().tolist())[int(0.92 * SIZE)]
    clipped = [min(max(number, -limit), limit) for number in row.tolist()]
    torch.testing.assert_close(round_clipped(row, 2, 0.92), torch.tensor(nearest_between(clipped, 2)), **CLOSE)
    view = method.view(layer, turns, rows)
    torch.testing.assert_close(view.value[3, 0], round_clipped(row, 2, 0.92) @ turns[1].T, **CLOSE)
    assert view.storage.bits == 3.0
    assert view.exact_keys[299].tolist() == [True] * 300
    assert view.exact_keys[299].sum() == 300 and Oscar().view(layer, turns, make_rows(400)).exact_keys[399].sum() == 320


def test_saw(layer, rows):
    view = Saw().view(layer, None, rows)
    blocks = torch.block_diag(rotation(16), rotation(16))
    turned = rows.key[9, 1] @ blocks
    read = torch.tensor(nearest_between(turned.tolist(), 4)) @ blocks
    torch.testing.assert_close(view.key[9, 1], read, **CLOSE)
    torch.testing.assert_close(view.value[9, 1], torch.tensor(nearest_between(rows.value[9, 1].tolist(), 4)), **CLOSE)
    turned = rows.value[9, 1] @ rotation(SIZE)
    read = torch.tensor(nearest_between(turned.tolist(), 4)) @ rotation(SIZE)
    torch.testing.assert_close(Saw("full").view(layer, None, rows).value[9, 1], read, **CLOSE)
    assert view.storage.bits == 5.0


SHAPE = ModelShape(name="test", architecture="LlamaForCausalLM", layers=(LayerShape(HEADS, SIZE),))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("kivi:4:64", "kivi:4:64"),
        ("kivi", "kivi:2:128"),
        ("snapkv:0.5:kvtuner:K4V4", "snapkv:0.5:kvtuner:K4V4"),
        ("h2o:0.2", "h2o:0.2"),
        ("kvtuner:K4V4:plain", "kvtuner:K4V4:plain"),
        ("kvtuner:K4V4:K3V3", "kvtuner:K4V4:K3V3"),
    ],
)
def test_names(text, label):
    assert parse_method(text, SHAPE).label == label


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kivy:2", "a method must be one of .*kivi.* but got 'kivy:2'"),
        ("kivi:two", "kivi takes parameters of the types int, int, but got 'kivi:two'"),
        ("kivi:2:64:1", "kivi takes at most 2 parameters"),
        ("kivi:2:48", "residual must be a multiple of 32 tokens, but got 48"),
        ("kvquant:8", "bits must be 2 to 5, but got 8"),
        ("lorc:1.5", r"share must be in \(0, 1\], but got 1.5"),
        ("kvtuner", "must be followed by a profile"),
    ],
)
def test_what_is_no_method_is_refused(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_method(text, SHAPE)


def test_every_method_has_a_name():
    for name in NAMES:
        assert parse_method("kvtuner:K4V4" if name == "kvtuner" else name, SHAPE).label
