"""The greedy choice and the integer program, against all settings."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_tools.calibration.cluster import Cluster
from kvtuner_tools.calibration.greedy import greedy
from kvtuner_tools.calibration.integer_program import integer_program
from kvtuner_tools.calibration.refit import refit, side_errors
from kvtuner_tools.calibration.space import SearchSpace, bytes_for_bits, bytes_for_memory, check_budget
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, PrecisionPair, content_bytes, mean_bits

PAIRS = tuple(sorted(QUANTIZED_PAIRS, key=lambda pair: (pair.nominal_bits, pair)))
SHAPES = {0: (2, 64), 1: (4, 64), 2: (1, 128)}


@st.composite
def clusters_and_budget(draw):
    clusters = []
    for layer in range(draw(st.integers(1, 4))):
        heads = draw(st.integers(1, 4))
        number = draw(st.integers(1, 5))
        pairs = sorted(draw(st.permutations(PAIRS))[:number], key=lambda pair: (pair.nominal_bits, pair))
        exponent = draw(st.sampled_from([1e-8, 1.0, 1e3]))
        errors = [exponent * draw(st.floats(0, 1)) for _ in pairs]
        sizes = [heads * content_bytes(pair, 64) for pair in pairs]
        clusters.append(Cluster((layer,), dict(zip(pairs, errors, strict=True)), dict(zip(pairs, sizes, strict=True))))
    most = sum(max(each.bytes_per_token.values()) for each in clusters)
    return clusters, draw(st.integers(1, most + 10))


def error_of(clusters, choice):
    return sum(each.additive_error[pair] for each, pair in zip(clusters, choice, strict=True))


def size_of(clusters, choice):
    return sum(each.bytes_per_token[pair] for each, pair in zip(clusters, choice, strict=True))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(clusters_and_budget())
def test_integer_program_is_optimal_and_greedy_fits(case):
    clusters, max_bytes = case
    within = [c for c in itertools.product(*(each.pairs for each in clusters)) if size_of(clusters, c) <= max_bytes]
    exact, quick = integer_program(clusters, max_bytes), greedy(clusters, max_bytes)
    if not within:
        assert exact is None and quick is None
        return
    assert exact is not None and quick is not None
    best = min(error_of(clusters, choice) for choice in within)
    # HiGHS's tolerance on the objective, which is scaled by the largest error.
    scale = max(error for each in clusters for error in each.additive_error.values())
    assert error_of(clusters, exact) <= best + 1e-6 * scale
    assert size_of(clusters, exact) <= max_bytes
    assert size_of(clusters, quick) <= max_bytes
    # Nothing that fits and helps is left over.
    for position, each in enumerate(clusters):
        for pair in each.pairs:
            other = (*quick[:position], pair, *quick[position + 1 :])
            gains = error_of(clusters, other) < error_of(clusters, quick)
            assert not (gains and size_of(clusters, quick) < size_of(clusters, other) <= max_bytes)


def test_greedy_takes_the_best_error_per_byte():
    small, large = PrecisionPair(2, 2), PrecisionPair(8, 8)
    clusters = [
        Cluster((0,), {small: 10.0, large: 1.0}, {small: 10, large: 40}),  # 0.3 per byte
        Cluster((1,), {small: 6.0, large: 1.0}, {small: 10, large: 20}),  # 0.5 per byte
    ]
    assert greedy(clusters, 30) == (small, large)
    assert greedy(clusters, 60) == (large, large)


@settings(deadline=None, max_examples=60)
@given(clusters_and_budget())
def test_repair_fits_and_only_makes_cheaper(case):
    clusters, max_bytes = case
    space = SearchSpace(tuple(clusters), {each.layers[0]: (1, 64) for each in clusters})
    max_bytes = max(max_bytes, space.bytes_per_token(space.cheapest()))
    for choice in itertools.islice(itertools.product(*(each.pairs for each in clusters)), 20):
        repaired = space.repair(choice, max_bytes)
        assert space.bytes_per_token(repaired) <= max_bytes
        if space.bytes_per_token(choice) <= max_bytes:
            assert repaired == choice
        for each, before, after in zip(clusters, choice, repaired, strict=True):
            assert after == before or each.bytes_per_token[after] < each.bytes_per_token[before]


def test_budgets():
    k4v4 = [(PrecisionPair(4, 4), heads, size) for heads, size in SHAPES.values()]
    size = sum(heads * content_bytes(pair, head_size) for pair, heads, head_size in k4v4)
    stored = mean_bits(k4v4)[1]
    assert bytes_for_bits(stored, SHAPES) == size
    assert bytes_for_bits(stored - 1e-6, SHAPES) == size - 1
    # 100 tokens fill seven blocks of 16.
    assert bytes_for_memory(size * 112 * 3, 100, 3) == size
    assert bytes_for_memory(size * 112 * 3 - 1, 100, 3) == size - 1


def test_budget_below_everything_names_the_least():
    cheapest = [PrecisionPair(2, 2)] * 3
    with pytest.raises(ValueError, match=r"at least 2\.438 stored bits \(2\.000 nominal\).* got 2\.000 stored bits"):
        check_budget(bytes_for_bits(2.0, SHAPES), SHAPES, cheapest)
    check_budget(bytes_for_bits(2.5, SHAPES), SHAPES, cheapest)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(clusters_and_budget(), st.integers(0, 12))
def test_integer_program_without_excluded_choices(case, number):
    clusters, max_bytes = case
    within = [c for c in itertools.product(*(each.pairs for each in clusters)) if size_of(clusters, c) <= max_bytes]
    excluded = set(sorted(within, key=lambda choice: error_of(clusters, choice))[:number])
    rest = [choice for choice in within if choice not in excluded]
    choice = integer_program(clusters, max_bytes, excluded)
    if not rest:
        assert choice is None
        return
    assert choice in rest
    scale = max(error for each in clusters for error in each.additive_error.values())
    assert error_of(clusters, choice) <= min(error_of(clusters, each) for each in rest) + 1e-6 * scale


def test_refit_finds_what_a_cluster_weighs():
    small, large = PrecisionPair(2, 2), PrecisionPair(4, 4)
    own = (1.0, 1.0, 1.0, 1.0, 0.9)
    sizes = {small: 40, large: 72}
    clusters = [Cluster((i,), {small: 0.2 * error, large: 0.02 * error}, sizes) for i, error in enumerate(own)]
    weights = (1.0, 1.0, 1.0, 1.0, 8.0)

    def kl(choice):
        parts = zip(weights, clusters, choice, strict=True)
        return sum(weight * each.additive_error[pair] for weight, each, pair in parts)

    # 40 bytes of five layers, and 32 more for one of them.
    assert integer_program(clusters, 40 * 5 + 32) != (small, small, small, small, large)
    scored = [(choice, kl(choice)) for choice in itertools.product((small, large), repeat=5)][::2]
    learned = refit(clusters, scored, near=min(kl for _, kl in scored))
    assert integer_program(learned, 40 * 5 + 32) == (small, small, small, small, large)
    factors = [
        new.additive_error[small] / old.additive_error[small] for new, old in zip(learned, clusters, strict=True)
    ]
    assert factors[4] > 2 * max(factors[:4])
    assert [each.layers for each in learned] == [each.layers for each in clusters]


def test_refit_to_one_score_only_sets_the_level():
    small, large = PrecisionPair(2, 2), PrecisionPair(4, 4)
    clusters = [Cluster((layer,), {small: 0.2, large: 0.02}, {small: 40, large: 72}) for layer in range(3)]
    learned = refit(clusters, [((small, small, large), 0.84)], near=0.84)
    assert [each.additive_error[small] for each in learned] == pytest.approx([0.4] * 3)


def test_refit_finds_that_keys_weigh_more():
    """Two clusters' own errors prefer keys of 2 bits; what was scored does not."""
    pairs = [PrecisionPair.parse(name) for name in ("K2V2", "K2V4", "K4V2", "K4V4")]
    errors = dict(zip(pairs, (0.3, 0.1, 0.21, 0.01), strict=True))
    sizes = dict(zip(pairs, (40, 56, 56, 72), strict=True))
    clusters = [Cluster((layer,), errors, sizes) for layer in range(2)]
    assert integer_program(clusters, 112) == (pairs[1], pairs[1])

    def kl(choice):
        return sum({2: 0.9, 4: 0.09}[pair.k_bits] + {2: 0.2, 4: 0.001}[pair.v_bits] for pair in choice)

    scored = [((pair, pair), kl((pair, pair))) for pair in pairs]
    learned = refit(clusters, scored, near=kl((pairs[2], pairs[2])))

    assert integer_program(learned, 112) == (pairs[2], pairs[2])
    for each in learned:
        for pair in pairs:
            assert each.additive_error[pair] == pytest.approx(kl((pair,)), rel=0.1)


def test_errors_of_sides():
    pairs = [PrecisionPair.parse(name) for name in ("K2V2", "K2V4", "K4V2", "K4V4")]
    errors = dict(zip(pairs, (0.5, 0.32, 0.2, 0.02), strict=True))
    found = side_errors(Cluster((0,), errors, dict.fromkeys(pairs, 1)))
    for pair in pairs:
        assert found["K", pair.k_bits] + found["V", pair.v_bits] == pytest.approx(errors[pair], rel=1e-3)
    only = side_errors(Cluster((0,), {pairs[0]: 0.4}, {pairs[0]: 1}))
    assert only["K", 2] == pytest.approx(only["V", 2]), "nothing tells keys from values"
