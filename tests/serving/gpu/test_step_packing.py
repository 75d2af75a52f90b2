"""Tokens that are packed at a step's end, in CUDA graphs of whole steps, leave what tokens packed at once leave.

Bit by bit: kernels of both are the same but for the store, whose arithmetic is one.
"""

import pytest
import torch

from tests.helpers.gpu_engine import Engine, attention_layers
from tests.serving.cpu.test_step_packing import LATE_LAYERS, N_GRAM, profile
from vllm_kvtuner.attention import impl

__all__ = ["profile"]

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("in_process")]

ANSWER = 80
"""Tokens of an answer: more than the window's, so that steps read what earlier ones have packed."""


def live(model, profile, prompts, options):
    """Answers, all layers' caches without the null block, and how many layers pack late."""

    def caches(worker):
        return {name: layer.kv_cache[1:].cpu().contiguous() for name, layer in attention_layers(worker).items()}

    def late(worker):
        layers = (getattr(layer, "impl", None) for layer in attention_layers(worker).values())
        return sum(getattr(layer, "_late", None) is not None for layer in layers)

    with Engine(model, profile, **options) as engine:
        answers = [engine.ask(prompts, ANSWER)[0] for _ in range(2)]
        (count,), (kept,) = engine.on_ranks(late), engine.on_ranks(caches)
    return answers, kept, count


@pytest.mark.parametrize(
    "options",
    [{}, {"enforce_eager": True}, {"speculative_config": N_GRAM}],
    ids=["graphs", "eager", "drafts"],
)
def test_pages_are_those_of_a_store_at_once(llama, prompts, profile, options, monkeypatch):
    """Prefix cache, chunks and a batch that shrinks included; padded graphs hold tokens without a slot."""
    prompts = [*prompts, (prompts[1] * 60)[:200]]  # in which an n-gram is found again
    late = live(llama, profile, prompts, options)
    monkeypatch.setattr(impl, "step_packing", lambda config: None)
    once = live(llama, profile, prompts, options)
    assert (late[2], once[2]) == (LATE_LAYERS, 0)
    assert late[0] == once[0]
    assert late[1].keys() == once[1].keys()
    for name, cache in late[1].items():
        assert torch.equal(cache.view(torch.uint8), once[1][name].view(torch.uint8)), name
