"""Attention over a view, and what bits are counted."""

from dataclasses import replace

import pytest
import torch

from kvtuner_tools.simulation.cache import Layer, Rows, Storage, View, attend, newest

TOLERANCE = 2e-5
"""Of outputs near 1 in fp32, sums of some hundred numbers."""


def by_loops(layer: Layer, rows: Rows, view: View) -> torch.Tensor:
    """Attention in float64, token by token."""
    output = torch.zeros_like(rows.query, dtype=torch.float64)
    exact_keys = newest(rows.num_tokens, 0) if view.exact_keys is None else view.exact_keys
    exact_values = newest(rows.num_tokens, 0) if view.exact_values is None else view.exact_values
    for token in range(rows.num_tokens):
        for head in range(layer.num_heads):
            kv = head // layer.group
            logits, values = [], []
            for other in range(token + 1):
                prompt = token < rows.prompt_tokens
                if layer.sliding_window is not None and token - other >= layer.sliding_window:
                    continue
                if view.visible is not None and not prompt and not view.visible[kv, token, other]:
                    continue
                key = rows.key if prompt or exact_keys[token, other] else view.key
                value = rows.value if prompt or exact_values[token, other] else view.value
                logit = float(rows.query[token, head].double() @ key[other, kv].double()) * layer.scale
                if layer.logits_soft_cap:
                    cap = layer.logits_soft_cap
                    logit = cap * float(torch.tanh(torch.tensor(logit / cap, dtype=torch.float64)))
                logits.append(logit)
                values.append(value[other, kv].double())
            weights = torch.tensor(logits, dtype=torch.float64).softmax(0)
            output[token, head] = (weights[:, None] * torch.stack(values)).sum(0)
    return output


@pytest.mark.quick(1)
@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("logits_soft_cap", [0.0, 2.0])
def test_attention_reads_what_the_view_says(layer, rows, sliding_window, logits_soft_cap):
    count = 40
    rows = Rows(rows.query[:count], rows.key[:count], rows.value[:count], prompt_tokens=5)
    layer = replace(layer, sliding_window=sliding_window, logits_soft_cap=logits_soft_cap)
    visible = torch.rand(layer.num_kv_heads, count, count) < 0.7
    visible |= torch.eye(count, dtype=torch.bool)
    view = View(
        torch.randn_like(rows.key),
        torch.randn_like(rows.value),
        Storage(2.0),
        exact_keys=newest(count, 3),
        exact_values=newest(count, 6),
        visible=visible,
    )

    attended = attend(layer, rows, view)

    torch.testing.assert_close(attended.double(), by_loops(layer, rows, view), atol=TOLERANCE, rtol=0)


def test_bits_count_exact_tokens():
    """128 of 1,024 tokens in 16 bits, the others in 3; or all in 3, and 128 besides."""
    assert Storage(3.0, 128).bits_at(1024) == pytest.approx((896 * 3 + 128 * 16) / 1024)
    assert Storage(3.0, 128, beside=True).bits_at(1024) == pytest.approx(3 + 128 * 16 / 1024)
    assert Storage(3.0, 128).bits_at(64) == 16
