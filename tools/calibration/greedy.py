"""The greedy choice of pairs: spend each stored bit where it removes most error."""

from collections.abc import Sequence

from kvtuner_tools.calibration.cluster import Cluster
from vllm_kvtuner.pages.layout import PrecisionPair


def greedy(clusters: Sequence[Cluster], max_bytes: int) -> tuple[PrecisionPair, ...] | None:
    """A pair per cluster, taking errors as additive.

    Starts from the fewest stored bits and takes, while it fits, the one change of one cluster that removes most error
    per byte; of equal ones the first cluster's, then the smaller.

    Args:
        clusters: with candidates ordered from the fewest stored bits to the most.
        max_bytes: bytes per token over all layers.

    Returns:
        None where even the fewest stored bits are over the budget.
    """
    chosen = [each.pairs[0] for each in clusters]
    spent = sum(each.bytes_per_token[pair] for each, pair in zip(clusters, chosen, strict=True))
    if spent > max_bytes:
        return None
    while True:
        best: tuple[float, int, PrecisionPair] | None = None
        for position, each in enumerate(clusters):
            now = chosen[position]
            for pair in each.pairs:
                more = each.bytes_per_token[pair] - each.bytes_per_token[now]
                less_error = each.additive_error[now] - each.additive_error[pair]
                if more <= 0 or less_error <= 0 or spent + more > max_bytes:
                    continue
                if best is None or less_error / more > best[0]:
                    best = less_error / more, position, pair
        if best is None:
            return tuple(chosen)
        _, position, pair = best
        sizes = clusters[position].bytes_per_token
        spent += sizes[pair] - sizes[chosen[position]]
        chosen[position] = pair
