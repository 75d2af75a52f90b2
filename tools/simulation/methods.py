"""Methods by the names that the command line has."""

from collections.abc import Callable, Sequence
from typing import Any

from kvtuner_tools.simulation.cache import Method
from kvtuner_tools.simulation.fp8 import Fp8
from kvtuner_tools.simulation.kivi import Kivi
from kvtuner_tools.simulation.kvarn import KVarN
from kvtuner_tools.simulation.kvquant import KvQuant
from kvtuner_tools.simulation.kvtuner import Kvtuner
from kvtuner_tools.simulation.lorc import Lorc
from kvtuner_tools.simulation.oscar import Oscar
from kvtuner_tools.simulation.pruning import H2O, SnapKv
from kvtuner_tools.simulation.qaq import Qaq
from kvtuner_tools.simulation.saw import Saw
from kvtuner_tools.simulation.think import Think
from vllm_kvtuner.profile.model_shape import ModelShape

KVTUNER = "kvtuner"
PRUNING: dict[str, type[SnapKv] | type[H2O]] = {"h2o": H2O, "snapkv": SnapKv}
"""Methods that drop tokens, behind whose share another method may follow."""
METHODS: dict[str, tuple[Callable[..., Method], tuple[type, ...]]] = {
    "fp8": (Fp8, (str,)),
    "kivi": (Kivi, (int, int)),
    "kvarn": (KVarN, (int, int)),
    "kvquant": (KvQuant, (int,)),
    "lorc": (Lorc, (float,)),
    "oscar": (Oscar, (int,)),
    "qaq": (Qaq, (float, float)),
    "saw": (Saw, (str,)),
    "think": (Think, (float, int)),
}
"""Name -> what makes the method, and the types of its parameters, each of which may be left out."""
NAMES = (*sorted([*METHODS, *PRUNING]), KVTUNER)


def parse_method(text: str, shape: ModelShape) -> Method:
    """The method of ``NAME[:PARAMETER...]``, such as ``kivi:2``, ``kvtuner:K4V2`` or ``snapkv:0.5:kvtuner:K4V4``.

    Args:
        text: as it was typed.
        shape: the model.

    Raises:
        ValueError: no such method, or parameters that it does not take.
    """
    name, _, rest = text.partition(":")
    if name == KVTUNER:
        if not rest:
            raise ValueError(f"{KVTUNER} must be followed by a profile, as in {KVTUNER}:K4V2, but got {text!r}")
        return Kvtuner(rest, shape)
    if name in PRUNING:
        share, _, inner = rest.partition(":")
        (kept,) = _parameters(name, [share or "0.2"], (float,), text)
        return PRUNING[name](kept, parse_method(inner, shape) if inner else None)
    if name not in METHODS:
        raise ValueError(f"a method must be one of {', '.join(NAMES)}, but got {text!r}")
    make, types = METHODS[name]
    return make(*_parameters(name, rest.split(":") if rest else [], types, text))


def _parameters(name: str, words: Sequence[str], types: tuple[type, ...], text: str) -> list[Any]:
    if len(words) > len(types):
        raise ValueError(f"{name} takes at most {len(types)} parameters, but got {text!r}")
    try:
        return [kind(word) for kind, word in zip(types, words, strict=False)]
    except ValueError:
        kinds = ", ".join(kind.__name__ for kind in types)
        raise ValueError(f"{name} takes parameters of the types {kinds}, but got {text!r}") from None
