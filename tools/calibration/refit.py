"""Additive errors learned from the scores so far: what the attention-output error does not know.

Equal errors of two layers' outputs need not hurt the model equally, and an error of keys weighs more or less than one
of values: on Qwen2.5-Coder-1.5B uniform K4V2 has .4 of K2V4's KL, though most layers' own errors say the reverse.
What keys and values cost does add up, nearly. So a factor is fitted to keys and values of each cluster at each number
of bits, and the integer program is asked again (docs/notes/keys-and-values-weigh-unlike.md).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from kvtuner_tools.calibration.cluster import Cluster
from kvtuner_tools.calibration.space import Choice
from vllm_kvtuner.pages.layout import PrecisionPair

PRIOR = 0.01
"""Weight of a squared relative deviation of a factor from the level of its side, against one of a predicted KL."""
LEVEL_PRIOR = 0.001
"""The same of a side's level from that of both."""
_EVEN = 1e-3
"""Pull that shares an error evenly between keys and values where pairs do not tell."""

Side = tuple[str, int]
"""Keys ("K") or values ("V"), and their bits."""


def refit(clusters: Sequence[Cluster], scored: Sequence[tuple[Choice, float]], near: float) -> tuple[Cluster, ...]:
    """The clusters with additive errors in nats: KL is about their sum.

    Least squares of relative deviations with factors that are not negative. Worse settings than ``near`` weigh less.

    Args:
        clusters: with squared attention-output errors.
        scored: settings with their mean KL; at least one whose KL and errors are above 0.
        near: KL of the best setting within the budget, about which the errors are to be right.

    On the settings of three models' searches, held-out ones near the budget are predicted within 5 to 20% (rms).
    """
    kept = [(choice, kl) for choice, kl in scored if kl > 0]
    errors = [side_errors(each) for each in clusters]
    columns = [(position, side) for position, each in enumerate(errors) for side in each]
    column_of = {column: number for number, column in enumerate(columns)}
    rows = np.zeros((len(kept), len(columns)))
    for row, (choice, _) in zip(rows, kept, strict=True):
        for position, pair in enumerate(choice):
            for side in _sides(pair):
                row[column_of[position, side]] = errors[position][side]
    kl = np.array([kl for _, kl in kept])
    weights = np.sqrt(np.minimum(1, near / kl))
    levels = _levels(rows, kl, weights, np.array([side[0] == "K" for _, side in columns]))
    prior = np.sqrt(PRIOR) * np.eye(len(columns))
    system = np.vstack([rows * levels * (weights / kl)[:, None], prior])
    factors = levels * nnls(system, np.concatenate([weights, prior.diagonal()]))[0]
    return tuple(
        replace(
            each,
            additive_error={
                pair: float(sum(factors[column_of[position, side]] * errors[position][side] for side in _sides(pair)))
                for pair in each.pairs
            },
        )
        for position, each in enumerate(clusters)
    )


def side_errors(cluster: Cluster) -> dict[Side, float]:
    """Errors of keys and of values by their bits, whose sums are nearest to those of the cluster's pairs.

    Squared errors of keys and values add up, since the two are nearly independent.
    """
    sides = sorted({side for pair in cluster.pairs for side in _sides(pair)})
    errors = np.array(list(cluster.additive_error.values()))
    if not errors.any():
        return dict.fromkeys(sides, 0.0)
    # Relative deviations, so that errors of many bits, which are small, are right too.
    scale = 1 / np.maximum(errors, 1e-3 * errors.max())
    system = np.array([[float(side in _sides(pair)) for side in sides] for pair in cluster.pairs]) * scale[:, None]
    even = _EVEN * np.eye(len(sides)) * scale.min()
    found = nnls(np.vstack([system, even]), np.concatenate([errors * scale, np.zeros(len(sides))]))[0]
    return dict(zip(sides, found.tolist(), strict=True))


def _levels(rows: np.ndarray, kl: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Nats of an error of 1, for each column: one level for keys and one for values, near each other."""
    both = float(np.median(kl / rows.sum(1)))
    sums = np.stack([rows[:, keys].sum(1), rows[:, ~keys].sum(1)], axis=1)
    prior = np.sqrt(LEVEL_PRIOR) * np.eye(2)
    system = np.vstack([both * sums * (weights / kl)[:, None], prior])
    of_keys, of_values = both * nnls(system, np.concatenate([weights, prior.diagonal()]))[0]
    return np.where(keys, of_keys, of_values)


def _sides(pair: PrecisionPair) -> tuple[Side, Side]:
    return ("K", pair.k_bits), ("V", pair.v_bits)
