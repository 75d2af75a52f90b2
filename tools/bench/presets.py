"""Shapes of models that people serve, by name: whole, or one rank's share under tensor parallelism.

A name is a folder of ``shapes``, such as ``llama33_70b``. ``llama33_70b:tp8`` is what one of eight ranks holds of it,
as a smaller model of its own: with it a single card does one rank's work, without the communication between ranks.
"""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SHAPES = Path(__file__).parent / "shapes"
"""One folder with config.json per preset."""

_NAME = re.compile(r"(?P<name>[^:/]+)(:tp(?P<ranks>[1-9]\d*))?")
_DIVIDED = (
    "num_attention_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""Sizes of which every rank holds an equal part."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NEED_TORCHVISION = ("qwen3_5_text",)
"""Kinds of models whose module in vLLM imports that of their images."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
VOCAB_PADDING = 64
"""vLLM pads a vocabulary to multiples of this before ranks divide it."""


def presets() -> list[str]:
    """Names of the shapes that come with the benchmarks."""
    return sorted(path.name for path in SHAPES.iterdir() if (path / "config.json").is_file())


def share_kv_heads(num_kv_heads: int, ranks: int) -> int:
    """KV heads that a rank caches: ranks beyond the KV heads hold copies.

    Raises:
        ValueError: neither number is a multiple of the other, which vLLM refuses too.
    """
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError(f"ranks must divide the KV heads or be a multiple of them, but got {ranks} and {num_kv_heads}")
    return max(1, num_kv_heads // ranks)


def share_of(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """What one of ``ranks`` holds of a model, as a config of its own; ``config`` itself for one rank.

    Heads, the MLP's width, experts' widths, heads of linear attention and the vocabulary are divided; layers and the
    hidden size are not.

    Raises:
        ValueError: a size that ranks cannot share evenly.
    """
    share = dict(config)
    if ranks == 1:
        return share
    # A head's size must not follow from the fewer heads.
    share["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for key in _DIVIDED:
        if (size := config.get(key)) is not None:
            if size % ranks:
                raise ValueError(f"{key} must be a multiple of the {ranks} ranks, but got {size}")
            share[key] = size // ranks
    share["num_key_value_heads"] = share_kv_heads(config["num_key_value_heads"], ranks)
    vocab_size = -(-config["vocab_size"] // VOCAB_PADDING) * VOCAB_PADDING
    if vocab_size % ranks:
        raise ValueError(f"ranks must divide the padded vocabulary of {vocab_size}, but got {ranks}")
    share["vocab_size"] = vocab_size // ranks
    # They name tokens that another rank's part of the vocabulary may hold. Nothing here ends by one of them.
    for key in _TOKEN_IDS:
        share.pop(key, None)
    return share


@dataclass(frozen=True)
class Preset:
    """A named shape.

    Args:
        name: a folder of ``SHAPES``.
        ranks: of tensor parallelism, of which one's share is meant.
    """

    name: str
    ranks: int = 1

    def __str__(self) -> str:
        return self.name if self.ranks == 1 else f"{self.name}:tp{self.ranks}"

    @classmethod
    def parse(cls, text: str) -> "Preset":
        """Read ``llama33_70b`` or ``llama33_70b:tp8``.

        Raises:
            ValueError: no such preset, or ranks that cannot share it evenly.
        """
        match = _NAME.fullmatch(text.strip())
        if match is None or match["name"] not in presets():
            rule = f"a named shape is one of {', '.join(presets())}, or a rank's share of it such as llama33_70b:tp8"
            raise ValueError(f"{rule}, but got {text!r}")
        preset = cls(match["name"], int(match["ranks"] or 1))
        try:
            preset.config()
        except ValueError as problem:
            raise ValueError(f"{text}: {problem}") from None
        return preset

    def config(self) -> dict[str, Any]:
        """The model's config.json, or the share's."""
        return share_of(json.loads((SHAPES / self.name / "config.json").read_text()), self.ranks)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder with the config.json, for as long as the context lasts."""
        if self.ranks == 1:
            yield SHAPES / self.name
            return
        with TemporaryDirectory(prefix="kvtuner-shape-") as parent:
            # The folder's name is how messages call the model.
            path = Path(parent) / f"{self.name}_tp{self.ranks}"
            path.mkdir()
            (path / "config.json").write_text(json.dumps(self.config(), indent=2))
            yield path

    @property
    def serve_refusal(self) -> str | None:
        """Why ``bench serve`` does not take this shape, or None if it does."""
        config = self.config()
        if any(config.get(key) for key in _EXPERTS):
            return (
                f"{self} is a mixture of experts, which bench serve does not measure: with dummy weights the router "
                "chooses experts as no trained one does, and their weights decide the time of a step; "
                "bench kernel takes this shape"
            )
        if config["model_type"] in _NEED_TORCHVISION and importlib.util.find_spec("torchvision") is None:
            return f"vLLM's model of {self} needs torchvision, which is not installed; bench kernel takes this shape"
        return None
