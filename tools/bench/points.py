"""What the benchmarks' arguments name: batches of requests, query tokens, throughput and prefill points, shapes."""

import random
import re
from dataclasses import dataclass

from kvtuner_tools.bench.presets import Preset, presets
from vllm_kvtuner.kernels.limits import MAX_DECODE_QUERY_LEN
from vllm_kvtuner.profile.model_shape import ModelShape

IMPLEMENTATIONS = ("fa3_bf16", "fa3_fp8", "xqa_bf16", "xqa_fp8", "int4_per_token_head", "triton", "cuda")
"""Names of the decode attention kernels, in the order of tables and pictures."""
TRANSFORMS = ("none", "hadamard", "offset", "all")
"""No transform; Hadamard rotations of keys and values; these, key offset, equalization and range search."""

SINKS = "+sinks"
"""Behind the heads of a layer with attention sinks."""

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
class QueryTokens:
    """Query tokens of the requests of one attention call.

    Args:
        counts: that requests take in turn, ascending; several where some requests verify drafts and others do not.
    """

    counts: tuple[int, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.counts))

    @classmethod
    def parse(cls, text: str) -> "QueryTokens":
        """Read ``4``, or ``1+4``: of every two requests one brings 1 token and one brings 4.

        Raises:
            ValueError: another form, or more tokens than a decode kernel takes.
        """
        words = text.strip().split("+")
        if not all(word.isdecimal() and 1 <= int(word) <= MAX_DECODE_QUERY_LEN for word in words):
            rule = f"query tokens are 1 to {MAX_DECODE_QUERY_LEN}, or several such as 1+4 that requests take in turn"
            raise ValueError(f"{rule}, but got {text!r}")
        counts = sorted(map(int, words))
        return cls(tuple(counts) if counts[0] < counts[-1] else (counts[0],))

    @property
    def most(self) -> int:
        """Query tokens that a request has at most, for which passes of a kernel have room."""
        return self.counts[-1]

    def of(self, num_reqs: int) -> tuple[int, ...]:
        """Query tokens of each of ``num_reqs`` requests; the first brings the most."""
        return tuple(self.counts[-1 - index % len(self.counts)] for index in range(num_reqs))


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
    """Heads of one attention layer.

    Args:
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_size: numbers per head.
        sinks: whether it has attention sinks, a learned logit of each query head in every softmax.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    sinks: bool = False

    def __str__(self) -> str:
        return f"{self.num_heads}/{self.num_kv_heads}/{self.head_size}{SINKS if self.sinks else ''}"

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def parse(cls, text: str) -> "LayerHeads":
        """Read a preset's name such as ``llama31_8b`` or ``llama33_70b:tp8``, or ``HEADS/KV_HEADS/HEAD_SIZE``, with
        ``+sinks`` behind it for attention sinks.

        Raises:
            ValueError: neither, query heads that KV heads do not divide, or ranks that cannot share the heads.
        """
        numbers = text.strip().removesuffix(SINKS).split("/")
        if len(numbers) == 1 and text.strip().partition(":")[0] in presets():
            config = Preset.parse(text).config()
            heads = config["num_attention_heads"]
            size = config.get("head_dim") or config["hidden_size"] // heads
            sinks = ModelShape.from_hf_config(config, text.strip()).attention_sinks
            return cls(heads, config["num_key_value_heads"], size, sinks)
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            rule = f"a shape is HEADS/KV_HEADS/HEAD_SIZE[{SINKS}], such as 32/8/128, or one of {', '.join(presets())}"
            raise ValueError(f"{rule}, whole or as a rank's share such as llama33_70b:tp8, but got {text!r}")
        num_heads, num_kv_heads, head_size = map(int, numbers)
        shape = cls(num_heads, num_kv_heads, head_size, text.strip().endswith(SINKS))
        if shape.num_heads % shape.num_kv_heads:
            raise ValueError(f"HEADS must be a multiple of KV_HEADS, but got {text!r}")
        return shape
