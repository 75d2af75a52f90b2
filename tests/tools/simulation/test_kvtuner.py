"""Our own formats: simulated, they are what pages give back, and what served attention reads."""

from dataclasses import replace

import pytest
import torch

from kvtuner_tools.simulation.cache import attend
from kvtuner_tools.simulation.kvtuner import Kvtuner, _best_ranges, _Statics
from tests.helpers.paged_cache import empty_cache, make_layout, random_table, random_transforms, slots_of, starts_of
from vllm_kvtuner.kernels.contract import AttentionShape, Pages, Queries, Segment, Span, WindowRows
from vllm_kvtuner.kernels.reference.attention import paged_attention_ref
from vllm_kvtuner.kernels.reference.rows import reshape_and_cache_ref
from vllm_kvtuner.kernels.reference.window_attention import window_attention_ref
from vllm_kvtuner.pages.codes import UniformCodes
from vllm_kvtuner.pages.feedback import RoundFeedback, triangular_factors
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError

from .conftest import GROUP, HEADS, SIZE, make_rows

TOLERANCE = 5e-5
"""Of outputs near 1: transforms are undone on rows here, and folded into queries there, in fp32."""
WINDOW, SINKS = 64, 4


@pytest.fixture
def shape() -> ModelShape:
    return ModelShape(name="test", architecture="LlamaForCausalLM", layers=(LayerShape(HEADS, SIZE),))


def feedback() -> RoundFeedback:
    root = torch.randn(HEADS, SIZE, SIZE, dtype=torch.float64)
    metric = root @ root.mT + SIZE * torch.eye(SIZE, dtype=torch.float64)
    return RoundFeedback(triangular_factors(metric), {2: (0.8, 0.95), 4: (0.9, 1.0)})


@pytest.mark.quick(1)
@pytest.mark.parametrize("pair", ["K8V4", "K4V4", "K4V2", "K2V2"])
def test_simulated_attention_is_served_attention(shape, layer, rows, pair):
    """All queries of a text over packed pages and a window, by the reference that defines the kernels."""
    torch.manual_seed(0)
    transforms = random_transforms(
        HEADS, SIZE, torch.device("cpu"), layer.rotary, 1.0, True, key_hadamard=True, value_hadamard=True
    )
    transforms = replace(transforms, key_feedback=feedback(), value_feedback=feedback(), range_search=True)
    method = Kvtuner(pair, shape)

    simulated = attend(layer, rows, method.view(layer, _Statics(transforms, {}), rows))

    torch.testing.assert_close(simulated, served(pair, layer, rows, transforms), atol=TOLERANCE, rtol=0)


def served(pair, layer, rows, transforms) -> torch.Tensor:
    count, device = rows.num_tokens, torch.device("cpu")
    layout = make_layout(pair, SIZE)
    table, num_blocks = random_table(layout, [count], device)
    slots = slots_of(table, [count], layout.block_size)
    pages = Pages(empty_cache(layout, num_blocks, HEADS, device), layout, transforms)
    window = WindowRows(torch.zeros(num_blocks, HEADS, layout.block_size, 2 * SIZE), slots)
    reshape_and_cache_ref(rows.key, rows.value, slots, rows.positions, pages, window)
    queries = Queries(table, torch.tensor([count], dtype=torch.int32), starts_of([count], device), count)
    attention = AttentionShape(HEADS * GROUP, HEADS, SIZE, layer.scale)
    seen = Segment.into(torch.empty_like(rows.query))
    span = Span(skip_newest=WINDOW, skip_first=SINKS)
    paged_attention_ref(rows.query, queries, pages, attention, span, seen.output, seen.lse)
    window_attention_ref(rows.query, queries, window.kv_cache, attention, span, seen.output, seen.lse)
    return seen.output


def test_bits_are_those_of_the_page(shape, layer, rows):
    method = Kvtuner("K4V2", shape)
    storage = method.view(
        layer, method.prepare(replace(layer, weights=zero_weights, query_energy=even_energy), ()), rows
    ).storage
    layout = make_layout("K4V2", SIZE)
    assert storage.bits == pytest.approx(8 * layout.content_bytes / (2 * SIZE))
    assert (storage.exact_tokens, storage.beside) == (WINDOW + SINKS, True)


def zero_weights() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    empty = torch.zeros(HEADS * SIZE, 8)
    return empty, empty, torch.zeros(HEADS * SIZE)


def even_energy() -> tuple[torch.Tensor, bool]:
    """By which feedback rounds to the nearest."""
    return torch.ones(HEADS, SIZE), True


def test_feedback_of_weights_takes_error_off_what_queries_read(shape, layer, rows):
    energy = torch.tensor([4.0, 0.1] * (SIZE // 4)).repeat(HEADS, 2)  # equal within a RoPE pair
    errors = []
    for given in (even_energy, lambda: (energy, True)):
        known = replace(layer, weights=zero_weights, query_energy=given)
        method = Kvtuner("K4V4", shape)
        view = method.view(known, method.prepare(known, ()), rows)
        errors.append(float((energy * (view.key - rows.key).square()).mean()))
    assert errors[1] < 0.7 * errors[0]


def test_three_bits(shape, layer, rows):
    """Between two bits and four, with more of both."""
    errors = []
    for pair in ("K2V2", "K3V2", "K3V3", "K4V3"):
        method = Kvtuner(f"K4V4:{pair}", shape)
        statics = method.prepare(replace(layer, weights=zero_weights, query_energy=even_energy), ())
        view = method.view(layer, statics, rows)
        errors.append((float((view.key - rows.key).square().mean()), float((view.value - rows.value).square().mean())))
    assert errors[0][0] > 3 * errors[1][0] > 0 and errors[0][1] == errors[1][1]
    assert errors[1][0] == errors[2][0] > 3 * errors[3][0] and errors[1][1] > 3 * errors[2][1]
    with pytest.raises(ValueError, match="must have codes of 2, 3, 4 or 8 bits, but got K5V3"):
        Kvtuner("K4V4:K5V3", shape)
    with pytest.raises(ProfileError):
        Kvtuner("K5V5", shape)


def test_ranges_of_three_bits_are_the_best():
    torch.manual_seed(1)
    known, rows = feedback(), make_rows(200).value
    chosen = _best_ranges(known, [rows])

    def error(ranges: tuple[float, ...]) -> float:
        given = RoundFeedback(known.factors, {3: ranges})
        return float(given.weighted_error(rows - UniformCodes(3).round_trip(rows, feedback=given)).sum())

    assert error(chosen) <= min(error((0.64, 0.73, 0.83)), error((0.86, 0.97, 1.08)))
