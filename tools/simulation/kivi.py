"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750), sections 3.2 and 3.3."""

from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View, newest
from kvtuner_tools.simulation.rounding import round_between

GROUP = 32


class Kivi(Method):
    """Keys per channel in groups of 32 tokens, values per token in groups of 32 channels, and a residual.

    The newest keys wait as they are until ``residual`` of them are there, and are then quantized together. Of values
    the newest ``residual`` are kept, and each older one is quantized as it leaves. Each group has a scale and a zero
    point in fp16.

    Args:
        bits: of a code.
        residual: tokens, a multiple of 32; 128 in the paper's experiments.
    """

    def __init__(self, bits: int = 2, residual: int = 128) -> None:
        if residual < GROUP or residual % GROUP:
            raise ValueError(f"kivi: residual must be a multiple of {GROUP} tokens, but got {residual}")
        self.label = f"kivi:{bits}:{residual}"
        self._bits, self._residual = bits, residual

    def view(self, layer: Layer, statics: object, rows: Rows) -> View:
        tokens = rows.num_tokens
        whole = tokens // self._residual * self._residual  # keys beyond are exact for every query
        key = rows.key.clone()
        groups = rows.key[:whole].view(-1, GROUP, layer.num_kv_heads, layer.head_size)
        key[:whole] = round_between(groups, self._bits, 1).view(whole, layer.num_kv_heads, layer.head_size)
        parts = rows.value.view(tokens, layer.num_kv_heads, -1, GROUP)
        value = round_between(parts, self._bits, -1).view_as(rows.value)
        position = rows.positions
        packed = (position[:, None] + 1) // self._residual * self._residual  # of each query's keys, its own included
        # Of 1 to residual - 1 waiting keys all counts are as likely, and residual values.
        exact_tokens = ((self._residual - 1) / 2 + self._residual) / 2
        return View(
            key=key,
            value=value,
            storage=Storage(self._bits + 32 / GROUP, exact_tokens),
            exact_keys=position[None, :] >= packed,
            exact_values=newest(tokens, self._residual, rows.key.device),
        )
