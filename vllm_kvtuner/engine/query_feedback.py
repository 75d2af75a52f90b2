"""Round feedback of keys that is made of a loaded model's weights, layer by layer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvtuner.engine.query_energy import key_feedback, layer_energy, over_ranks
from vllm_kvtuner.engine.rotary import rotary_module, table_of
from vllm_kvtuner.pages.transforms import RotaryTable
from vllm_kvtuner.profile.problems import format_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.engine.modules import Modules
    from vllm_kvtuner.pages.feedback import RoundFeedback

logger = logging.getLogger("vllm.kvtuner")


class Feedbacks:
    """Round feedback of keys that is made of weights.

    Args:
        modules: of the model.
        config: of the engine.
        adapts: whether a layer whose weights cannot be read goes without; else it is refused.
    """

    def __init__(self, modules: Modules, config: VllmConfig, adapts: bool) -> None:
        self._modules = modules
        self._config = config
        self._adapts = adapts
        self._made: dict[bool, list[int]] = {}
        self._left_out: dict[str, list[int]] = {}

    def of(self, layer: Any, own: slice, equalization: torch.Tensor | None) -> RoundFeedback | None:
        """That of an attention layer, of this rank's KV heads; None where weights cannot be read.

        Args:
            layer: of vLLM's.
            own: KV heads of this rank among all.
            equalization: that its keys are divided by, or None.

        Raises:
            ValueError: weights cannot be read, and the profile does not adapt.
        """
        parent, precision = self._modules.parent(layer), layer.impl.settings.precision
        try:
            module = rotary_module(parent, self._config)
            rotary = None if module is None else _without_positions(*table_of(module))
            energy, has_norm = layer_energy(layer, self._modules, self._config.model_config.dtype)
            energy = over_ranks(energy, own, precision.shape.num_kv_heads)
        except ValueError as error:
            if not self._adapts:
                raise ValueError(f"layer {precision.index}: key_round_feedback needs {error}") from None
            self._left_out.setdefault(str(error), []).append(precision.index)
            return None
        self._made.setdefault(has_norm, []).append(precision.index)
        return key_feedback(energy, rotary, equalization)

    def log(self) -> None:
        """Say what the layers got, in a line each."""
        for has_norm, layers in sorted(self._made.items(), reverse=True):
            what = "of the q projection and its input's norm" if has_norm else "of the q projection, without a norm"
            logger.info("kvtuner round feedback of keys from weights, layers %s: %s", format_layers(layers), what)
        for reason, layers in self._left_out.items():
            logger.warning(
                "kvtuner round feedback of keys from weights, layers %s: none, since it needs %s",
                format_layers(layers),
                reason,
            )


def _without_positions(table: torch.Tensor, is_neox: bool) -> RotaryTable:
    """What a rotation's table says of its pairs, without its rows."""
    return RotaryTable(table[:0], is_neox)
