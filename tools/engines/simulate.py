"""The engine that simulates caches: attention layers of an unquantized engine read what a method gives back.

A layer's ``forward`` is replaced while a text runs, which eager execution calls in both model runners. All tokens of a
text are in one step, so a layer sees all rows that its cache would hold, and vLLM's own cache is not read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvtuner_tools.divergence import TokenScores
from kvtuner_tools.engines.evaluate import EngineOptions, MeasuringEngine, ReferenceLogits, Window
from kvtuner_tools.simulation.cache import Layer, Method, Rows, Storage, attend
from kvtuner_tools.simulation.gradients import read_gradients
from vllm_kvtuner.engine.layer_names import layer_index
from vllm_kvtuner.engine.modules import Modules
from vllm_kvtuner.engine.query_energy import layer_energy
from vllm_kvtuner.engine.statics import layer_rotary


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts that methods are calibrated on.

    Args:
        windows: token ids.
        gradients: folder of their gradients (simulation/gradients.py), or None where no method needs them.
    """

    windows: tuple[tuple[int, ...], ...]
    gradients: Path | None = None


@dataclass(frozen=True)
class Simulated:
    """What a method did.

    Args:
        scores: of all predicted positions, those of text first.
        storages: of each layer, means over the windows of text.
    """

    scores: TokenScores
    storages: tuple[Storage, ...]


@dataclass
class _Simulation:
    """What the layers do; in the worker.

    Args:
        layers: by index.
        method: whose cache is simulated, None for vLLM's own.
        statics: of the method, by layer.
        prompt_tokens: of the text in flight that are prefilled exactly.
        num_tokens: of the text in flight.
        pending: layers that have not run yet.
        capturing: whether rows are kept.
        texts: per layer its rows of the calibration texts.
        storages: per layer those of the method's texts.
    """

    layers: dict[int, Layer] = field(default_factory=dict)
    method: Method | None = None
    statics: Mapping[int, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    num_tokens: int = 0
    pending: set[int] = field(default_factory=set)
    capturing: bool = False
    texts: dict[int, list[Rows]] = field(default_factory=dict)
    storages: dict[int, list[Storage]] = field(default_factory=dict)

    def begin(self, num_tokens: int, prompt_tokens: int) -> None:
        """Expect every layer once, over all tokens of a text."""
        self.num_tokens, self.prompt_tokens = num_tokens, prompt_tokens
        self.pending = set(self.layers) if self.capturing or self.method is not None else set()

    def take(self, index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
        """A layer's output, [num_tokens, num_heads, head_size] fp32; None where vLLM's own is wanted."""
        if index not in self.pending:
            return None
        self.pending.remove(index)
        layer, count = self.layers[index], self.num_tokens
        if query.shape[0] < count:
            rule = f"a text of {count} tokens must run in one step"
            raise RuntimeError(f"layer {index}: {rule}, but got a step of {query.shape[0]}")
        rows = Rows(
            query.view(query.shape[0], layer.num_heads, -1)[:count].float(),
            *(each.view(each.shape[0], layer.num_kv_heads, -1)[:count].float() for each in (key, value)),
            prompt_tokens=self.prompt_tokens,
        )
        if self.capturing:
            kept = (each.clone() for each in (rows.query, rows.key, rows.value))
            self.texts.setdefault(index, []).append(Rows(*kept))
            return None
        assert self.method is not None
        view = self.method.view(layer, self.statics[index], rows)
        self.storages.setdefault(index, []).append(view.storage)
        return attend(layer, rows, view)

    def end(self) -> None:
        if self.pending:
            raise RuntimeError(f"every layer must run once per step, but layers {sorted(self.pending)} did not")


class SimulatingEngine(MeasuringEngine):
    """An unquantized engine in this process, whose attention layers read simulated caches.

    Args:
        options: how to build it; a text must fit one step.
        reference: logits that passes are compared with.
        calibration: texts for methods that need some, or None.

    Raises:
        ValueError: layers whose attention the simulation does not know.
    """

    def __init__(
        self,
        options: EngineOptions,
        reference: ReferenceLogits,
        calibration: CalibrationTexts | None = None,
    ) -> None:
        # Calibration texts begin alike, by a chat template, and a text must run in one step.
        options = replace(options, prefix_caching=False)
        super().__init__(options, reference)
        self._plain, self._calibration = options, calibration
        self._llm.collective_rpc(_install)
        if calibration is not None:
            self._llm.collective_rpc(_capture, args=(True,))
            self._run(calibration.windows)
            self._llm.collective_rpc(_capture, args=(False,))
            if calibration.gradients is not None:
                self._llm.collective_rpc(_add_gradients, args=(calibration.gradients,))

    def simulate(self, method: Method, text: Sequence[Window], answers: Sequence[Window] = ()) -> Simulated:
        """Run windows with a method's cache in the layers.

        Args:
            method: what to simulate.
            text: windows of text; what stands before the first predicted token is prefilled exactly.
            answers: prompts with their answers; a prompt is prefilled exactly where the method compresses prompts.

        Raises:
            ValueError: the method needs calibration texts or a prompt, and there is none.
        """
        if method.needs_prompt and any(_prompt(window) == 0 for window in text):
            raise ValueError(f"{method.label} compresses a prompt, but the texts have none; give --prompt-tokens")
        if method.calibrates and self._calibration is None:
            raise ValueError(f"{method.label} needs calibration texts, but got none")
        self._options = replace(self._plain, label=method.label)
        self._llm.collective_rpc(_switch, args=(method,))
        prompts = [*map(_prompt, text), *(_prompt(window) if method.needs_prompt else 0 for window in answers)]
        self._prompts = iter(prompts)
        scores, _ = self.run_windows([*text, *answers], progress=True)
        (storages,) = self._llm.collective_rpc(_storages, args=(len(text),))
        self._llm.collective_rpc(_switch, args=(None,))
        return Simulated(scores, storages)

    def before_window(self, num_tokens: int) -> None:
        self._llm.collective_rpc(_begin, args=(num_tokens, next(self._prompts)))

    def after_window(self) -> None:
        self._llm.collective_rpc(_end)

    def _run(self, windows: Sequence[Sequence[int]]) -> None:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._prompts = iter([0] * len(windows))
        for window in windows:
            self.before_window(len(window))
            self._llm.generate([{"prompt_token_ids": list(window)}], params, use_tqdm=False)
            self.after_window()


def _prompt(window: Window) -> int:
    """Tokens whose predictions are not scored."""
    return window.start - 1


def _install(worker: Any) -> None:
    """Put the simulation into every attention layer. Runs in the worker."""
    config, model = worker.vllm_config, worker.model_runner.get_model()
    simulation = worker.model_runner.kvtuner_simulation = _Simulation()
    modules = Modules(model)
    found = {}
    for name, layer in config.compilation_config.static_forward_context.items():
        if layer not in modules or not hasattr(layer, "num_kv_heads"):  # not an attention layer with a cache
            continue
        index = layer_index(config, name)
        if index is None or index in found:
            raise ValueError(f"attention layer {name} must have a number of its own in its name")
        shares = getattr(layer, "kv_sharing_target_layer_name", None) is not None
        if layer.has_sink or shares or getattr(layer, "head_size_v", layer.head_size) != layer.head_size:
            rule = "--simulate must have layers without sinks, with keys and values of their own and of one size"
            raise ValueError(f"layer {index}: {rule}")
        found[index] = layer
    for index, layer in found.items():
        parent = modules.parent(layer)
        simulation.layers[index] = Layer(
            index=index,
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            scale=float(layer.impl.scale),
            rotary=layer_rotary(parent, config, index),
            sliding_window=layer.sliding_window,
            logits_soft_cap=float(layer.impl.logits_soft_cap or 0.0),
            weights=_weights(parent, config.model_config.dtype),
            query_energy=partial(layer_energy, layer, modules, config.model_config.dtype),
        )
        _replace_forward(layer, index, simulation)


def _weights(parent: torch.nn.Module, dtype: torch.dtype) -> Callable[[], tuple[torch.Tensor, ...]]:
    """As Layer.weights, by what the projection does to zeros and to the identity, so that quantized ones need no case
    of their own."""

    def read() -> tuple[torch.Tensor, ...]:
        from vllm.model_executor.layers.linear import QKVParallelLinear

        fused = [child for child in parent.children() if isinstance(child, QKVParallelLinear)]
        if len(fused) != 1:
            raise ValueError(f"weights must be in one projection of queries, keys and values, but got {len(fused)}")
        projection = fused[0]
        keys = projection.num_kv_heads * projection.head_size
        with torch.inference_mode():
            device = next(projection.parameters()).device
            size = projection.input_size
            rows = torch.cat(
                [torch.zeros(1, size, dtype=dtype, device=device), torch.eye(size, dtype=dtype).to(device)]
            )
            given = projection(rows)
            outputs = (given[0] if isinstance(given, tuple) else given).float()
        key, value = outputs[:, projection.num_heads * projection.head_size :].split([keys, keys], dim=1)
        return (key[1:] - key[:1]).T, (value[1:] - value[:1]).T, key[0]

    return read


def _replace_forward(layer: Any, index: int, simulation: _Simulation) -> None:
    forward = layer.forward

    def replaced(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        own = simulation.take(index, query, key, value)
        if own is None:
            return forward(query, key, value, *args, **kwargs)
        output = query.new_zeros(query.shape[0], own.shape[1] * own.shape[2])  # rows beyond the text are padding
        output[: own.shape[0]] = own.flatten(1).to(query.dtype)
        return output

    layer.forward = replaced


def _capture(worker: Any, on: bool) -> None:
    worker.model_runner.kvtuner_simulation.capturing = on


def _add_gradients(worker: Any, folder: Path) -> None:
    """Give the calibration texts' rows their gradients. Runs in the worker."""
    simulation = worker.model_runner.kvtuner_simulation
    for place, index in enumerate(sorted(simulation.texts)):
        texts = simulation.texts[index]
        for number, rows in enumerate(texts):
            key, value = read_gradients(folder, number, place)
            grads = (each.view_as(rows.key).to(rows.key.device) for each in (key, value))
            texts[number] = replace(rows, **dict(zip(("key_gradient", "value_gradient"), grads, strict=True)))


def _switch(worker: Any, method: Method | None) -> None:
    """Simulate a method from now on. Runs in the worker."""
    simulation = worker.model_runner.kvtuner_simulation
    simulation.method, simulation.storages = method, {}
    simulation.statics = {}
    if method is None:
        return
    with torch.inference_mode():
        layers = [simulation.layers[index] for index in sorted(simulation.layers)]
        simulation.statics = method.prepare_all(layers, simulation.texts if method.calibrates else {})


def _begin(worker: Any, num_tokens: int, prompt_tokens: int) -> None:
    worker.model_runner.kvtuner_simulation.begin(num_tokens, prompt_tokens)


def _end(worker: Any) -> None:
    worker.model_runner.kvtuner_simulation.end()


def _storages(worker: Any, texts: int) -> tuple[Storage, ...]:
    """Each layer's storage, means over the first so many windows. Runs in the worker."""
    all_windows = worker.model_runner.kvtuner_simulation.storages
    found = {index: storages[:texts] for index, storages in all_windows.items()}
    return tuple(
        Storage(
            sum(each.bits for each in found[index]) / len(found[index]),
            sum(each.exact_tokens for each in found[index]) / len(found[index]),
            found[index][0].beside,
        )
        for index in sorted(found)
    )


_engine: SimulatingEngine
"""The engine of this process, where this module serves an evaluation elsewhere."""


def build(options: EngineOptions, reference: ReferenceLogits, calibration: CalibrationTexts | None) -> None:
    """Start this process's engine."""
    global _engine
    _engine = SimulatingEngine(options, reference, calibration)


def simulate(method: Method, text: tuple[Window, ...], answers: tuple[Window, ...]) -> Simulated:
    """As :meth:`SimulatingEngine.simulate`, with this process's engine."""
    return _engine.simulate(method, text, answers)
