"""When new tokens are packed with round feedback: at once, or those of all layers at the end of the step.

Rounding with feedback goes from channel to channel, so that a store of few rows takes its latency, however few they
are; in line, every layer of a decode step would wait for it. Where a recent window of 16 bits holds all new tokens of a
step, nobody reads their packed copies in that step: attention reads the window. So a layer's store writes the window's
rows alone, and once the last layer has attended, all layers' tokens are packed from there: in the same forward, on the
same stream, and inside the CUDA graph where there is one. When the step ends, pages hold what a store in line would
have written, bit by bit, so that the prefix cache, preemption, rejected drafts and requests that end see no difference.

Layers wait for each other, in whichever order a model calls them: what is packed is complete, or it is an error. Those
are layers of the model that is served. A draft model's are none of ours, a layer that reads another's cache stores
nothing, and a pipeline rank's forward calls the layers that the rank has built.
"""

from typing import Any
from weakref import WeakValueDictionary

from vllm import envs as vllm_envs
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from vllm_kvtuner.kernels.contract import StepRows


class StepPacking:
    """The tokens of a step that wait to be packed, of all layers of an engine.

    Args:
        layers: of the engine, by name; what it is found by.
    """

    def __init__(self, layers: dict[str, Any]) -> None:
        self.layers = layers
        self._members: set[str] = set()
        self._waiting: dict[str, StepRows] = {}
        self._attended: set[str] = set()
        self._forward: Any = None

    def join(self, layer: str) -> None:
        """From the next step on, the layer's tokens wait."""
        self._members.add(layer)

    def leave(self, layer: str) -> None:
        """They do not any more."""
        self._members.discard(layer)

    def check(self) -> None:
        """Before a layer stores.

        Raises:
            RuntimeError: tokens of an earlier forward still wait, since some layer did not attend in it.
        """
        if self._waiting and self._forward is not get_forward_context():
            missing = sorted(self._members - self._attended)
            raise RuntimeError(
                "tokens of the last step were never packed, since vLLM did not call these layers' attention: "
                f"{', '.join(missing)}; their cache must not be read"
            )

    def add(self, layer: str, rows: StepRows) -> None:
        """A layer has stored its new tokens in its window alone.

        Raises:
            RuntimeError: it has done so before in this forward.
        """
        if layer in self._waiting:
            raise RuntimeError(f"{layer} has stored twice in one forward, whose first tokens would never be packed")
        self._forward = get_forward_context()
        self._waiting[layer] = rows

    def attended(self, layer: str) -> list[StepRows]:
        """A layer whose tokens wait has attended: the tokens of all layers if it was the last, to be packed now.

        Raises:
            RuntimeError: it has not stored in this forward, as when a graph holds its store and not its attention.
        """
        if layer not in self._waiting or self._forward is not get_forward_context():
            raise RuntimeError(f"{layer} has attended, but its new tokens were not stored in this forward")
        self._attended.add(layer)
        if len(self._attended) < len(self._members):
            return []
        rows = list(self._waiting.values())
        self._waiting, self._attended, self._forward = {}, set(), None
        return rows


_PACKINGS: WeakValueDictionary[int, StepPacking] = WeakValueDictionary()
"""By the identity of an engine's layers, which each of them keeps alive."""


def step_packing(config: VllmConfig) -> StepPacking | None:
    """That of an engine, or None where every layer packs its tokens at once.

    - A connector saves a layer's pages as soon as the layer has attended (``save_kv_layer``).
    - Microbatches are two forwards at a time, on threads of their own.
    - With partitions by Inductor or breakable CUDA graphs, graphs hold stores, which are replayed, and not attention,
      which is called.
    """
    if config.kv_transfer_config is not None or config.parallel_config.use_ubatching:
        return None
    if config.compilation_config.use_inductor_graph_partition or vllm_envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        return None
    layers = config.compilation_config.static_forward_context
    packing = _PACKINGS.get(id(layers))
    if packing is None:
        packing = _PACKINGS[id(layers)] = StepPacking(layers)
    return packing
