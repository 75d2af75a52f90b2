"""The settings that the search chooses from, and the budget that they must keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kvtuner_tools.calibration.cluster import Cluster
from vllm_kvtuner.pages.layout import (
    BLOCK_SIZE_MULTIPLE,
    QUANTIZED_PAIRS,
    UNQUANTIZED,
    PrecisionPair,
    content_bytes,
    mean_bits,
)

Choice = tuple[PrecisionPair, ...]
"""A pair for each cluster, in the clusters' order."""


def bf16_bytes(shapes: Mapping[int, tuple[int, int]]) -> int:
    """Bytes one token takes unquantized; ``shapes`` gives each layer's KV heads and head size."""
    return sum(heads * content_bytes(UNQUANTIZED, head_size) for heads, head_size in shapes.values())


def bytes_for_bits(max_bits: float, shapes: Mapping[int, tuple[int, int]]) -> int:
    """Most bytes per token at a mean of ``max_bits`` stored bits."""
    return int(Fraction(str(max_bits)) * bf16_bytes(shapes) / 16)


def bytes_for_memory(memory: int, context: int, concurrency: int) -> int:
    """Most bytes per token with which ``concurrency`` requests of ``context`` tokens fit in ``memory`` bytes.

    Every request fills whole blocks of the smallest block size. Layers with a sliding window count as if they kept the
    whole context, so that their settings fit however vLLM groups the layers.
    """
    tokens = -(-context // BLOCK_SIZE_MULTIPLE) * BLOCK_SIZE_MULTIPLE
    return memory // (tokens * concurrency)


@dataclass(frozen=True)
class SearchSpace:
    """All settings: one of its pairs for each cluster.

    Args:
        clusters: the decisions.
        shapes: KV heads and head size of every layer in them.
    """

    clusters: tuple[Cluster, ...]
    shapes: Mapping[int, tuple[int, int]]

    def pairs(self, choice: Choice) -> dict[int, PrecisionPair]:
        """The pair of every layer, in the model's order."""
        by_layer = {layer: pair for each, pair in zip(self.clusters, choice, strict=True) for layer in each.layers}
        return dict(sorted(by_layer.items()))

    def bytes_per_token(self, choice: Choice) -> int:
        return sum(each.bytes_per_token[pair] for each, pair in zip(self.clusters, choice, strict=True))

    def bytes_of(self, pairs: Mapping[int, PrecisionPair]) -> int:
        """Bytes one token takes over all layers with these pairs."""
        return sum(heads * content_bytes(pairs[layer], size) for layer, (heads, size) in self.shapes.items())

    def bits(self, pairs: Mapping[int, PrecisionPair]) -> tuple[float, float]:
        """Mean nominal and stored bits."""
        return mean_bits((pair, *self.shapes[layer]) for layer, pair in pairs.items())

    def stored_bits(self, size: int) -> float:
        """Mean stored bits of ``size`` bytes per token."""
        return 16 * size / bf16_bytes(self.shapes)

    def budget_bits(self, max_bytes: int) -> tuple[float, float]:
        """Nominal and stored bits of a setting that takes just ``max_bytes`` per token; scales take the same in all."""
        nominal, stored = self.bits(self.pairs(self.cheapest()))
        return self.stored_bits(max_bytes) - stored + nominal, self.stored_bits(max_bytes)

    def cheapest(self) -> Choice:
        return tuple(each.pairs[0] for each in self.clusters)

    def uniform(self, pair: PrecisionPair) -> dict[int, PrecisionPair]:
        """The pair in every layer that is not kept unquantized."""
        pinned = {layer for each in self.clusters if each.pairs == (UNQUANTIZED,) for layer in each.layers}
        return {layer: UNQUANTIZED if layer in pinned else pair for layer in sorted(self.shapes)}

    def choice_of(self, pairs: Mapping[int, PrecisionPair]) -> Choice | None:
        """The choice that gives these pairs, or None where a cluster does not have its pair or would have two."""
        choice = []
        for each in self.clusters:
            wanted = {pairs[layer] for layer in each.layers}
            if len(wanted) > 1 or not wanted <= set(each.pairs):
                return None
            choice.append(wanted.pop())
        return tuple(choice)

    def uniform_pairs(self) -> tuple[PrecisionPair, ...]:
        """The quantized pairs, from the fewest bits to the most; none where all layers stay unquantized."""
        if all(pair == UNQUANTIZED for pair in self.cheapest()):
            return ()
        return tuple(sorted(QUANTIZED_PAIRS, key=lambda pair: (pair.nominal_bits, pair)))

    def repair(self, choice: Choice, max_bytes: int) -> Choice:
        """The choice made cheaper, step by step where a byte less costs least additive error, until it fits.

        Args:
            choice: any.
            max_bytes: bytes per token, at least the cheapest choice's.
        """
        chosen = list(choice)
        while self.bytes_per_token(tuple(chosen)) > max_bytes:
            steps = []
            for position, each in enumerate(self.clusters):
                now = chosen[position]
                for pair in each.pairs:
                    less = each.bytes_per_token[now] - each.bytes_per_token[pair]
                    if less > 0:
                        steps.append(((each.additive_error[pair] - each.additive_error[now]) / less, position, pair))
            _, position, pair = min(steps, key=lambda step: step[:2])
            chosen[position] = pair
        return tuple(chosen)


def check_budget(max_bytes: int, shapes: Mapping[int, tuple[int, int]], cheapest: Sequence[PrecisionPair]) -> None:
    """Refuse a budget that no setting keeps.

    Args:
        max_bytes: bytes per token.
        shapes: KV heads and head size per layer.
        cheapest: the pair of fewest bits of each of these layers.

    Raises:
        ValueError: with the bits that are the least.
    """
    least = [(pair, *shape) for pair, shape in zip(cheapest, shapes.values(), strict=True)]
    if sum(heads * content_bytes(pair, size) for pair, heads, size in least) > max_bytes:
        nominal, stored = mean_bits(least)
        got = 16 * max_bytes / bf16_bytes(shapes)
        raise ValueError(
            f"the budget must be at least {stored:.3f} stored bits ({nominal:.3f} nominal), what the smallest setting "
            f"of this model takes, but got {got:.3f} stored bits"
        )
