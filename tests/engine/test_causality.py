"""Attention that is not causal is refused before weights load."""

from types import SimpleNamespace

import pytest

from vllm_kvtuner.engine.causality import causality, pictures_read_back
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.profile import Profile

RULE = "p: attend_cached_prefill must be false"


def config(**changes):
    model = {"model": "toy", "is_mm_prefix_lm": False}
    model |= {key: changes.pop(key) for key in list(changes) if key in model}
    attention = SimpleNamespace(use_non_causal=changes.pop("use_non_causal", False))
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        attention_config=attention,
        diffusion_config=None,
        speculative_config=changes.pop("speculative_config", None),
    )


def test_causal_models_pass():
    assert causality(config()) == []


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"use_non_causal": True}, "use_non_causal=True, which toy needs"),
    ],
    ids=["per request"],
)
def test_configurations_that_are_refused(changes, got):
    (problem,) = causality(config(**changes))
    assert " must " in problem and got in problem.partition(", but got ")[2]


def test_pictures_that_attend_in_both_directions():
    """Served, but not by verifications, which are decodes of several tokens, nor read back."""
    pictures = config(is_mm_prefix_lm=True)
    assert causality(pictures) == []
    (problem,) = causality(config(is_mm_prefix_lm=True, speculative_config=SimpleNamespace(method="ngram")))
    assert problem.endswith("but got toy with ngram")
    shape = ModelShape("toy", "ToyForCausalLM", (LayerShape(2, 64),))
    for attend in (False, True):
        resolved = Profile("p", None, PrecisionPair(8, 8), attend_cached_prefill=attend).resolve(shape)
        assert [line[: len(RULE)] for line in pictures_read_back(pictures, resolved)] == [RULE] * attend
        assert pictures_read_back(config(), resolved) == ()


def test_diffusion_is_refused():
    refused = config()
    refused.diffusion_config = SimpleNamespace()
    (problem,) = causality(refused)
    assert "but got a diffusion_config" in problem and "toy" in problem
