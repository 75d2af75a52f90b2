"""ThinK (Xu et al. 2024, arXiv 2407.21018): key channels that a prompt's queries use least are pruned."""

from dataclasses import replace

import torch

from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View
from kvtuner_tools.simulation.kivi import Kivi

OBSERVED = 32
"""Queries at the prompt's end that choose, and newest tokens of the prompt whose keys stay whole."""


class Think(Method):
    """Of each KV head the channels with the least norm of their part of the logits go, once after the prompt.

    A channel's part is q_d k_d^T, over the last 32 queries of the prompt and all of its keys, so its Frobenius norm is
    |q_d| |k_d|. Query heads of a group are summed. Values, and keys of later tokens, stay whole.

    Args:
        share: of the channels that are pruned.
        kivi_bits: of KIVI's codes for what is left, as in the paper's combination; 0 for 16 bits.
    """

    needs_prompt = True

    def __init__(self, share: float = 0.4, kivi_bits: int = 0) -> None:
        if not 0 < share < 1:
            raise ValueError(f"think: share must be between 0 and 1, but got {share}")
        self.label = f"think:{share:g}" + (f":{kivi_bits}" if kivi_bits else "")
        self._share = share
        self._inner = Kivi(kivi_bits) if kivi_bits else None

    def view(self, layer: Layer, statics: object, rows: Rows) -> View:
        pruned = weakest_channels(layer, rows, self._share)
        old = rows.positions < rows.prompt_tokens - OBSERVED
        gone = old[:, None, None] & pruned[None]
        keys = rows.key.masked_fill(gone, 0.0)
        share = float(pruned.float().mean())
        if self._inner is None:
            # The keys that stay whole count half, since values are whole everywhere.
            return View(keys, rows.value, Storage(16 * (2 - share) / 2, OBSERVED / 2))
        inner = self._inner.view(layer, None, replace(rows, key=keys))
        bits = inner.storage.bits * (2 - share) / 2
        # Exact rows are those of the model, so pruned channels would come back where KIVI waits: tokens of the
        # prompt have none, and later ones are whole.
        return replace(
            inner,
            key=inner.key.masked_fill(gone, 0.0),
            exact_keys=None if inner.exact_keys is None else inner.exact_keys & ~old,
            storage=Storage(bits, inner.storage.exact_tokens),
        )


def weakest_channels(layer: Layer, rows: Rows, share: float) -> torch.Tensor:
    """[num_kv_heads, head_size] bool: the floor(share * head_size) channels of least norm in each KV head."""
    prompt = slice(0, rows.prompt_tokens)
    observed = rows.query[max(0, rows.prompt_tokens - OBSERVED) : rows.prompt_tokens]
    queries = observed.view(len(observed), layer.num_kv_heads, layer.group, layer.head_size)
    norms = queries.square().sum(0).sqrt().sum(1) * rows.key[prompt].square().sum(0).sqrt()
    count = int(share * layer.head_size)
    pruned = torch.zeros_like(norms, dtype=torch.bool)
    return pruned.scatter(1, norms.argsort(1)[:, :count], True)
