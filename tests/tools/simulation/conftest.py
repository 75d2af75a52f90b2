"""A layer and rows for simulated caches."""

import pytest
import torch

from kvtuner_tools.simulation.cache import Layer, Rows
from tests.helpers.capture import one_thread, rotary_table  # noqa: F401

HEADS, GROUP, SIZE = 2, 2, 32

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def layer() -> Layer:
    rotary = rotary_table(1024, SIZE)
    return Layer(0, HEADS * GROUP, HEADS, SIZE, SIZE**-0.5, rotary)


@pytest.fixture
def rows() -> Rows:
    """Of 300 tokens, keys with an outlying channel."""
    return make_rows(300)


def make_rows(num_tokens: int, seed: int = 0, prompt_tokens: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_tokens, HEADS * GROUP, SIZE, generator=generator)
    key, value, key_gradient, value_gradient = (
        torch.randn(num_tokens, HEADS, SIZE, generator=generator) for _ in range(4)
    )
    key[..., 3] = 4 * key[..., 3] + 6
    return Rows(query, key, value, prompt_tokens, key_gradient, value_gradient)
