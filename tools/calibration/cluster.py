"""Layers that share one decision, so that the search has few of them to take.

KVTuner (arXiv 2502.04420, section 5.3) lets layers with the same candidate pairs and like sensitivity share a decision.
Here two layers are alike if, for every candidate pair, their errors differ by at most a factor. Hierarchical clustering
with complete linkage over the largest difference of log errors holds exactly this within every cluster, needs no number
of clusters, and, unlike density or silhouette criteria, also leaves a single odd layer as the cluster that it is. Where
many layers are alike, they are split by their errors into clusters of at most an eighth of all layers: a decision that
moves more of them at once could not use up a budget.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from kvtuner_tools.calibration.artifacts import read_artifact
from kvtuner_tools.calibration.prune import LayerCandidates
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.problems import format_layers

CLUSTERS_SCHEMA = "kvtuner-clusters/1"
DEFAULT_FACTOR = 1.5
"""Largest ratio between two layers' errors of one pair within a cluster."""
LARGEST_SHARE = 8
"""No cluster holds more than one in so many layers."""
_LEAST_ERROR = 1e-9
"""Errors are compared by their logarithms; below this, two errors are equally none."""


@dataclass(frozen=True)
class Cluster:
    """Layers of one shape that store the same pair.

    Args:
        layers: decoder layers, in order.
        additive_error: candidate pair -> sum over the layers of the squared relative attention-output error, from the
            fewest stored bits to the most. Squared, because errors of different layers are nearly independent, and KL
            divergence grows with the square of a small disturbance: sums estimate a setting's KL up to a factor.
        bytes_per_token: candidate pair -> bytes one token takes in all the layers.
    """

    layers: tuple[int, ...]
    additive_error: Mapping[PrecisionPair, float]
    bytes_per_token: Mapping[PrecisionPair, int]

    @property
    def pairs(self) -> tuple[PrecisionPair, ...]:
        return tuple(self.additive_error)

    @property
    def name(self) -> str:
        """Parameter name in the search: its layers."""
        return f"layers {format_layers(self.layers)}"

    def to_plain(self) -> dict[str, Any]:
        """The cluster as JSON's types; :meth:`from_plain` reads it back."""
        return {
            "layers": list(self.layers),
            "additive_error": {pair.name: error for pair, error in self.additive_error.items()},
            "bytes_per_token": {pair.name: size for pair, size in self.bytes_per_token.items()},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "Cluster":
        return cls(
            tuple(plain["layers"]),
            {PrecisionPair.parse(pair): error for pair, error in plain["additive_error"].items()},
            {PrecisionPair.parse(pair): size for pair, size in plain["bytes_per_token"].items()},
        )


def cluster(candidates: Sequence[LayerCandidates], factor: float = DEFAULT_FACTOR) -> tuple[Cluster, ...]:
    """Group layers; ordered by their first layer.

    Layers only share a cluster if KV heads, head size, window and candidate pairs are the same.

    Args:
        candidates: of every layer.
        factor: largest ratio of two layers' errors of one pair within a cluster, at least 1; with exactly 1, every
            layer decides alone.

    Raises:
        ValueError: a factor below 1.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"the factor within which errors are alike must be at least 1, but got {factor}")
    alike: dict[tuple[object, ...], list[LayerCandidates]] = {}
    for layer in candidates:
        key = (layer.num_kv_heads, layer.head_size, layer.sliding_window, layer.pairs)
        alike.setdefault(key, []).append(layer)
    largest = max(1, len(candidates) // LARGEST_SHARE)
    groups = [group for layers in alike.values() for group in _split(layers, factor, largest)]
    return tuple(sorted((_cluster(group) for group in groups), key=lambda each: each.layers))


def _split(layers: list[LayerCandidates], factor: float, largest: int) -> list[list[LayerCandidates]]:
    if len(layers) == 1 or factor == 1:
        return [[layer] for layer in layers]
    errors = np.log(np.maximum([list(layer.output_error.values()) for layer in layers], _LEAST_ERROR))
    labels = fcluster(linkage(errors, method="complete", metric="chebyshev"), math.log(factor), criterion="distance")
    groups = []
    for label in sorted(set(labels)):
        members = sorted(np.flatnonzero(labels == label), key=lambda member: (errors[member].mean(), member))
        parts = np.array_split(members, -(-len(members) // largest))
        groups += [[layers[member] for member in sorted(part)] for part in parts]
    return groups


def _cluster(layers: list[LayerCandidates]) -> Cluster:
    pairs = layers[0].pairs
    return Cluster(
        layers=tuple(layer.index for layer in layers),
        additive_error={pair: sum(layer.output_error[pair] ** 2 for layer in layers) for pair in pairs},
        bytes_per_token={pair: sum(layer.bytes_per_token(pair) for layer in layers) for pair in pairs},
    )


def write_clusters(path: Path, clusters: Collection[Cluster]) -> None:
    """Write the file at once or not at all."""
    write_json(path, {"schema": CLUSTERS_SCHEMA, "clusters": [each.to_plain() for each in clusters]})


def read_clusters(path: Path) -> tuple[Cluster, ...]:
    """Read what :func:`write_clusters` wrote.

    Raises:
        ValueError: not readable or of another schema.
    """
    return tuple(map(Cluster.from_plain, read_artifact(path, CLUSTERS_SCHEMA, ("clusters",))["clusters"]))
