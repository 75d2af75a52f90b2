"""Round feedback: the arithmetic against a plain loop in fp64, and what it is for, less of the error that counts."""

import math

import pytest
import torch

from vllm_kvtuner.pages import feedback
from vllm_kvtuner.pages.codes import code_format
from vllm_kvtuner.pages.feedback import RoundFeedback, triangular_factors
from vllm_kvtuner.pages.layout import FEEDBACK_BITS, FP16_MAX, QUANTIZED_PAIRS
from vllm_kvtuner.pages.transforms import KEY, VALUE, LayerTransforms

HEADS = 3
TIES = 0.03
"""Rows whose codes may differ from those in fp64: a number that lies between two codes but for fp32's rounding."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def metrics(head_size, heads=HEADS, spread=3.0, damping=1e-3):
    """Positive definite, with eigenvalues as unequal as those of queries are, [heads, head_size, head_size] fp64."""
    basis = torch.linalg.qr(torch.randn(heads, head_size, head_size, dtype=torch.float64)).Q
    values = torch.exp(-spread * torch.linspace(0, 2, head_size, dtype=torch.float64))
    return basis @ torch.diag(values + damping * values.mean()) @ basis.mT


def random_feedback(head_size, ranges=(1.0,), heads=HEADS, **options):
    factors = triangular_factors(metrics(head_size, heads, **options))
    return RoundFeedback(factors, dict.fromkeys(FEEDBACK_BITS, ranges))


def correlated_rows(tokens, head_size, heads=HEADS):
    """As keys are: few directions hold most of the variance, channels differ in size, and a few numbers stand out."""
    mix = torch.randn(heads, head_size // 4, head_size)
    rows = torch.einsum("thk,hkd->thd", torch.randn(tokens, heads, head_size // 4), mix) / (head_size / 4) ** 0.5
    rows += 0.3 * torch.randn(tokens, heads, head_size)
    return rows * (1 + 2 * (torch.rand(tokens, heads, head_size) > 0.98))


def weighted_error(rows, read, factors):
    """e^T M e of each row, fp64 [tokens, heads], with the M that the fp16 factors stand for."""
    factors = factors.double()
    diagonal = torch.diag_embed(factors.diagonal(dim1=1, dim2=2))
    root = diagonal @ (factors.triu(1) + torch.eye(factors.shape[-1], dtype=torch.float64))
    return torch.einsum("hij,thj->thi", root, rows.double() - read.double()).square().sum(-1)


def plain_loop(row, factors, low, step, levels):
    """One row in one range by Python's floats: codes, and the cost."""
    size = len(row)
    codes, errors, cost = [0] * size, [0.0] * size, 0.0
    for i in reversed(range(size)):
        aim = row[i] + sum(factors[i][j] * errors[j] for j in range(i + 1, size))
        codes[i] = min(max(math.floor((aim - low) / step + 0.5), 0), levels) if step else 0
        number = low + step * codes[i]
        errors[i] = row[i] - number
        cost += (factors[i][i] * (aim - number)) ** 2
    return codes, cost


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", FEEDBACK_BITS)
@pytest.mark.parametrize("head_size", [8, 24, 64, 80])
@pytest.mark.parametrize("ranges", [(1.0,), (0.8, 1.1), (0.75, 0.95, 1.2)], ids=str)
def test_codes_are_those_of_a_plain_loop(bits, head_size, ranges):
    known = random_feedback(head_size, ranges)
    rows = correlated_rows(12, head_size)
    codes, scale, minimum = code_format(bits).quantize(rows, feedback=known)
    levels, different = 2**bits - 1, 0
    for token in range(len(rows)):
        for head in range(HEADS):
            row, factors = rows[token, head].tolist(), known.factors[head].tolist()
            low, high = min(row), max(row)
            best = (math.inf, None, None, None)
            for factor in ranges:
                step = float(torch.tensor((high - low) * factor / levels).half())
                base = float(torch.tensor(low + (high - low) * (1 - factor) / 2).half())
                wanted, cost = plain_loop(row, factors, base, step, levels)
                best = min(best, (cost, wanted, step, base), key=lambda each: each[0])
            got = codes[token, head].tolist(), float(scale[token, head]), float(minimum[token, head])
            different += got != best[1:]
    assert different <= TIES * HEADS * len(rows)


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", FEEDBACK_BITS)
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_the_cost_is_the_weighted_error(bits, head_size):
    """What a range is chosen by is e^T M e: no other range gives a row less of it."""
    ranges = (0.7, 0.9, 1.1)
    known = random_feedback(head_size, ranges)
    rows = correlated_rows(200, head_size)
    chosen = weighted_error(rows, code_format(bits).round_trip(rows, feedback=known), known.factors)
    alone = [RoundFeedback(known.factors, {bits: (factor,)}) for factor in ranges]
    errors = torch.stack(
        [weighted_error(rows, code_format(bits).round_trip(rows, feedback=each), known.factors) for each in alone]
    )
    torch.testing.assert_close(chosen, errors.amin(0), rtol=1e-4, atol=0)
    assert (errors.argmin(0).flatten().bincount() > 0).sum() > 1, "no range serves all rows"


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", FEEDBACK_BITS)
@pytest.mark.parametrize("head_size", [64, 96, 128])
@pytest.mark.parametrize("factor", [0.9, 1.0])
def test_the_weighted_error_is_less_than_without(bits, head_size, factor):
    """The same range with nearest codes: identity for a metric, of which nothing follows."""
    known = random_feedback(head_size, (factor,))
    nearest = RoundFeedback(identity(head_size), {bits: (factor,)})
    rows = correlated_rows(300, head_size)
    with_, without = (
        weighted_error(rows, code_format(bits).round_trip(rows, feedback=each), known.factors).mean(0)
        for each in (known, nearest)
    )
    assert (with_ < 0.75 * without).all(), with_ / without


def identity(head_size, heads=HEADS):
    return torch.eye(head_size, dtype=torch.float16).expand(heads, -1, -1)


@pytest.mark.parametrize("bits", FEEDBACK_BITS)
@pytest.mark.parametrize("head_size", [8, 64, 80])
@pytest.mark.parametrize("weight", [1.0, 0.37])
def test_an_identity_gives_nearest_codes_bit_for_bit(bits, head_size, weight):
    known = RoundFeedback((weight * identity(head_size)).half(), {bits: (1.0,)})
    rows = 100 * torch.randn(50, HEADS, 1) + correlated_rows(50, head_size)
    for got, wanted in zip(
        code_format(bits).quantize(rows, feedback=known), code_format(bits).quantize(rows), strict=True
    ):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("bits", FEEDBACK_BITS)
def test_an_identity_searches_ranges_by_squared_error(bits):
    ranges = (0.6, 0.8, 1.0)
    rows = correlated_rows(100, 64)
    known = RoundFeedback(identity(64), {bits: ranges})
    error = (code_format(bits).round_trip(rows, feedback=known) - rows).square().sum(-1)
    searched = (code_format(bits).round_trip(rows, range_search=True) - rows).square().sum(-1)
    plain = (code_format(bits).round_trip(rows) - rows).square().sum(-1)
    assert (error <= plain * (1 + 1e-5)).all()
    assert (error >= searched * (1 - 1e-5)).all(), "the search tries these ranges and others"


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", FEEDBACK_BITS)
@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -3.7, 1e-9, 60000.0])
def test_constant_rows_get_scale_0(bits, number):
    rows = torch.full((4, HEADS, 64), number)
    codes, scale, minimum = code_format(bits).quantize(rows, feedback=random_feedback(64, (0.8, 1.0, 1.2)))
    assert not codes.any()
    assert not scale.any()
    assert torch.equal(minimum, torch.full((4, HEADS), number).half())


@pytest.mark.parametrize("bits", FEEDBACK_BITS)
@pytest.mark.parametrize("huge", [7e4, 1e6, 1e30, 3e38, math.inf])
def test_huge_rows_saturate(bits, huge):
    rows = torch.randn(20, HEADS, 64)
    rows[:, :, 3], rows[:, :, 40] = huge, -huge
    known = random_feedback(64, (0.8, 1.0, 1.5))
    codes, scale, minimum = code_format(bits).quantize(rows, feedback=known)
    assert scale.isfinite().all()
    assert (minimum.abs() <= FP16_MAX).all()
    assert int(codes.max()) <= 2**bits - 1
    read = code_format(bits).round_trip(rows, feedback=known)
    assert read.isfinite().all()
    assert (read[:, :, 3] > 3e4).all()
    assert (read[:, :, 40] < -3e4).all()


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits", FEEDBACK_BITS)
@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1.0, 1e3, 2e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_within_the_page(bits, spread, dtype):
    rows = (spread * correlated_rows(50, 64)).to(dtype)
    known = random_feedback(64, (0.6, 1.0), spread=5.0, damping=1e-4)
    codes, scale, minimum = code_format(bits).quantize(rows, feedback=known)
    assert (codes.dtype, scale.dtype, minimum.dtype) == (torch.uint8, torch.float16, torch.float16)
    assert codes.shape == rows.shape
    assert scale.shape == minimum.shape == rows.shape[:-1]
    assert int(codes.max()) <= 2**bits - 1
    assert torch.equal(code_format(bits).unpack(code_format(bits).pack(codes.contiguous())), codes)


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch(monkeypatch):
    """Other rows and the parts of a call change sums by fp32's rounding alone, hence hardly a code."""
    known, codes = random_feedback(64, (0.8, 1.1)), code_format(2)
    rows = correlated_rows(70, 64)
    whole = codes.round_trip(rows, feedback=known)
    assert codes.round_trip(rows[:0], feedback=known).shape == (0, HEADS, 64)
    alone = torch.cat([codes.round_trip(rows[[token]], feedback=known) for token in range(70)])
    monkeypatch.setattr(feedback, "TOKENS_AT_ONCE", 32)
    for other in (alone, codes.round_trip(rows, feedback=known)):
        assert (other != whole).any(-1).sum() <= TIES * HEADS * len(rows)
    heads = torch.stack(
        [
            codes.round_trip(rows[:, [head]], feedback=RoundFeedback(known.factors[[head]], known.ranges))[:, 0]
            for head in range(HEADS)
        ],
        dim=1,
    )
    assert (heads != whole).any(-1).sum() <= TIES * HEADS * len(rows)


def test_candidates_of_ranges_are_rounded_together_as_alone():
    known, codes, candidates = random_feedback(64, (1.0,)), code_format(2), [(0.8, 0.95, 1.1), (0.95,), (1.1, 0.6)]
    rows = correlated_rows(70, 64)
    together = list(codes.round_trips(rows, known, candidates))
    for got, ranges in zip(together, candidates, strict=True):
        alone = codes.round_trip(rows, feedback=RoundFeedback(known.factors, {2: ranges}))
        assert (got != alone).any(-1).sum() <= TIES * HEADS * len(rows)
    assert not torch.equal(together[0], together[1])


def test_leading_axes_are_kept():
    known = random_feedback(64)
    rows = correlated_rows(12, 64)
    flat = code_format(4).quantize(rows, feedback=known)
    for got, wanted in zip(code_format(4).quantize(rows.view(3, 4, HEADS, 64), feedback=known), flat, strict=True):
        assert torch.equal(got, wanted.view(3, 4, *wanted.shape[1:]))


def test_a_side_has_feedback_in_few_bits_alone():
    keys, values = random_feedback(64), random_feedback(64)
    transforms = LayerTransforms(key_feedback=keys, value_feedback=values)
    for bits in FEEDBACK_BITS:
        assert transforms.feedback(KEY, bits) is keys and transforms.feedback(VALUE, bits) is values
    assert transforms.feedback(KEY, 8) is None and transforms.feedback(VALUE, 8) is None
    only_values = LayerTransforms(value_feedback=values)
    assert only_values.feedback(KEY, 2) is None
    rounded = {str(pair): only_values.rounds_with_feedback(pair) for pair in QUANTIZED_PAIRS}
    assert rounded == {name: not name.endswith("V8") for name in rounded}


def test_ranges_of_the_bits_must_be_there():
    with pytest.raises(KeyError):
        code_format(4).quantize(torch.randn(1, HEADS, 64), feedback=RoundFeedback(identity(64), {2: (1.0,)}))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_factors_hold_the_metric(scale):
    metric = scale * metrics(64)
    factors = triangular_factors(metric)
    assert factors.dtype == torch.float16
    assert not factors.tril(-1).any()
    diagonal = factors.double().diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal.square().mean(-1), torch.ones(HEADS, dtype=torch.float64), rtol=1e-3, atol=0)
    root = torch.diag_embed(diagonal) @ (factors.double().triu(1) + torch.eye(64, dtype=torch.float64))
    back = root.mT @ root
    unit = (metric / back).diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    # fp16 rounds each factor by 2^-11 of itself.
    assert (unit * back - metric).abs().max() <= 2e-3 * metric.abs().max()


def test_fp16_factors_lose_nothing():
    """Against the factors before fp16, by the error that counts."""
    metric = metrics(128)
    lower = torch.linalg.cholesky(metric)
    diagonal = lower.diagonal(dim1=1, dim2=2)
    exact = (lower / diagonal[:, None]).mT.triu(1) + torch.diag_embed(diagonal)
    rows = correlated_rows(200, 128)
    errors = [
        weighted_error(rows, code_format(2).round_trip(rows, feedback=RoundFeedback(each, {2: (0.9,)})), exact).mean()
        for each in (triangular_factors(metric), exact.float())
    ]
    assert errors[0] <= 1.02 * errors[1]


def test_metrics_without_such_factors_are_refused():
    metric = metrics(64)
    metric[1] = -metric[1]
    with pytest.raises(ValueError, match="metric must be positive definite, but got another for head 1"):
        triangular_factors(metric)
    metric = torch.diag_embed(torch.ones(HEADS, 64, dtype=torch.float64))
    metric[2, 5, 5] = 1e-20
    with pytest.raises(ValueError, match=r"metric must be damped, .*for head 2"):
        triangular_factors(metric)
