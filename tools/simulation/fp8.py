"""fp8 e4m3, as vLLM's ``--kv-cache-dtype fp8`` stores it, with scales and without."""

from collections.abc import Sequence

import torch

from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, View


class Fp8(Method):
    """Each number as its nearest e4m3, saturating; with ``scaled``, divided by a scale of the layer before.

    A scale is the largest magnitude of calibration text over the largest e4m3, 448, for keys and for values, as
    llm-compressor makes them for vLLM. Without, scales are 1, which vLLM takes where a checkpoint has none.

    Args:
        scales: ``scaled`` or ``unscaled``.
    """

    calibrates = True

    def __init__(self, scales: str = "unscaled") -> None:
        if scales not in ("scaled", "unscaled"):
            raise ValueError(f"fp8: scales must be scaled or unscaled, but got {scales!r}")
        self.label = f"fp8:{scales}"
        self._scaled = scales == "scaled"

    def prepare(self, layer: Layer, texts: Sequence[Rows]) -> tuple[float, float]:
        if not self._scaled:
            return 1.0, 1.0
        largest = torch.finfo(torch.float8_e4m3fn).max
        key = max(float(each.key.abs().max()) for each in texts)
        value = max(float(each.value.abs().max()) for each in texts)
        return key / largest, value / largest

    def view(self, layer: Layer, statics: tuple[float, float], rows: Rows) -> View:
        return View(_round_trip(rows.key, statics[0]), _round_trip(rows.value, statics[1]), Storage(8.0))


def _round_trip(rows: torch.Tensor, scale: float) -> torch.Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return (rows / scale).clamp(-largest, largest).to(torch.float8_e4m3fn).float() * scale
