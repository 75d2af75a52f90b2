"""The choice of pairs that is exact if errors add up over layers: a multiple-choice knapsack, solved by HiGHS."""

from collections.abc import Collection, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from kvtuner_tools.calibration.cluster import Cluster
from vllm_kvtuner.pages.layout import PrecisionPair


def integer_program(
    clusters: Sequence[Cluster], max_bytes: int, excluded: Collection[tuple[PrecisionPair, ...]] = ()
) -> tuple[PrecisionPair, ...] | None:
    """A pair per cluster with the least sum of additive errors within the budget.

    Args:
        clusters: with their candidates.
        max_bytes: bytes per token over all layers.
        excluded: choices that are not wanted.

    Returns:
        None where no setting is within the budget.

    Raises:
        RuntimeError: the solver stopped without an optimum.
    """
    columns = [(position, pair) for position, each in enumerate(clusters) for pair in each.pairs]
    errors = np.array([clusters[position].additive_error[pair] for position, pair in columns])
    sizes = np.array([clusters[position].bytes_per_token[pair] for position, pair in columns], dtype=float)
    rows = np.array([position for position, _ in columns])
    one_each = csr_array((np.ones(len(columns)), (rows, np.arange(len(columns)))), shape=(len(clusters), len(columns)))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None, :] / max_bytes, -np.inf, 1)]
    if excluded:
        # At least one cluster must differ from each of them.
        same = [[float(choice[position] == pair) for position, pair in columns] for choice in sorted(excluded)]
        constraints.append(LinearConstraint(csr_array(same), -np.inf, len(clusters) - 1))
    result = milp(
        # HiGHS's tolerances are absolute: errors of 1e-6 would all be none to it.
        errors / errors.max() if errors.max() > 0 else errors,
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:  # infeasible
        return None
    if result.x is None or result.status != 0:
        raise RuntimeError(f"the integer program must have an optimum, but the solver says: {result.message}")
    chosen = {position: pair for (position, pair), taken in zip(columns, result.x, strict=True) if taken > 0.5}
    return tuple(chosen[position] for position in range(len(clusters)))
