"""Speculation as it is written, as vLLM reads it, and what shows that an engine did something else."""

import random

import pytest

from kvtuner_tools.bench.speculation import Speculation, speculated


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3:0.7", Speculation(3, 0.7)),
        (" 1:1", Speculation(1, 1.0)),
        ("15:0", Speculation(15, 0.0)),
        ("7:.0001", Speculation(7, 0.0001)),
    ],
)
def test_read_and_written_back(text, expected):
    assert Speculation.parse(text) == expected
    assert Speculation.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["3", "3:", ":0.7", "0:0.7", "16:0.7", "3:1.01", "3:-0.1", "3:nan", "3:1e-5", "3:2.5"])
def test_speculation_of_another_form(text):
    with pytest.raises(ValueError, match=r"DRAFTED:ACCEPTANCE, such as 3:0.7, of 1 to 15 tokens and 0 to 1, but got"):
        Speculation.parse(text)


@pytest.mark.parametrize("speculation", [Speculation(3, 0.7), Speculation(1, 0.0), Speculation(15, 1.0)], ids=str)
def test_vllm_accepts_every_drafted_token_with_this_probability(speculation):
    from vllm.config import SpeculativeConfig
    from vllm.v1.spec_decode.utils import unconditional_to_conditional_rates

    config = SpeculativeConfig(**speculation.config)

    assert config.rejection_sample_method == "synthetic"
    assert config.num_speculative_tokens == speculation.drafted
    rates = unconditional_to_conditional_rates(config.synthetic_acceptance_rates)
    assert rates == pytest.approx([speculation.acceptance] * speculation.drafted)


def mean_tokens(speculation: Speculation, samples: int, seed: int) -> float:
    """What requests get on average if drafted tokens are accepted by lot."""
    numbers = random.Random(seed)
    tokens = 0
    for _ in range(samples):
        tokens += 1
        for _ in range(speculation.drafted):
            if numbers.random() >= speculation.acceptance:
                break
            tokens += 1
    return tokens / samples


@pytest.mark.parametrize("speculation", [Speculation(3, 0.7), Speculation(1, 0.5), Speculation(7, 0.9)], ids=str)
def test_engines_that_speculate_as_asked(speculation):
    samples = 64 * 64
    assert mean_tokens(speculation, 100_000, 0) == pytest.approx(speculation.tokens_per_step, rel=0.01)
    for seed in range(20):
        assert speculation.problem(mean_tokens(speculation, samples, seed), samples) is None


def test_engines_that_speculate_otherwise():
    asked, samples = Speculation(3, 0.7), 64 * 64
    others = {"fewer": Speculation(2, 0.7), "more": Speculation(4, 0.7), "less": Speculation(3, 0.6)}
    for other in others.values():
        assert asked.problem(mean_tokens(other, samples, 0), samples)
    assert asked.problem(1.0, samples) == (
        "with --speculate 3:0.7 a request must get 2.533 tokens a step within 0.107, but got 1.000"
    )
    # Without chance, every step counts.
    assert Speculation(3, 1.0).problem(4.0, 64) is None
    assert Speculation(3, 1.0).problem(3.97, 64)
    assert Speculation(3, 0.0).problem(1.02, 64)


def test_titles():
    assert speculated({"speculate": "3:0.7"}) == ", 3 drafted tokens a step, each accepted with probability 0.7"
    assert speculated({"speculate": None}) == speculated({}) == ""
