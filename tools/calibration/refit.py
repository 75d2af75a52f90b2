"""Additive errors learned from the scores so far: what the attention-output error does not know of a layer's weight.

Equal errors of two layers' outputs need not hurt the model equally. From settings with their KL divergence, one factor
per cluster is fitted, so that the integer program can be asked again.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from kvtuner_tools.calibration.cluster import Cluster
from kvtuner_tools.calibration.space import Choice

PRIOR = 0.1
"""Weight of a squared relative deviation of a factor from the others' level, against one of a predicted KL."""


def refit(clusters: Sequence[Cluster], scored: Sequence[tuple[Choice, float]]) -> tuple[Cluster, ...]:
    """The clusters with additive errors in nats: KL is about their sum.

    Least squares of relative deviations, those of good settings weighing more, with factors that are not negative.

    Args:
        clusters: with squared attention-output errors.
        scored: settings with their mean KL; at least one whose KL and errors are above 0.
    """
    kept = [(choice, kl) for choice, kl in scored if kl > 0]
    errors = np.array(
        [[each.additive_error[pair] for each, pair in zip(clusters, choice, strict=True)] for choice, _ in kept]
    )
    kl = np.array([kl for _, kl in kept])
    level = float(np.median(kl / errors.sum(1)))
    prior = np.sqrt(PRIOR) * np.eye(len(clusters))
    # What matters is which of the good settings is better.
    weights = kl.min() / kl
    system = np.vstack([level * errors * (weights / kl)[:, None], prior])
    target = np.concatenate([weights, prior.diagonal()])
    factors = level * nnls(system, target)[0]
    return tuple(
        replace(each, additive_error={pair: factor * error for pair, error in each.additive_error.items()})
        for each, factor in zip(clusters, factors.tolist(), strict=True)
    )
