"""Choose each layer's transforms by what they do to its measured attention, and make the statics they need.

Candidates for keys are all combinations of

- an offset: none, the k projection's bias where there is one, or the mean of the keys before RoPE;
- equalization: none, std(k)^0.5, or (std(k) / rms(q))^0.5, per RoPE pair;
- Hadamard or not.

Values have Hadamard or not. A candidate's score is the geometric mean of its output errors at 8, 4 and 2 bits over the
baseline's, at the captured positions or at far ones, whichever is worse. The baseline needs no data: the bias as offset
where there is one, Hadamard on keys and values, range search. It stays unless a candidate is better by the floor; among
candidates within the floor of the best, the one with the fewest changes from the baseline is taken.

An offset costs decoding time for every RoPE pair that it has, so only its largest pairs are kept, as few as come within
the floor of all.

Range search, which helps all candidates alike and costs most of the time, is left out while they are compared, and
given up for a layer only if that is better by the floor.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from kvtuner_tools.calibration.artifacts import STATICS_FILE, digest, read_artifact
from kvtuner_tools.calibration.attention_error import AttentionMeter
from kvtuner_tools.calibration.captured import Capture, CapturedLayer
from kvtuner_tools.calibration.key_statics import KeyStatics, PairLayout
from kvtuner_tools.results import write_json
from kvtuner_tools.statics import key_offsets
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import TransformSettings
from vllm_kvtuner.profile.statics import LayerStatics, save_statics

TRANSFORMS_SCHEMA = "kvtuner-transforms/2"
TRANSFORMS_FILE = "transforms.json"
"""Name of the choice in a calibration's output folder."""
DEFAULT_FLOOR = 0.05
"""Gain in output error below which a candidate is not told from the baseline."""
PAIRS_STEP = 8
"""Pairs of an offset that the decode kernel takes together."""
NO_TRANSFORMS, DATA_FREE, CHOSEN = "none", "data-free", "chosen"
"""Settings whose errors a choice tells: without transforms, the baseline, and what was chosen."""
NEAR, FAR = "near", "far"
"""Positions they were measured at: those captured, and the last ones of the model's rotary table."""

logger = logging.getLogger("kvtuner")


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for one layer, and what it does.

    Args:
        index: decoder layer.
        transforms: the choice.
        offset: where the key offset is from: ``none``, ``bias`` or ``mean``.
        offset_pairs: RoPE pairs that it keeps; None for all, or without one.
        equalization: what the factors are from: ``none``, ``keys`` or ``keys and queries``.
        far_position: first of the far positions; None where there are none.
        errors: setting (``none``, ``data-free``, ``chosen``) -> positions (``near``, ``far``) -> pair -> output error.
        note: why the layer had no candidates that need keys before RoPE, or None.
    """

    index: int
    transforms: TransformSettings
    offset: str
    offset_pairs: int | None
    equalization: str
    far_position: int | None
    errors: Mapping[str, Mapping[str, Mapping[str, float]]]
    note: str | None


@dataclass(frozen=True)
class TransformChoice:
    """Transforms of all layers.

    Args:
        inputs: digest of the capture and the settings that it follows from.
        statics: name of the safetensors file beside it, or None if no layer needs one.
        layers: in the model's order.
    """

    inputs: str
    statics: str | None
    layers: tuple[LayerChoice, ...]

    @property
    def transforms(self) -> dict[int, TransformSettings]:
        """Layer -> its transforms."""
        return {layer.index: layer.transforms for layer in self.layers}

    def write(self, out_dir: Path) -> None:
        """Write ``transforms.json``."""
        write_json(out_dir / TRANSFORMS_FILE, {"schema": TRANSFORMS_SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, out_dir: Path) -> "TransformChoice":
        """Read what :meth:`write` wrote.

        Raises:
            ProfileError: not readable, or of another schema.
        """
        path = out_dir / TRANSFORMS_FILE
        document = read_artifact(path, TRANSFORMS_SCHEMA, tuple(field.name for field in fields(cls)))
        layers = tuple(
            LayerChoice(**{**layer, "transforms": TransformSettings(**layer["transforms"])})
            for layer in document.pop("layers")
        )
        return cls(**document, layers=layers)


def choose_transforms(
    capture: Capture,
    out_dir: Path,
    *,
    recent_window: int = 0,
    sink_tokens: int = 0,
    floor: float = DEFAULT_FLOOR,
    device: torch.device | str | None = None,
) -> TransformChoice:
    """Choose for every layer; write ``transforms.json`` and, where a layer needs it, ``statics.safetensors``.

    A choice that is there already, from the same capture, recent window, sink tokens and floor, is read instead.

    Args:
        capture: what to measure on.
        out_dir: the calibration's output folder.
        recent_window: newest tokens of each query that are not quantized.
        sink_tokens: first tokens of each window of text that are not either.
        floor: gain below which the baseline stays, 0 to 1.
        device: where to measure; by default the first GPU, or the CPU.

    Raises:
        ValueError: a floor out of range.
    """
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be at least 0 and below 1, but got {floor}")
    unquantized = {"recent_window": recent_window, "sink_tokens": sink_tokens}
    inputs = digest({"capture": capture.inputs, "floor": floor, **unquantized, "schema": TRANSFORMS_SCHEMA})
    if (found := _find(out_dir, inputs)) is not None:
        return found
    biases = _biases(capture)
    layout = _pair_layout(capture)
    choices, statics = [], {}
    for layer in tqdm(capture.layers, desc="transforms", unit="layer"):
        choice, static = _choose(
            capture, layer, biases.get(layer.index), layout, unquantized, floor, device or default_device()
        )
        choices.append(choice)
        if choice.transforms.needs_statics:
            statics[layer.index] = static
    if statics:
        metadata = {"model": capture.model["name"], "method": "calibration", "data": capture.data["source"]}
        save_statics(out_dir / STATICS_FILE, statics, metadata | ({} if layout is None else layout.metadata))
    result = TransformChoice(inputs, STATICS_FILE if statics else None, tuple(choices))
    result.write(out_dir)
    return result


def layer_transforms(
    choice: TransformChoice, out_dir: Path, device: torch.device | str = "cpu"
) -> dict[int, LayerTransforms]:
    """Each layer's transforms with their tensors, without rotary tables."""
    tensors = {} if choice.statics is None else load_file(out_dir / choice.statics, device=str(device))

    def build(index: int, settings: TransformSettings) -> LayerTransforms:
        return LayerTransforms(
            key_offset=tensors[f"layers.{index}.key_offset"] if settings.key_offset else None,
            key_equalization=tensors[f"layers.{index}.key_equalization"] if settings.key_equalization else None,
            key_hadamard=settings.key_hadamard,
            value_hadamard=settings.value_hadamard,
            range_search=settings.range_search,
        )

    return {index: build(index, settings) for index, settings in choice.transforms.items()}


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class _Candidate:
    """A point of the space that is searched."""

    offset: str
    equalization: str = "none"
    pairs: int | None = None
    key_hadamard: bool = True
    value_hadamard: bool = True
    range_search: bool = False

    def changes(self, baseline: "_Candidate") -> int:
        mine, theirs = asdict(self), asdict(baseline)
        return sum(mine[name] != theirs[name] for name in mine)

    @property
    def settings(self) -> TransformSettings:
        return TransformSettings(
            key_offset=self.offset != "none",
            key_equalization=self.equalization != "none",
            key_hadamard=self.key_hadamard,
            value_hadamard=self.value_hadamard,
            range_search=self.range_search,
        )


def _choose(
    capture: Capture,
    layer: CapturedLayer,
    bias: torch.Tensor | None,
    layout: PairLayout | None,
    unquantized: Mapping[str, int],
    floor: float,
    device: torch.device | str,
) -> tuple[LayerChoice, LayerStatics]:
    windows, rotary = capture.load_layer(layer, device), capture.load_rotary(layer, device)
    offsets: dict[str, torch.Tensor | None] = {"none": None}
    factors: dict[str, torch.Tensor | None] = {"none": None}
    if layer.offset_unsupported is None:
        statics = KeyStatics.of(windows, None if rotary is None else rotary.near)
        offsets |= ({} if bias is None else {"bias": bias.to(device)}) | {"mean": statics.mean}
        if layout is not None:
            factors |= statics.factors(layout)
    meters = {NEAR: AttentionMeter(layer, windows, None if rotary is None else rotary.near, **unquantized)}
    if rotary is not None:
        meters[FAR] = meters[NEAR].at_far_positions(rotary)

    def key_offset(candidate: _Candidate) -> torch.Tensor | None:
        offset = offsets[candidate.offset]
        if offset is None or candidate.pairs is None:
            return offset
        assert rotary is not None
        return PairLayout(rotary.near.rotary_dim, rotary.near.is_neox).largest_pairs(offset, candidate.pairs)

    def transforms(candidate: _Candidate) -> LayerTransforms:
        return LayerTransforms(
            key_offset=key_offset(candidate),
            key_equalization=factors[candidate.equalization],
            key_hadamard=candidate.key_hadamard,
            value_hadamard=candidate.value_hadamard,
            range_search=candidate.range_search,
        )

    @functools.cache
    def key_error(candidate: _Candidate, positions: str) -> float:
        return _geometric_mean(meters[positions].key_errors(transforms(candidate)).values())

    @functools.cache
    def value_error(candidate: _Candidate) -> float:
        return _geometric_mean(meters[NEAR].value_errors(transforms(candidate)).values())

    baseline = _Candidate("none" if bias is None or "bias" not in offsets else "bias")

    def key_ratio(candidate: _Candidate, positions: str) -> float:
        return key_error(candidate, positions) / key_error(baseline, positions)

    combinations = itertools.product(offsets, factors, (True, False))
    candidates = [_Candidate(offset, factor, key_hadamard=rotated) for offset, factor, rotated in combinations]
    chosen = _least(baseline, candidates, key_ratio, meters, floor)
    if rotary is not None and chosen.offset != "none":
        for count in range(PAIRS_STEP, rotary.near.rotary_dim // 2, PAIRS_STEP):
            fewer = replace(chosen, pairs=count)
            if all((1 - floor) * key_error(fewer, at) <= key_error(chosen, at) for at in meters):
                chosen = fewer
                break
    if value_error(unrotated := replace(chosen, value_hadamard=False)) <= (1 - floor) * value_error(chosen):
        chosen = unrotated
    searched = replace(chosen, range_search=True)
    key_gain = max(key_ratio(chosen, positions) / key_ratio(searched, positions) for positions in meters)
    if math.sqrt(key_gain * value_error(chosen) / value_error(searched)) > 1 - floor:
        chosen = searched

    told = {
        NO_TRANSFORMS: LayerTransforms(),
        DATA_FREE: transforms(replace(baseline, range_search=True)),
        CHOSEN: transforms(chosen),
    }
    choice = LayerChoice(
        index=layer.index,
        transforms=chosen.settings,
        offset=chosen.offset,
        offset_pairs=chosen.pairs,
        equalization=chosen.equalization,
        far_position=None if rotary is None else rotary.far_position,
        errors={
            setting: {positions: _by_name(meter, each) for positions, meter in meters.items()}
            for setting, each in told.items()
        },
        note=layer.offset_unsupported,
    )
    offset, factor = key_offset(chosen), factors[chosen.equalization]
    return choice, LayerStatics(*(None if each is None else each.cpu().numpy() for each in (offset, factor)))


def _least(
    baseline: _Candidate,
    candidates: Iterable[_Candidate],
    ratio: Callable[[_Candidate, str], float],
    positions: Collection[str],
    floor: float,
) -> _Candidate:
    """The candidate with the fewest changes among those within ``floor`` of the best; the baseline if it is one.

    Far positions are only measured for candidates that may still be among them: a candidate's ratio is that of its
    worst positions, so never below the near one.
    """
    ratios: dict[_Candidate, float] = {baseline: 1.0}
    best = 1.0
    for candidate in sorted(candidates, key=lambda each: ratio(each, NEAR)):
        if ratio(candidate, NEAR) > best / (1 - floor):
            break
        ratios[candidate] = max(ratio(candidate, each) for each in positions)
        best = min(best, ratios[candidate])
    within = [candidate for candidate, each in ratios.items() if each * (1 - floor) <= best]
    return min(within, key=lambda each: (each.changes(baseline), ratios[each]))


def _by_name(meter: AttentionMeter, transforms: LayerTransforms) -> dict[str, float]:
    return {pair.name: error for pair, error in meter.pair_errors(transforms).output.items()}


def _geometric_mean(errors: Collection[float]) -> float:
    return math.exp(sum(map(math.log, errors)) / len(errors))


def _biases(capture: Capture) -> dict[int, torch.Tensor]:
    """Key offsets that need no data; none where the model has none."""
    try:
        offsets = key_offsets(capture.model["name"])
    except ProfileError as error:
        logger.info("no key offset from a bias: %s", error)
        return {}
    return {index: torch.from_numpy(statics.key_offset) for index, statics in offsets.items()}


def _pair_layout(capture: Capture) -> PairLayout | None:
    """Which channels RoPE pairs, in all layers; None where layers differ, which a statics file cannot say."""
    tables = {layer.rotary: layer for layer in capture.layers if layer.rotary is not None}
    found = set()
    for layer in tables.values():
        rotary = capture.load_rotary(layer)
        assert rotary is not None
        found.add(PairLayout(rotary.near.rotary_dim, rotary.near.is_neox))
    if len(found) > 1:
        logger.info("no equalization: layers rotate different channels (%s)", ", ".join(map(str, found)))
        return None
    return found.pop() if found else PairLayout(0, True)


def _find(out_dir: Path, inputs: str) -> TransformChoice | None:
    """The choice from the same inputs, if it is there."""
    try:
        found = TransformChoice.read(out_dir)
    except ProfileError:
        return None
    there = found.statics is None or (out_dir / found.statics).exists()
    return found if found.inputs == inputs and there else None
