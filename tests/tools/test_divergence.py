"""KL divergence and its company, against the definitions."""

import math

import numpy as np
import pytest
import torch

from kvtuner_tools.divergence import ROWS, TokenScores, compare

VOCABULARY = 37


def naive(reference: np.ndarray, logits: np.ndarray, targets: np.ndarray) -> TokenScores:
    """The definitions, in float64 and one position at a time."""
    columns: list[list[float]] = [[], [], [], []]
    for a, b, target in zip(reference.astype(np.float64), logits.astype(np.float64), targets, strict=True):
        p, q = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        values = (sum(p * np.log(p / q)), -math.log(p[target]), -math.log(q[target]), p.argmax() == q.argmax())
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return TokenScores(*map(np.array, columns))


@pytest.mark.parametrize("rows", [1, ROWS, 2 * ROWS + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compare_equals_the_definitions(rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    reference = (4 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)
    logits = (reference.float() + torch.randn(rows, VOCABULARY, generator=generator)).to(dtype)
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)

    scores = compare(reference, logits, targets)

    expected = naive(reference.float().numpy(), logits.float().numpy(), targets.numpy())
    for name in ("kl", "nll_reference", "nll"):
        np.testing.assert_allclose(getattr(scores, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scores.agree, expected.agree)


def test_compare_of_equal_logits_is_exactly_zero() -> None:
    logits = torch.randn(ROWS + 3, VOCABULARY)

    scores = compare(logits, logits.clone(), torch.zeros(ROWS + 3, dtype=torch.int64))

    assert not scores.kl.any()
    assert scores.agree.all()


def test_summary() -> None:
    scores = TokenScores(
        kl=np.array([0.0, 0.1, 0.2, 0.5], np.float32),
        nll_reference=np.log(np.array([2.0, 2.0, 8.0, 8.0], np.float32)),
        nll=np.log(np.array([3.0, 3.0, 27.0, 27.0], np.float32)),
        agree=np.array([True, True, True, False]),
    )

    summary = TokenScores.join([scores, scores]).summary()

    assert summary == {
        "kl_mean": pytest.approx(0.2),
        "kl_stderr": pytest.approx(scores.kl.std() / 8**0.5),
        "kl_p99": pytest.approx(0.5),
        "top1_agreement": 0.75,
        "perplexity": pytest.approx(9.0),
        "perplexity_reference": pytest.approx(4.0),
    }
