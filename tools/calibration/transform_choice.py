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

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from kvtuner_tools.bias_offset import key_offsets
from kvtuner_tools.calibration.artifacts import STATICS_FILE, digest, read_artifact, unquantized_tokens
from kvtuner_tools.calibration.captured import Capture, CapturedLayer
from kvtuner_tools.calibration.key_statics import PairLayout
from kvtuner_tools.calibration.transform_candidates import NEAR, TransformCandidate, TransformCandidates
from kvtuner_tools.progress import track
from kvtuner_tools.results import write_json
from vllm_kvtuner.pages.feedback import RoundFeedback
from vllm_kvtuner.pages.layout import FEEDBACK_BITS
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.profile import RecentWindow, TransformSettings
from vllm_kvtuner.profile.statics import RANGES_SUFFIX, save_statics

TRANSFORMS_SCHEMA = "kvtuner-transforms/2"
TRANSFORMS_FILE = "transforms.json"
"""Name of the choice in a calibration's output folder."""
DEFAULT_FLOOR = 0.05
"""Gain in output error below which a candidate is not told from the baseline."""
NO_TRANSFORMS, DATA_FREE, CHOSEN = "none", "data-free", "chosen"
"""Settings whose errors a choice tells: without transforms, the baseline, and what was chosen."""

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
    recent_window: RecentWindow | None = None,
    floor: float = DEFAULT_FLOOR,
    device: torch.device | str | None = None,
) -> TransformChoice:
    """Choose for every layer; write ``transforms.json`` and, where a layer needs it, ``statics.safetensors``.

    A choice that is there already, from the same capture, recent window and floor, is read instead.

    Args:
        capture: what to measure on.
        out_dir: the calibration's output folder.
        recent_window: tokens of each query that are not quantized; None where all are.
        floor: gain below which the baseline stays, 0 to 1.
        device: where to measure; by default the first GPU, or the CPU.

    Raises:
        ValueError: a floor out of range.
    """
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be at least 0 and below 1, but got {floor}")
    measured = {"capture": capture.inputs, "floor": floor, **unquantized_tokens(recent_window)}
    inputs = digest({**measured, "schema": TRANSFORMS_SCHEMA})
    if (found := _find(out_dir, inputs)) is not None:
        return found
    biases = _biases(capture)
    layout = pair_layout(capture)
    choices, statics = [], {}
    for layer in track(capture.layers, "transforms", "layer", total=len(capture.layers)):
        candidates = TransformCandidates(
            capture, layer, biases.get(layer.index), layout, recent_window, device or default_device()
        )
        chosen = _choose(candidates, floor)
        choices.append(_describe(layer, candidates, chosen))
        if chosen.settings.needs_statics:
            statics[layer.index] = candidates.statics(chosen)
        del candidates  # the layer's keys, values and weights, before the next one's are loaded
    if statics:
        metadata = {"model": capture.model["name"], "method": "calibration", "data": capture.data["source"]}
        save_statics(out_dir / STATICS_FILE, statics, metadata | ({} if layout is None else layout.metadata))
    result = TransformChoice(inputs, STATICS_FILE if statics else None, tuple(choices))
    result.write(out_dir)
    return result


def layer_transforms(
    chosen: Mapping[int, TransformSettings], statics: Path | None, device: torch.device | str = "cpu"
) -> dict[int, LayerTransforms]:
    """Each layer's transforms with their tensors, without rotary tables.

    Args:
        chosen: layer -> transforms.
        statics: the file that holds what they need; None where they need nothing.
        device: of the tensors.
    """
    tensors = {} if statics is None else load_file(statics, device=str(device))

    def feedback(name: str) -> RoundFeedback:
        ranges = {bits: tensors[name + RANGES_SUFFIX.format(bits=bits)] for bits in FEEDBACK_BITS}
        return RoundFeedback(tensors[name], {bits: tuple(each.tolist()) for bits, each in ranges.items()})

    def build(index: int, settings: TransformSettings) -> LayerTransforms:
        prefix = f"layers.{index}."
        return LayerTransforms(
            key_offset=tensors[prefix + "key_offset"] if settings.key_offset else None,
            key_equalization=tensors[prefix + "key_equalization"] if settings.key_equalization else None,
            key_hadamard=settings.key_hadamard,
            value_hadamard=settings.value_hadamard,
            range_search=settings.range_search,
            key_feedback=feedback(prefix + "key_round_feedback") if settings.key_round_feedback else None,
            value_feedback=feedback(prefix + "value_round_feedback") if settings.value_round_feedback else None,
        )

    return {index: build(index, settings) for index, settings in chosen.items()}


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _choose(candidates: TransformCandidates, floor: float) -> TransformCandidate:
    """The best transforms of one layer, each taken only where it gains more than ``floor``."""
    chosen = _least(candidates, floor)
    for fewer in candidates.with_fewer_pairs(chosen):
        if all(
            (1 - floor) * candidates.key_error(fewer, at) <= candidates.key_error(chosen, at)
            for at in candidates.positions
        ):
            chosen = fewer
            break
    unrotated = replace(chosen, value_hadamard=False)
    if candidates.value_error(unrotated) <= (1 - floor) * candidates.value_error(chosen):
        chosen = unrotated
    searched = replace(chosen, range_search=True)
    key_gain = max(candidates.key_ratio(chosen, at) / candidates.key_ratio(searched, at) for at in candidates.positions)
    value_gain = candidates.value_error(chosen) / candidates.value_error(searched)
    return searched if math.sqrt(key_gain * value_gain) > 1 - floor else chosen


def _least(candidates: TransformCandidates, floor: float) -> TransformCandidate:
    """The candidate with the fewest changes among those within ``floor`` of the best; the baseline if it is one.

    Far positions are only measured for candidates that may still be among them: a candidate's ratio is that of its
    worst positions, so never below the near one.
    """
    baseline, ratio = candidates.baseline, candidates.key_ratio
    ratios: dict[TransformCandidate, float] = {baseline: 1.0}
    best = 1.0
    for candidate in sorted(candidates.combinations(), key=lambda each: ratio(each, NEAR)):
        if ratio(candidate, NEAR) > best / (1 - floor):
            break
        ratios[candidate] = max(ratio(candidate, each) for each in candidates.positions)
        best = min(best, ratios[candidate])
    within = [candidate for candidate, each in ratios.items() if each * (1 - floor) <= best]
    return min(within, key=lambda each: (each.changes(baseline), ratios[each]))


def _describe(layer: CapturedLayer, candidates: TransformCandidates, chosen: TransformCandidate) -> LayerChoice:
    """What was chosen, beside what it is compared with."""
    told = {
        NO_TRANSFORMS: LayerTransforms(),
        DATA_FREE: candidates.transforms(replace(candidates.baseline, range_search=True)),
        CHOSEN: candidates.transforms(chosen),
    }
    return LayerChoice(
        index=layer.index,
        transforms=chosen.settings,
        offset=chosen.offset,
        offset_pairs=chosen.pairs,
        equalization=chosen.equalization,
        far_position=candidates.far_position,
        errors={setting: candidates.pair_errors(transforms) for setting, transforms in told.items()},
        note=layer.offset_unsupported,
    )


def _biases(capture: Capture) -> dict[int, torch.Tensor]:
    """Key offsets that need no data; none where the model has none."""
    try:
        offsets = key_offsets(capture.model["name"])
    except ProfileError as error:
        logger.info("no key offset from a bias: %s", error)
        return {}
    return {index: torch.from_numpy(statics.key_offset) for index, statics in offsets.items()}


def pair_layout(capture: Capture) -> PairLayout | None:
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
