"""A measuring engine made of numbers: errors that add up over layers, and some that do not."""

import itertools
import random
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import sqlalchemy

from kvtuner_tools.calibration.artifacts import KEY_BITS_NAMES, PAIR_NAMES, LayerSensitivity, Quality, SensitivityTable
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS, PrecisionPair
from vllm_kvtuner.profile.profile import TransformSettings


@sqlalchemy.event.listens_for(sqlalchemy.Engine, "connect")
def _do_not_wait_for_the_disk(connection: object, _: object) -> None:
    """A killed process loses nothing by it, only a machine that stops would; studies in tests are many times faster."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


TRANSFORMS = TransformSettings(key_hadamard=True, value_hadamard=True)
_KEY_ERROR = {8: 0.004, 4: 0.06, 2: 0.5}
_VALUE_ERROR = {8: 0.003, 4: 0.05, 2: 0.25}


def sensitivity_table(num_layers: int = 8, seed: int = 0, **shape: object) -> SensitivityTable:
    """Layers of three kinds of sensitivity, each a little off its kind's."""
    random_ = random.Random(seed)
    layers = []
    for index in range(num_layers):
        strength = (0.4, 1.0, 3.0)[index % 3] * random_.uniform(0.95, 1.05)
        errors = {
            pair.name: strength * (_KEY_ERROR[pair.k_bits] ** 2 + _VALUE_ERROR[pair.v_bits] ** 2) ** 0.5
            for pair in QUANTIZED_PAIRS
        }
        assert set(errors) == set(PAIR_NAMES)
        layers.append(
            LayerSensitivity(
                index=index,
                num_kv_heads=2,
                head_size=64,
                sliding_window=None,
                transforms=TRANSFORMS,
                output_error=errors,
                score_error={name: strength * _KEY_ERROR[int(name[1:])] for name in KEY_BITS_NAMES},
                output_error_per_head={pair: (error * 0.9, error * 1.1) for pair, error in errors.items()},
            )
        )
    model = {"name": "fake", "architecture": "FakeForCausalLM", "num_layers": num_layers}
    return SensitivityTable(
        model={**model, "num_kv_heads": 2, "head_size": 64},
        data={"source": "bundled", "sha256": "0" * 64, "tokens": 4096, "windows": 2, "longest": 2048},
        seed=0,
        versions={"vllm-kvtuner": "0"},
        layers=tuple(layers),
    )


@dataclass
class FakeEvaluator:
    """KL is the sum of squared layer errors, and more where neighbours are both low: what no additive table knows.

    Args:
        table: the additive part.
        interaction: weight of the rest.
        seconds: what a score takes.
    """

    table: SensitivityTable
    interaction: float = 0.5
    seconds: float = 0.0
    scored: list[dict[int, PrecisionPair]] = field(default_factory=list)
    closed: bool = False

    def score(self, pairs: Mapping[int, PrecisionPair]) -> Quality:
        return self.score_tokens(pairs)[0]

    def score_tokens(self, pairs: Mapping[int, PrecisionPair]) -> tuple[Quality, np.ndarray]:
        """Tokens are hard or easy for all settings alike."""
        assert set(pairs) == {layer.index for layer in self.table.layers}
        self.scored.append(dict(pairs))
        time.sleep(self.seconds)
        errors = [
            layer.output_error[pairs[layer.index].name] if pairs[layer.index].is_quantized else 0.0
            for layer in self.table.layers
        ]
        kl = sum(error**2 for error in errors)
        kl += self.interaction * sum(a * b for a, b in itertools.pairwise(errors))
        tokens = kl * np.random.default_rng(0).exponential(size=1000)
        return Quality(kl, kl / 10, 10 * kl, 1 / (1 + kl), 10 + kl, 10.0, 1000), tokens.astype(np.float32)

    def close(self) -> None:
        self.closed = True
