"""Means with standard errors, of questions that several settings answered."""

from collections.abc import Sequence

import numpy as np


def mean_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; of values that are 0 or 1 that of the binomial distribution."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std() / len(array) ** 0.5)


def paired_mean(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of ``ours - theirs``, of the same questions, and its standard error from the single differences."""
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / count**0.5) if count > 1 else 0.0


def ratio_stderr(sums: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """``sum(sums) / sum(counts)`` and its standard error, where each pair is one independent cluster.

    The linearized variance of a ratio estimator (Cochran, Sampling Techniques, 1977, section 6.3): tokens of one
    answer are not independent, answers are.
    """
    numerators, denominators = (np.asarray(each, dtype=np.float64) for each in (sums, counts))
    ratio = numerators.sum() / denominators.sum()
    clusters = len(numerators)
    if clusters == 1:
        return float(ratio), 0.0
    residuals = numerators - ratio * denominators
    variance = (residuals**2).sum() * clusters / (clusters - 1)
    return float(ratio), float(variance**0.5 / denominators.sum())
