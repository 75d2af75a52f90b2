"""Layers such as vLLM's beside an attention layer, without an engine."""

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 4, 2, 8, 16


def projection(kind, outputs, bias, **attributes):
    """A layer of vLLM's kind that keeps its bias in another order than it adds it in, as Marlin kernels do."""

    class Projection(kind):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.input_size, self.skip_bias_add = HIDDEN, False
            self.weight = torch.nn.Parameter(torch.randn(outputs, HIDDEN))
            self.bias = None if bias is None else torch.nn.Parameter(bias.flip(0))
            for name, value in attributes.items():
                setattr(self, name, value)

        def forward(self, rows):
            added = torch.zeros(outputs) if self.bias is None or self.skip_bias_add else self.bias.flip(0)
            return rows @ self.weight.T + added, None

    return Projection()


def fused(bias):
    rows = (HEADS + 2 * KV_HEADS) * HEAD_SIZE
    return projection(QKVParallelLinear, rows, bias, num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=HEAD_SIZE)


def beside(**children):
    parent = torch.nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent
