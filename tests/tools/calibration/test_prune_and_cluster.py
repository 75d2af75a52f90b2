"""Candidates of a layer, and layers that share a decision."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtuner_tools.calibration.artifacts import PAIR_NAMES
from kvtuner_tools.calibration.cluster import LARGEST_SHARE, cluster
from kvtuner_tools.calibration.prune import pareto_front, prune
from tests.helpers.calibration import sensitivity_table
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, UNQUANTIZED, PrecisionPair, content_bytes

# Few distinct values, so that ties are common.
ERRORS = st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0])
NINE_ERRORS = st.tuples(*[ERRORS] * 9).map(lambda errors: dict(zip(PAIR_NAMES, errors, strict=True)))


def layer_with(errors):
    return replace(sensitivity_table(1).layers[0], output_error=errors)


@settings(deadline=None, max_examples=60)
@given(NINE_ERRORS)
def test_front_by_brute_force(errors):
    def cost(pair):
        return content_bytes(pair, 64), errors[pair.name]

    def beats(a, b):
        better = cost(a)[0] <= cost(b)[0] and cost(a)[1] <= cost(b)[1] and cost(a) != cost(b)
        return better or (cost(a) == cost(b) and a.k_bits > b.k_bits)

    expected = {b for b in QUANTIZED_PAIRS if not any(beats(a, b) for a in QUANTIZED_PAIRS)}
    front = pareto_front(layer_with(errors))
    assert set(front) == expected
    assert front == {pair: errors[pair.name] for pair in front}
    sizes = [content_bytes(pair, 64) for pair in front]
    assert sizes == sorted(set(sizes))


def test_equal_pairs_keep_the_one_with_more_key_bits():
    errors = dict.fromkeys(PAIR_NAMES, 1.0) | {"K2V4": 0.5, "K4V2": 0.5}
    assert [pair.name for pair in pareto_front(layer_with(errors))] == ["K2V2", "K4V2"]


def test_unquantized_layers_have_one_candidate():
    candidates = prune(sensitivity_table(4), unquantized=(1,))
    assert candidates[1].output_error == {UNQUANTIZED: 0.0}
    assert all(layer.pairs != (UNQUANTIZED,) for layer in candidates if layer.index != 1)


def test_unknown_unquantized_layer():
    with pytest.raises(ValueError, match=r"must cache keys and values, but got \[9\]"):
        prune(sensitivity_table(4), unquantized=(9,))


def test_all_pairs_can_be_kept():
    assert all(set(layer.pairs) == set(QUANTIZED_PAIRS) for layer in prune(sensitivity_table(3), keep_all=True))


@st.composite
def layers_of_two_shapes(draw):
    number = draw(st.integers(1, 20))
    layers = []
    for index, layer in enumerate(sensitivity_table(number, seed=draw(st.integers(0, 5))).layers):
        scale = draw(st.floats(0.2, 5.0))
        layers.append(
            replace(
                layer,
                index=index,
                sliding_window=draw(st.sampled_from([None, 128])),
                output_error={pair: scale * error for pair, error in layer.output_error.items()},
            )
        )
    return layers


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(layers_of_two_shapes(), st.floats(1.0, 4.0))
def test_cluster_invariants(layers, factor):
    candidates = prune(replace(sensitivity_table(1), layers=tuple(layers)))
    clusters = cluster(candidates, factor)
    assert sorted(layer for each in clusters for layer in each.layers) == [layer.index for layer in layers]
    by_index = {layer.index: layer for layer in candidates}
    for each in clusters:
        members = [by_index[layer] for layer in each.layers]
        assert len(members) <= max(1, len(layers) // LARGEST_SHARE)
        assert len({(layer.sliding_window, layer.num_kv_heads, layer.head_size, layer.pairs) for layer in members}) == 1
        for pair in each.pairs:
            errors = [layer.output_error[pair] for layer in members]
            assert max(errors) <= min(errors) * factor * (1 + 1e-9)
            assert each.additive_error[pair] == pytest.approx(sum(error**2 for error in errors))
            assert each.bytes_per_token[pair] == sum(2 * content_bytes(pair, 64) for _ in members)


def test_kinds_of_layers_are_found():
    table = sensitivity_table(48)
    clusters = cluster(prune(table))
    assert all(len({layer % 3 for layer in each.layers}) == 1 for each in clusters)
    assert len(clusters) < 24


def test_factor_one_leaves_every_layer_alone():
    layers = tuple(replace(sensitivity_table(1).layers[0], index=index) for index in range(16))
    candidates = prune(replace(sensitivity_table(1), layers=layers))
    assert len(cluster(candidates, 1.0)) == 16
    assert len(cluster(candidates, 1.01)) == 8


@pytest.mark.parametrize("factor", [0.9, float("nan"), float("inf")])
def test_factor_out_of_range(factor):
    with pytest.raises(ValueError, match="at least 1"):
        cluster(prune(sensitivity_table(2)), factor)


def test_candidates_are_ordered_from_few_bits():
    for layer in prune(sensitivity_table(3), keep_all=True):
        assert layer.pairs[0] == PrecisionPair(2, 2) and layer.pairs[-1] == PrecisionPair(8, 8)
