"""Where an attention layer stands in its model."""

from typing import Any

import torch


class Modules:
    """The modules of a model by name.

    Args:
        model: loaded.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in self._modules.items()}

    def __contains__(self, module: Any) -> bool:
        return id(module) in self._names

    def parent(self, layer: Any) -> torch.nn.Module:
        """The module that holds an attention layer and its projections; the model where no other does."""
        return self._modules.get(self._parent_name(layer), self._model)

    def decoder_layer(self, layer: Any) -> torch.nn.Module | None:
        """The module that holds the parent; None where there is no other."""
        name, dot, _ = self._parent_name(layer).rpartition(".")
        return self._modules.get(name) if dot else None

    def _parent_name(self, layer: Any) -> str:
        return self._names.get(id(layer), "").rpartition(".")[0]
