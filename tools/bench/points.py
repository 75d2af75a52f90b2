"""What the benchmarks' arguments name: batches of requests, throughput and prefill points, attention shapes."""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

SHAPES = Path(__file__).parent / "shapes"
"""One folder with config.json per preset."""

IMPLEMENTATIONS = ("fa3_bf16", "fa3_fp8", "int4_per_token_head", "triton", "cuda")
"""Names of the decode attention kernels, in the order of tables and pictures."""
TRANSFORMS = ("none", "hadamard", "offset", "all")
"""No transform; Hadamard rotations of keys and values; these, key offset, equalization and range search."""

_MIXED = re.compile(r"mixed:(\d+):(\d+)-(\d+)")


def _two_numbers(text: str, separator: str, rule: str) -> tuple[int, int]:
    first, _, second = text.strip().partition(separator)
    if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
        raise ValueError(f"{rule}, but got {text!r}")
    return int(first), int(second)


@dataclass(frozen=True)
class Point:
    """``batch`` requests of ``context`` prompt tokens each, written BATCHxCONTEXT."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"

    @classmethod
    def parse(cls, text: str) -> "Point":
        """Read ``64x8192``.

        Raises:
            ValueError: not two positive integers.
        """
        return cls(*_two_numbers(text, "x", "a point is written BATCHxCONTEXT, such as 64x8192"))


@dataclass(frozen=True)
class KernelPoint:
    """The requests of one attention call.

    Args:
        name: as it was written.
        lengths: tokens in the cache of each request.
    """

    name: str
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> "KernelPoint":
        """Read ``64x8192``, or ``mixed:64:256-16128``: 64 requests of random lengths, the same ones in every run.

        Raises:
            ValueError: neither form, or a range that is empty.
        """
        name = text.strip()
        if match := _MIXED.fullmatch(name):
            count, low, high = map(int, match.groups())
            if not (count and 0 < low <= high):
                raise ValueError(f"mixed:REQUESTS:LOW-HIGH must have 0 < LOW <= HIGH and requests, but got {text!r}")
            numbers = random.Random(count)
            return cls(name, tuple(numbers.randint(low, high) for _ in range(count)))
        if name.startswith("mixed"):
            raise ValueError(f"mixed lengths are written mixed:REQUESTS:LOW-HIGH, but got {text!r}")
        point = Point.parse(name)
        return cls(name, (point.context,) * point.batch)


@dataclass(frozen=True)
class ThroughputPoint:
    """Requests of ``prompt`` tokens that generate ``output`` tokens each, written PROMPTxOUTPUT."""

    prompt: int
    output: int

    def __str__(self) -> str:
        return f"{self.prompt}x{self.output}"

    @classmethod
    def parse(cls, text: str) -> "ThroughputPoint":
        """Read ``4096x512``.

        Raises:
            ValueError: not two positive integers.
        """
        return cls(*_two_numbers(text, "x", "a throughput point is written PROMPTxOUTPUT, such as 4096x512"))


@dataclass(frozen=True)
class LongPrefill:
    """One prompt of ``prompt`` tokens, prefilled ``chunk`` tokens at a time, written PROMPT:CHUNK."""

    prompt: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.prompt}:{self.chunk}"

    @classmethod
    def parse(cls, text: str) -> "LongPrefill":
        """Read ``32768:8192``.

        Raises:
            ValueError: not two positive integers, or a chunk that is longer than the prompt.
        """
        rule = "a long prefill is written PROMPT:CHUNK, such as 32768:8192, with CHUNK <= PROMPT"
        prompt, chunk = _two_numbers(text, ":", rule)
        if chunk > prompt:
            raise ValueError(f"{rule}, but got {text!r}")
        return cls(prompt, chunk)


@dataclass(frozen=True)
class LayerHeads:
    """Heads of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}/{self.head_size}"

    @classmethod
    def parse(cls, text: str) -> "LayerHeads":
        """Read a preset's name such as ``llama31_8b``, or ``HEADS/KV_HEADS/HEAD_SIZE``.

        Raises:
            ValueError: neither, or query heads that KV heads do not divide.
        """
        numbers = text.strip().split("/")
        if len(numbers) == 1 and (SHAPES / text / "config.json").is_file():
            config = json.loads((SHAPES / text / "config.json").read_text())
            heads = config["num_attention_heads"]
            return cls(heads, config["num_key_value_heads"], config.get("head_dim") or config["hidden_size"] // heads)
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            rule = f"a shape is HEADS/KV_HEADS/HEAD_SIZE, such as 32/8/128, or one of {', '.join(presets())}"
            raise ValueError(f"{rule}, but got {text!r}")
        shape = cls(*map(int, numbers))
        if shape.num_heads % shape.num_kv_heads:
            raise ValueError(f"HEADS must be a multiple of KV_HEADS, but got {text!r}")
        return shape


def presets() -> list[str]:
    """Names of the shapes that come with the benchmarks."""
    return sorted(path.name for path in SHAPES.iterdir() if path.is_dir())
