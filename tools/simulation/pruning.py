"""Tokens that are dropped once a prompt is there: SnapKV (arXiv 2404.14469) and H2O (arXiv 2306.14048).

With another method for the tokens that are kept, as in "More Tokens, Lower Precision" (arXiv 2412.12706). Bits are per
number of the prompt, of all its tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from kvtuner_tools.simulation.cache import UNQUANTIZED_BITS, Layer, Method, Rows, Storage, View

OBSERVED = 32
"""SnapKV's observation window: the prompt's last queries, whose own tokens are kept."""
POOLED = 7
"""Tokens whose scores are pooled by their maximum, so that neighbours of what is looked at stay."""


class _Pruning(Method):
    """Keeps some of a prompt's tokens in each KV head.

    Args:
        share: of the prompt's tokens that are kept.
        inner: how those are stored; None for 16 bits.
    """

    needs_prompt = True
    name: str

    def __init__(self, share: float = 0.2, inner: Method | None = None) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"{self.name}: share must be in (0, 1], but got {share}")
        self.label = f"{self.name}:{share:g}" + ("" if inner is None else f":{inner.label}")
        self._share, self._inner = share, inner
        self.calibrates = inner is not None and inner.calibrates
        self.needs_gradients = inner is not None and inner.needs_gradients

    def prepare_all(self, layers: Sequence[Layer], texts: Mapping[int, Sequence[Rows]]) -> Mapping[int, Any]:
        return super().prepare_all(layers, texts) if self._inner is None else self._inner.prepare_all(layers, texts)

    def view(self, layer: Layer, statics: Any, rows: Rows) -> View:
        budget = min(rows.prompt_tokens, max(OBSERVED + 1, round(self._share * rows.prompt_tokens)))
        visible = self._kept(layer, rows, budget)
        if self._inner is None:
            bits = UNQUANTIZED_BITS * budget / rows.prompt_tokens
            return View(rows.key, rows.value, Storage(bits), visible=visible)
        view = self._inner.view(layer, statics, rows)
        storage = replace(view.storage, bits=view.storage.bits * budget / rows.prompt_tokens)
        return replace(view, visible=visible, storage=storage)

    @abstractmethod
    def _kept(self, layer: Layer, rows: Rows, budget: int) -> torch.Tensor:
        """[num_kv_heads, num_tokens, num_tokens] bool, as View.visible."""


class SnapKv(_Pruning):
    """Keeps the tokens that the prompt's last 32 queries attend to most, and those 32.

    Weights are summed over queries and the heads of a group, then pooled. Tokens behind the prompt are all kept.
    """

    name = "snapkv"

    def _kept(self, layer: Layer, rows: Rows, budget: int) -> torch.Tensor:
        prompt = rows.prompt_tokens
        start = prompt - OBSERVED
        scores = prompt_weights(layer, rows, start)[:, :start]
        pooled = torch.nn.functional.max_pool1d(scores[:, None], POOLED, 1, POOLED // 2)[:, 0]
        kept = torch.zeros(layer.num_kv_heads, rows.num_tokens, dtype=torch.bool, device=scores.device)
        kept.scatter_(1, pooled.topk(budget - OBSERVED, dim=1).indices, True)
        kept[:, start:] = True
        return kept[:, None].expand(-1, rows.num_tokens, -1)


class H2O(_Pruning):
    """Keeps the tokens with the largest sum of weights so far, and as many of the newest; one goes for each that comes.

    The sum is over all queries that saw the token and the heads of a group.
    """

    name = "h2o"

    def _kept(self, layer: Layer, rows: Rows, budget: int) -> torch.Tensor:
        prompt, count, heads = rows.prompt_tokens, rows.num_tokens, layer.num_kv_heads
        position = rows.positions
        scores = torch.zeros(heads, count, device=rows.key.device)
        scores[:, :prompt] = prompt_weights(layer, rows, 0)
        recent = budget // 2
        kept = (position < prompt).expand(heads, -1).clone()
        older = scores[:, : prompt - recent]
        drop = older.topk(prompt - budget, dim=1, largest=False).indices
        kept.scatter_(1, drop, False)
        visible = torch.ones(heads, count, count, dtype=torch.bool, device=rows.key.device)
        query = rows.query.view(count, heads, layer.group, layer.head_size)
        keys = rows.key.transpose(0, 1)
        for now in range(prompt, count):
            kept[:, now] = True
            visible[:, now] = kept
            logits = query[now] @ keys.mT * layer.scale
            weights = logits.masked_fill(~kept[:, None], float("-inf")).softmax(-1)
            scores += weights.sum(1)
            evictable = kept & (position <= now - recent)
            lowest = scores.masked_fill(~evictable, float("inf")).argmin(1, keepdim=True)
            kept.scatter_(1, lowest, False)
        return visible


def prompt_weights(layer: Layer, rows: Rows, start: int) -> torch.Tensor:
    """[num_kv_heads, prompt_tokens]: weights of the prompt's tokens, summed over its queries from ``start`` on."""
    prompt = rows.prompt_tokens
    query = rows.query[start:prompt].view(prompt - start, layer.num_kv_heads, layer.group, layer.head_size)
    position = rows.positions[:prompt]
    hidden = position[None, :] > position[start:, None]
    sums = []
    for head in range(layer.num_kv_heads):
        logits = query[:, head].transpose(0, 1) @ rows.key[:prompt, head].T * layer.scale
        sums.append(logits.masked_fill(hidden, float("-inf")).softmax(-1).sum((0, 1)))
    return torch.stack(sums)
