"""Distances between next-token distributions, given as log-probabilities [tokens, vocabulary]."""

import numpy as np


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL(reference || other) over the tokens, in nats."""
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())


def max_difference(reference: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of two log-probabilities."""
    return float(np.abs(reference - other).max())
