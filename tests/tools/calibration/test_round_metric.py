"""The metrics of round feedback against brute force: rows are moved, and what the model makes of it is measured."""

from dataclasses import replace

import pytest
import torch

from kvtuner_tools.calibration import round_metric
from kvtuner_tools.calibration.captured import CapturedLayer, Turns, Window
from kvtuner_tools.calibration.rotation import apply_rotary, undo_rotary
from kvtuner_tools.calibration.round_metric import DAMPING, PACKED_DAMPING, RoundMetrics, round_metrics
from vllm_kvtuner.pages.feedback import triangular_factors
from vllm_kvtuner.pages.transforms import LayerTransforms, RotaryTable, restore_keys, rotate_values
from vllm_kvtuner.profile.profile import RecentWindow

HEADS, GROUP, SIZE, TOKENS = 2, 3, 16, 24
STEP = 1e-4
"""Of a moved row: small enough for the second order, large enough for fp64."""
LAYER = CapturedLayer(
    index=0,
    num_heads=HEADS * GROUP,
    num_kv_heads=HEADS,
    head_size=SIZE,
    scale=0.4,
    sliding_window=None,
    logits_soft_cap=0.0,
    rotary=0,
    offset_unsupported=None,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def table(positions=64, rotary_dim=SIZE, is_neox=True):
    angles = torch.arange(positions)[:, None] * 30.0 ** -torch.linspace(0, 1, rotary_dim // 2)
    return RotaryTable(torch.cat([angles.cos(), angles.sin()], dim=-1), is_neox)


def window(tokens=TOKENS):
    rows = torch.randn(tokens, HEADS, SIZE), torch.randn(tokens, HEADS, SIZE)
    return Window(*rows, torch.randn(tokens, HEADS * GROUP, SIZE), torch.arange(tokens))


def random_gram():
    """As W^T M W is: positive definite over the numbers of all query heads of a KV head."""
    root = torch.randn(HEADS, GROUP * SIZE, GROUP * SIZE) / (GROUP * SIZE) ** 0.5
    return (root.mT @ root).view(HEADS, GROUP, SIZE, GROUP, SIZE)


def outputs(layer, seen, keys, values, recent):
    """[queries, num_kv_heads, group, head_size] fp64 by plain attention, reading ``keys`` and ``values``
    where tokens are packed."""
    rows = torch.zeros(len(seen.query), HEADS, GROUP, SIZE, dtype=torch.float64)
    for i, query in enumerate(seen.query.double().view(-1, HEADS, GROUP, SIZE)):
        position = int(seen.query_position[i])
        first = 0 if layer.sliding_window is None else max(0, position - layer.sliding_window + 1)
        index = torch.arange(first, position + 1)
        packed = torch.ones_like(index, dtype=torch.bool)
        if recent is not None:
            packed = (position - index >= recent.tokens) & (index >= recent.sink_tokens)
        key = torch.where(packed[:, None, None], keys[index], seen.key.double()[index])
        value = torch.where(packed[:, None, None], values[index], seen.value.double()[index])
        logits = layer.scale * torch.einsum("hgd,thd->hgt", query, key)
        if layer.logits_soft_cap:
            logits = layer.logits_soft_cap * torch.tanh(logits / layer.logits_soft_cap)
        if layer.sinks is not None:
            sinks = torch.tensor(layer.sinks, dtype=torch.float64).view(HEADS, GROUP, 1)
            logits, value = torch.cat([logits, sinks], -1), torch.cat([value, torch.zeros(1, HEADS, SIZE)])
        rows[i] = torch.einsum("hgt,thd->hgd", logits.softmax(-1), value.double())
    return rows


def cost_of_moves(layer, seen, gram, recent, side, moves, *, own):
    """Per KV head the sum over tokens of what the outputs' change costs when that token's row alone moves, over STEP^2.

    Args:
        moves: [num_tokens, num_kv_heads, head_size] fp64 of length 1.
        own: leave out what two query heads' errors do together, as the metric of keys does.
    """
    exact = outputs(layer, seen, seen.key.double(), seen.value.double(), recent)
    total = torch.zeros(HEADS, dtype=torch.float64)
    gram = gram.double()
    for token in range(len(seen.key)):
        rows = {"key": seen.key.double().clone(), "value": seen.value.double().clone()}
        rows[side][token] += STEP * moves[token]
        change = (outputs(layer, seen, rows["key"], rows["value"], recent) - exact) / STEP
        if own:
            total += torch.einsum("qhgi,hgigj,qhgj->h", change, gram, change)
        else:
            total += torch.einsum("qhgi,hgikj,qhkj->h", change, gram, change)
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "recent"),
    [
        (LAYER, RecentWindow(4, sink_tokens=2)),
        (replace(LAYER, logits_soft_cap=1.5), RecentWindow(4, sink_tokens=2)),
        (replace(LAYER, sliding_window=9), RecentWindow(3)),
        (LAYER, None),
        (replace(LAYER, sinks=(1.0, 0.0, 2.0, -1.0, 3.0, 1.5)), RecentWindow(4)),
    ],
    ids=["full", "soft cap", "sliding window", "no recent window", "attention sinks"],
)
@pytest.mark.parametrize("chunk", [128, 7])
def test_metrics_are_what_moved_rows_cost(layer, recent, chunk, monkeypatch):
    monkeypatch.setattr(round_metric, "QUERIES_AT_ONCE", chunk)
    seen, gram = window(), random_gram()
    metrics = round_metrics(layer, [seen], gram, None, recent)
    move = torch.nn.functional.normalize(torch.randn(HEADS, SIZE, dtype=torch.float64), dim=-1)
    moves = move.expand(TOKENS, -1, -1)
    wanted = cost_of_moves(layer, seen, gram, recent, "value", moves, own=False)
    torch.testing.assert_close(torch.einsum("hi,hij,hj->h", move, metrics.values, move), wanted, rtol=1e-4, atol=0)
    wanted = cost_of_moves(layer, seen, gram, recent, "key", moves, own=True)
    got = layer.scale**2 * torch.einsum("hi,hij,hj->h", move, metrics.keys, move)
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=0)


def test_windows_add_up():
    seen, gram = [window(), window(17)], random_gram()
    both = round_metrics(LAYER, seen, gram, table(), None)
    parts = [round_metrics(LAYER, [each], gram, table(), None) for each in seen]
    torch.testing.assert_close(both.keys, parts[0].keys + parts[1].keys)
    torch.testing.assert_close(both.values, parts[0].values + parts[1].values)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("rotary_dim", "is_neox"), [(SIZE, True), (SIZE, False), (8, True)])
def test_queries_are_turned_back_by_the_position_they_attend_to(rotary_dim, is_neox):
    """Exact where one token alone is read packed: its error before RoPE costs what it does after RoPE."""
    rotary, token = table(rotary_dim=rotary_dim, is_neox=is_neox), 5
    seen, gram = window(token + 4), random_gram()
    seen = replace(seen, query=seen.query[-1:], query_position=seen.query_position[-1:])
    recent = RecentWindow(3, sink_tokens=token)
    metrics = round_metrics(LAYER, [seen], gram, rotary, recent)
    before = torch.nn.functional.normalize(torch.randn(HEADS, SIZE), dim=-1)
    after = apply_rotary(before[None], torch.tensor([token]), rotary).double()
    wanted = cost_of_moves(LAYER, seen, gram, recent, "key", after.expand(token + 4, -1, -1), own=True)
    before = before.double()
    got = LAYER.scale**2 * torch.einsum("hi,hij,hj->h", before, metrics.keys, before)
    torch.testing.assert_close(got, wanted, rtol=2e-3, atol=0)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("rotary_dim", "is_neox"), [(SIZE, True), (SIZE, False), (8, True), (8, False)])
def test_turns_are_the_mean_over_positions(rotary_dim, is_neox):
    rotary, positions = table(rotary_dim=rotary_dim, is_neox=is_neox), 41
    root = torch.randn(HEADS, SIZE, SIZE, dtype=torch.float64)
    metric, error = root @ root.mT, torch.randn(positions, HEADS, SIZE)
    got = Turns.over(rotary, positions).mean(metric)
    # Errors after RoPE at position t are those before it, turned; the metric must say of them what it said before.
    each = []
    for t in range(positions):
        turned = undo_rotary(error, torch.full((positions,), t), rotary).double()
        each.append(torch.einsum("nhi,hij,nhj->nh", turned, metric, turned))
    wanted = torch.stack(each).mean(0)
    torch.testing.assert_close(torch.einsum("nhi,hij,nhj->nh", error.double(), got, error.double()), wanted)
    assert (wanted - torch.einsum("nhi,hij,nhj->nh", error.double(), metric, error.double())).abs().max() > 1


def test_turns_take_a_table_that_is_shorter():
    short = table(20)
    torch.testing.assert_close(Turns.over(short, 100).moments, Turns.over(short, 20).moments)


def test_packed_rows_have_the_metric_of_the_model_s_rows():
    roots = torch.randn(2, HEADS, SIZE, SIZE, dtype=torch.float64)
    metrics = RoundMetrics(*(roots @ roots.mT))
    transforms = LayerTransforms(key_equalization=torch.rand(HEADS, SIZE) + 0.5, key_hadamard=True, value_hadamard=True)
    packed = metrics.packed(transforms)
    errors = torch.randn(50, HEADS, SIZE)
    for mine, theirs, restored in (
        (packed.keys, metrics.keys, restore_keys(errors, None, transforms)),
        (packed.values, metrics.values, rotate_values(errors, transforms)),
    ):
        level = theirs.diagonal(dim1=1, dim2=2).mean(1)
        restored, error = restored.double(), errors.double()
        wanted = torch.einsum("nhi,hij,nhj->nh", restored, theirs, restored)
        wanted += DAMPING * level * restored.square().sum(-1)
        got = torch.einsum("nhi,hij,nhj->nh", error, mine, error)
        extra = (got - wanted) / error.square().sum(-1)
        inner = mine.diagonal(dim1=1, dim2=2).mean(1) / (1 + PACKED_DAMPING)
        torch.testing.assert_close(extra, (PACKED_DAMPING * inner).expand(50, -1), rtol=1e-2, atol=0)


def test_a_head_that_nobody_reads_packed_is_rounded_to_the_nearest():
    metrics = round_metrics(LAYER, [window()], random_gram(), table(), RecentWindow(TOKENS))
    packed = metrics.packed(LayerTransforms())
    for metric in (packed.keys, packed.values):
        assert torch.equal(triangular_factors(metric), torch.eye(SIZE).half().expand(HEADS, -1, -1))
