"""What a simulated cache gives to attention, and attention over it.

A text runs teacher-forced, all of its tokens in one step. A method turns the step's keys and values into what a cache
would give back of them, and says which tokens each query still reads exactly, and which it does not see at all. So a
query reads what it would if tokens had come one by one, as far as the method itself is causal.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_kvtuner.pages.transforms import RotaryTable

QUERIES_AT_ONCE = 1024
"""Queries whose logits are held at once, so that long texts need no more memory."""
UNQUANTIZED_BITS = 16
"""Of a number that a method keeps as it is; models are served in bf16 or fp16."""


@dataclass(frozen=True)
class Layer:
    """An attention layer.

    Args:
        index: decoder layer.
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_size: numbers per row.
        scale: factor on the logits.
        rotary: the rotation of its keys, or None if it rotates nothing.
        sliding_window: tokens a query sees, itself included, or None for all.
        logits_soft_cap: c > 0 replaces each logit x by c tanh(x / c).
        weights: gives what the model multiplies the layer's input by for keys and for values, [num_kv_heads *
            head_size, hidden_size] fp32 each, and the keys' bias [num_kv_heads * head_size], 0 where there is none.
        query_energy: gives what vllm_kvtuner.engine.query_energy.layer_energy does of the layer, and raises as it does.
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rotary: RotaryTable | None = None
    sliding_window: int | None = None
    logits_soft_cap: float = 0.0
    weights: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = field(default=None, repr=False)
    query_energy: Callable[[], tuple[torch.Tensor, bool]] | None = field(default=None, repr=False)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Rows:
    """What a layer sees of a text, fp32.

    Args:
        query: [num_tokens, num_heads, head_size], after RoPE.
        key: [num_tokens, num_kv_heads, head_size], after RoPE.
        value: likewise, as the model has it.
        prompt_tokens: of the text's head that are prefilled exactly: their queries read exact rows.
        key_gradient: of the text's log-likelihood by keys before RoPE, shaped as ``key``; for calibration alone.
        value_gradient: likewise by values.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    prompt_tokens: int = 0
    key_gradient: torch.Tensor | None = None
    value_gradient: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.key.shape[0]

    @property
    def positions(self) -> torch.Tensor:
        """[num_tokens] int64."""
        return torch.arange(self.num_tokens, device=self.key.device)


@dataclass(frozen=True)
class Storage:
    """What a layer's cache takes.

    Args:
        bits: per number of a packed row, the mean of keys and values, all scales, indices and tables of rows included.
        exact_tokens: rows that a request holds as they are, in tokens: half of a key and value each.
        beside: whether those are kept beside a packed copy, or instead of one.
    """

    bits: float
    exact_tokens: float = 0.0
    beside: bool = False

    def bits_at(self, num_tokens: int) -> float:
        """Mean stored bits per number of a request of ``num_tokens`` tokens."""
        exact = min(self.exact_tokens, num_tokens) / num_tokens
        packed = 1.0 if self.beside else 1.0 - exact
        return packed * self.bits + exact * UNQUANTIZED_BITS


@dataclass(frozen=True)
class View:
    """What attention reads of a text's cache.

    Args:
        key: [num_tokens, num_kv_heads, head_size] fp32, as the cache gives them back, after RoPE.
        value: likewise.
        storage: what the cache takes.
        exact_keys: [num_tokens, num_tokens] bool, of each query (row) the tokens whose keys it reads as they were; None
            for none.
        exact_values: likewise for values.
        visible: [num_kv_heads, num_tokens, num_tokens] bool, of each query the tokens that the cache still holds; None
            for all.
    """

    key: torch.Tensor
    value: torch.Tensor
    storage: Storage
    exact_keys: torch.Tensor | None = None
    exact_values: torch.Tensor | None = None
    visible: torch.Tensor | None = None


class Method(ABC):
    """A way to store keys and values.

    Attributes:
        label: as the command line has it.
        calibrates: whether :meth:`prepare` needs text.
        needs_gradients: whether that text's rows need gradients.
        needs_prompt: whether the method compresses a prompt once, so that a prompt must be given.
    """

    calibrates: bool = False
    needs_gradients: bool = False
    needs_prompt: bool = False
    label: str

    def prepare(self, layer: Layer, texts: Sequence[Rows]) -> Any:
        """What :meth:`view` gets as statics of the layer; None by default.

        Args:
            layer: the layer.
            texts: that are not scored; none unless the method calibrates.
        """
        return None

    def prepare_all(self, layers: Sequence[Layer], texts: Mapping[int, Sequence[Rows]]) -> Mapping[int, Any]:
        """Statics of all layers by index, for methods whose layers decide together; one by one by default.

        Args:
            layers: in order.
            texts: of each layer by index; none unless the method calibrates.
        """
        return {layer.index: self.prepare(layer, texts.get(layer.index, ())) for layer in layers}

    @abstractmethod
    def view(self, layer: Layer, statics: Any, rows: Rows) -> View:
        """What the layer's attention reads of a text."""


def newest(num_tokens: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[num_tokens, num_tokens] bool: of each query its newest ``count`` tokens, itself the first."""
    position = torch.arange(num_tokens, device=device)
    return position[None, :] > position[:, None] - count


def first(num_tokens: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[1, num_tokens] bool: the first ``count`` tokens."""
    return (torch.arange(num_tokens, device=device) < count)[None]


def attend(layer: Layer, rows: Rows, view: View) -> torch.Tensor:
    """Causal attention of a text's queries over a view, [num_tokens, num_heads, head_size] fp32."""
    output = torch.empty_like(rows.query)
    query = rows.query.view(rows.num_tokens, layer.num_kv_heads, layer.group, layer.head_size)
    for begin in range(0, rows.num_tokens, QUERIES_AT_ONCE):
        part = slice(begin, min(begin + QUERIES_AT_ONCE, rows.num_tokens))
        for head in range(layer.num_kv_heads):
            attended = _attend_head(layer, rows, view, query[part, head], part, head)
            output[part, head * layer.group : (head + 1) * layer.group] = attended
    return output


def _attend_head(layer: Layer, rows: Rows, view: View, query: torch.Tensor, part: slice, head: int) -> torch.Tensor:
    """Of queries [num_queries, group, head_size] of one KV head, the rows ``part`` of the text."""
    exact_keys = _exact(view.exact_keys, rows, part)[:, None]
    exact_values = _exact(view.exact_values, rows, part)[:, None]
    logits = torch.where(exact_keys, query @ rows.key[:, head].T, query @ view.key[:, head].T) * layer.scale
    if layer.logits_soft_cap > 0:
        logits = layer.logits_soft_cap * torch.tanh(logits / layer.logits_soft_cap)
    seen = _seen(layer, rows, view, part, head)[:, None]
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return (weights * exact_values) @ rows.value[:, head] + (weights * ~exact_values) @ view.value[:, head]


def _exact(exact: torch.Tensor | None, rows: Rows, part: slice) -> torch.Tensor:
    prompt = (rows.positions[part] < rows.prompt_tokens)[:, None].expand(-1, rows.num_tokens)
    return prompt if exact is None else prompt | exact[part].expand(-1, rows.num_tokens)


def _seen(layer: Layer, rows: Rows, view: View, part: slice, head: int) -> torch.Tensor:
    position = rows.positions
    seen = position[None, :] <= position[part, None]
    if layer.sliding_window is not None:
        seen = seen & (position[None, :] > position[part, None] - layer.sliding_window)
    if view.visible is not None:
        seen = seen & (view.visible[head, part] | (position[part, None] < rows.prompt_tokens))
    return seen
