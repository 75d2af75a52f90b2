"""Decode step times that were measured, by card and by the shape of the cache: what a wheel has of ``docs/benchmarks``.

``python -m kvtuner_tools.bench.tables`` makes the file from the published results.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("step_times.json")
SCHEMA = "kvtuner-step-times/1"
NEAR_BITS = 0.3
"""Stored bits by which a measured setting may differ from the one that is asked for: a tenth of a decode step."""
Layers = tuple[tuple[int, int, int], ...]
"""Numbers of layers, with their KV heads and head sizes."""


@dataclass(frozen=True)
class StepTimes:
    """One measured model on one card.

    Attributes:
        device: the card's name.
        model: what was measured.
        layers: those that cache keys and values.
        vllm: its version.
        date: ISO 8601.
        settings: label -> stored bits, and decode step times in ms as (requests, tokens of each, ms).
    """

    device: str
    model: str
    layers: Layers
    vllm: str
    date: str
    settings: Mapping[str, tuple[float, tuple[tuple[int, int, float], ...]]]

    def text_for(self, stored_bits: float) -> str | None:
        """What a step takes with so many stored bits, beside an unquantized cache; None where none is near."""
        packed = {label: each for label, each in self.settings.items() if label.startswith("kvtuner")}
        label = min(packed, key=lambda each: abs(packed[each][0] - stored_bits), default=None)
        if label is None or abs(packed[label][0] - stored_bits) > NEAR_BITS:
            return None
        bits, points = packed[label]
        auto = {(batch, context): ms for batch, context, ms in self.settings["auto"][1]}
        parts = [
            f"{batch} requests of {context:,} tokens {ms:.2f} ms (unquantized {auto[batch, context]:.2f})"
            for batch, context, ms in points
            if (batch, context) in auto
        ]
        where = f"{self.device}, vLLM {self.vllm}, {self.date}"
        return f"{', '.join(parts)}: measured with {self.model}'s layers at {bits:g} stored bits, {where}"


def read_step_times(path: Path = TABLE) -> tuple[StepTimes, ...]:
    """All that is in the file."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    assert plain["schema"] == SCHEMA, f"{path} comes with the package"
    return tuple(
        StepTimes(
            **{
                **each,
                "layers": tuple(map(tuple, each["layers"])),
                "settings": {
                    label: (bits, tuple(map(tuple, points))) for label, (bits, points) in each["settings"].items()
                },
            }
        )
        for each in plain["measured"]
    )


def render(measured: tuple[StepTimes, ...]) -> str:
    """The file's text."""
    lines = ",\n".join(json.dumps(asdict(each)) for each in measured)
    return f'{{"schema": "{SCHEMA}", "measured": [\n{lines}\n]}}\n'


def group(shapes: Iterable[tuple[int, int]]) -> Layers:
    """Layers of like shapes together.

    Args:
        shapes: KV heads and head size of each layer.
    """
    return tuple((count, *shape) for shape, count in sorted(Counter(shapes).items()))


def find(device: str, layers: Layers) -> StepTimes | None:
    """What was measured on this card with such layers."""
    return next((each for each in read_step_times() if each.device == device and each.layers == layers), None)
