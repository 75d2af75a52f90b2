"""What ``kvtuner bench kernel`` is asked to measure, from its arguments."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvtuner_tools.bench.points import IMPLEMENTATIONS, TRANSFORMS, KernelPoint, LayerHeads, QueryTokens
from vllm_kvtuner.pages.layout import BLOCK_SIZE_MULTIPLE, QUANTIZED_PAIRS, PrecisionPair

PARTS = ("decode", "layer", "store", "gather")
"""Attention over the cache; the same after the store of the queries' tokens, as a layer does both; store; gather."""


@dataclass(frozen=True)
class KernelRequest:
    """What to measure.

    Args:
        parts: of ``PARTS``.
        shapes: each layer once.
        presets: those of them that were given by a name; several names may mean the same layer.
        implementations: of ``IMPLEMENTATIONS``.
        transforms: of ``TRANSFORMS``.
        query_tokens: each point is decoded with each of them.
        gather_tokens: cached tokens of the request that is gathered.
        bandwidth: a read bandwidth to report against beside the measured one, in bytes per second.
        samples: timed samples per case.
        sample_ms: least duration of a sample.
    """

    parts: tuple[str, ...]
    shapes: tuple[LayerHeads, ...]
    presets: Mapping[str, LayerHeads]
    block_sizes: tuple[int, ...]
    points: tuple[KernelPoint, ...]
    pairs: tuple[PrecisionPair, ...]
    store_pairs: tuple[PrecisionPair, ...]
    implementations: tuple[str, ...]
    transforms: tuple[str, ...]
    query_tokens: tuple[QueryTokens, ...]
    gather_tokens: int
    bandwidth: float | None
    samples: int
    sample_ms: float

    def head(self) -> dict[str, Any]:
        """The options as JSON."""
        return {
            "shapes": [str(shape) for shape in self.shapes],
            "presets": {name: str(shape) for name, shape in self.presets.items()},
            "block_sizes": list(self.block_sizes),
            "points": [str(point) for point in self.points],
            "query_tokens": [str(tokens) for tokens in self.query_tokens],
            "samples": self.samples,
            "sample_ms": self.sample_ms,
        }


def parse_request(args: argparse.Namespace) -> KernelRequest:
    """The request that the arguments make.

    Raises:
        ValueError: an option with a value it does not take.
    """

    def words(option: str, known: Sequence[str]) -> tuple[str, ...]:
        given = tuple(word.strip() for word in getattr(args, option).split(","))
        if unknown := [word for word in given if word not in known]:
            raise ValueError(f"--{option} must be of {', '.join(known)}, but got {', '.join(unknown)}")
        return given

    def pairs(text: str) -> tuple[PrecisionPair, ...]:
        found = tuple(PrecisionPair.parse(word) for word in text.split(","))
        if unpacked := [pair.name for pair in found if not pair.is_quantized]:
            raise ValueError(f"pairs must be of {', '.join(map(str, QUANTIZED_PAIRS))}, but got {', '.join(unpacked)}")
        return found

    def sizes(text: str) -> tuple[int, ...]:
        numbers = [word.strip() for word in text.split(",")]
        if not all(word.isdecimal() and int(word) and int(word) % BLOCK_SIZE_MULTIPLE == 0 for word in numbers):
            raise ValueError(f"--block-size must be multiples of {BLOCK_SIZE_MULTIPLE}, but got {text!r}")
        return tuple(map(int, numbers))

    named = {text.strip(): LayerHeads.parse(text) for text in args.shape or ["llama31_8b"]}
    points = tuple(KernelPoint.parse(text) for text in args.points.split(","))
    query_tokens = tuple(dict.fromkeys(map(QueryTokens.parse, args.query_tokens.split(","))))
    _check_query_tokens(points, query_tokens)
    for option in ("gather_tokens", "samples", "sample_ms", "bandwidth", "jobs"):
        if (value := getattr(args, option)) is not None and value <= 0:
            raise ValueError(f"--{option.replace('_', '-')} must be positive, but got {value}")
    return KernelRequest(
        parts=words("parts", PARTS),
        shapes=tuple(dict.fromkeys(named.values())),
        presets={name: shape for name, shape in named.items() if name != str(shape)},
        block_sizes=sizes(args.block_size),
        points=points,
        pairs=pairs(args.pairs),
        store_pairs=pairs(args.store_pairs),
        implementations=words("implementations", IMPLEMENTATIONS),
        transforms=words("transforms", TRANSFORMS),
        query_tokens=query_tokens,
        gather_tokens=args.gather_tokens,
        bandwidth=args.bandwidth,
        samples=args.samples,
        sample_ms=args.sample_ms,
    )


def _check_query_tokens(points: Sequence[KernelPoint], query_tokens: Sequence[QueryTokens]) -> None:
    """Every point must have room for all of them."""
    for point in points:
        shortest = min(point.lengths)
        for tokens in query_tokens:
            if tokens.most > shortest:
                rule = f"--query-tokens must be at most the shortest context, which is {shortest} in {point}"
                raise ValueError(f"{rule}, but got {tokens}")
            if len(tokens.counts) > len(point.lengths):
                rule = f"--query-tokens {tokens} needs points with {len(tokens.counts)} requests at least"
                raise ValueError(f"{rule}, but got {point}")
