"""Per layer, the precision pairs worth choosing: the Pareto front of stored bits and attention-output error.

A pair that another pair beats in error at no more stored bits cannot be part of a best setting, as far as the layer's
own error tells. KVTuner (arXiv 2502.04420, section 5.2) calls this intra-layer pruning.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvtuner_tools.calibration.artifacts import LayerSensitivity, SensitivityTable, read_artifact
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, UNQUANTIZED, PrecisionPair, content_bytes

CANDIDATES_SCHEMA = "kvtuner-candidates/1"


@dataclass(frozen=True)
class LayerCandidates:
    """The pairs that one layer may store.

    Args:
        index: decoder layer.
        num_kv_heads: KV heads, before tensor parallelism.
        head_size: numbers per head.
        sliding_window: tokens a query sees, or None for full attention.
        output_error: pair -> relative error of the attention output, from the fewest stored bits to the most.
    """

    index: int
    num_kv_heads: int
    head_size: int
    sliding_window: int | None
    output_error: Mapping[PrecisionPair, float]

    @property
    def pairs(self) -> tuple[PrecisionPair, ...]:
        return tuple(self.output_error)

    def bytes_per_token(self, pair: PrecisionPair) -> int:
        """Bytes one token takes in all KV heads of the layer, scales and minima included."""
        return self.num_kv_heads * content_bytes(pair, self.head_size)


def pareto_front(layer: LayerSensitivity) -> dict[PrecisionPair, float]:
    """The pairs that no other pair beats, with their errors, from the fewest stored bits to the most.

    A pair stays if every pair of no more stored bits has a larger error. Of pairs equal in both, the one with more
    key bits stays: keys are the more sensitive of the two.
    """

    def order(pair: PrecisionPair) -> tuple[int, float, int]:
        return content_bytes(pair, layer.head_size), layer.output_error[pair.name], -pair.k_bits

    front: dict[PrecisionPair, float] = {}
    least = float("inf")
    for pair in sorted(QUANTIZED_PAIRS, key=order):
        if (error := layer.output_error[pair.name]) < least:
            front[pair] = least = error
    return front


def prune(
    table: SensitivityTable, *, unquantized: Collection[int] = (), keep_all: bool = False
) -> tuple[LayerCandidates, ...]:
    """Candidates of every layer.

    Args:
        table: sensitivity of every layer.
        unquantized: layers that stay with vLLM's own cache: K16V16 is their only candidate.
        keep_all: keep all quantized pairs, to see what pruning buys.

    Raises:
        ValueError: an unquantized layer that the table does not have.
    """
    known = {layer.index for layer in table.layers}
    if unknown := sorted(set(unquantized) - known):
        raise ValueError(f"layers kept unquantized must cache keys and values, but got {unknown}")

    def errors(layer: LayerSensitivity) -> dict[PrecisionPair, float]:
        if layer.index in unquantized:
            return {UNQUANTIZED: 0.0}
        if not keep_all:
            return pareto_front(layer)
        by_size = sorted(QUANTIZED_PAIRS, key=lambda pair: (content_bytes(pair, layer.head_size), pair))
        return {pair: layer.output_error[pair.name] for pair in by_size}

    return tuple(
        LayerCandidates(layer.index, layer.num_kv_heads, layer.head_size, layer.sliding_window, errors(layer))
        for layer in table.layers
    )


def write_candidates(path: Path, candidates: Collection[LayerCandidates]) -> None:
    """Write the file at once or not at all."""
    layers = [
        {**_plain(layer), "output_error": {pair.name: error for pair, error in layer.output_error.items()}}
        for layer in candidates
    ]
    write_json(path, {"schema": CANDIDATES_SCHEMA, "layers": layers})


def read_candidates(path: Path) -> tuple[LayerCandidates, ...]:
    """Read what :func:`write_candidates` wrote.

    Raises:
        ValueError: not readable or of another schema.
    """
    return tuple(
        LayerCandidates(
            **{
                **layer,
                "output_error": {PrecisionPair.parse(pair): error for pair, error in layer["output_error"].items()},
            }
        )
        for layer in read_artifact(path, CANDIDATES_SCHEMA, ("layers",))["layers"]
    )


def _plain(layer: LayerCandidates) -> dict[str, Any]:
    return {field.name: getattr(layer, field.name) for field in fields(layer) if field.name != "output_error"}
