"""Combinations of transforms for one layer, and what each does to its captured attention.

The baseline needs no data: the k projection's bias as offset where there is one, and Hadamard on keys and values.
"""

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from kvtuner_tools.calibration.attention_error import AttentionMeter
from kvtuner_tools.calibration.captured import Capture, CapturedLayer
from kvtuner_tools.calibration.key_statics import KeyStatics, PairLayout
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.profile import RecentWindow, TransformSettings
from vllm_kvtuner.profile.statics import LayerStatics

NONE, BIAS, MEAN = "none", "bias", "mean"
"""Where a key offset is from; the first stands for an equalization that is off too."""
NEAR, FAR = "near", "far"
"""Positions that errors are measured at: those captured, and the last ones of the model's rotary table."""
LEAST_ERROR = 1e-9
"""Relative errors below it, which fp32 does not tell from none, count as this: a layer without any has equal ones."""
PAIRS_STEP = 8
"""Pairs of an offset that the decode kernel takes together."""


@dataclass(frozen=True)
class TransformCandidate:
    """One combination.

    Args:
        offset: where the key offset is from: ``none``, ``bias`` or ``mean``.
        equalization: what the factors are from: ``none``, or a key of :meth:`KeyStatics.factors`.
        pairs: RoPE pairs that the offset keeps; None for all, or without one.
        key_hadamard: as in :class:`TransformSettings`, like the next two.
    """

    offset: str
    equalization: str = NONE
    pairs: int | None = None
    key_hadamard: bool = True
    value_hadamard: bool = True
    range_search: bool = False

    def changes(self, baseline: "TransformCandidate") -> int:
        """In how many fields it differs."""
        mine, theirs = asdict(self), asdict(baseline)
        return sum(mine[name] != theirs[name] for name in mine)

    @property
    def settings(self) -> TransformSettings:
        return TransformSettings(
            key_offset=self.offset != NONE,
            key_equalization=self.equalization != NONE,
            key_hadamard=self.key_hadamard,
            value_hadamard=self.value_hadamard,
            range_search=self.range_search,
        )


class TransformCandidates:
    """The candidates of one layer; each error is measured once.

    Args:
        capture: what to measure on.
        layer: of it.
        bias: key offset that needs no data, [num_kv_heads, head_size]; None where there is none.
        layout: which channels share a factor; None where none may.
        recent_window: tokens of each query that are not quantized.
        device: where to measure.

    Attributes:
        baseline: what needs no data, without range search.
        positions: those that are measured.
        far_position: first of the far positions; None where there are none.
    """

    def __init__(
        self,
        capture: Capture,
        layer: CapturedLayer,
        bias: torch.Tensor | None,
        layout: PairLayout | None,
        recent_window: RecentWindow | None,
        device: torch.device | str,
    ) -> None:
        windows, rotary = capture.load_layer(layer, device), capture.load_rotary(layer, device)
        near = None if rotary is None else rotary.near
        self._offsets: dict[str, torch.Tensor | None] = {NONE: None}
        self._factors: dict[str, torch.Tensor | None] = {NONE: None}
        if layer.offset_unsupported is None:
            statics = KeyStatics.of(windows, near)
            self._offsets |= ({} if bias is None else {BIAS: bias.to(device)}) | {MEAN: statics.mean}
            if layout is not None:
                self._factors |= statics.factors(layout)
        self._rotated = None if near is None else PairLayout(near.rotary_dim, near.is_neox)
        self._meters = {NEAR: AttentionMeter(layer, windows, near, recent_window)}
        if rotary is not None:
            self._meters[FAR] = self._meters[NEAR].at_far_positions(rotary)
        self.far_position = None if rotary is None else rotary.far_position
        self.positions = tuple(self._meters)
        self.baseline = TransformCandidate(BIAS if BIAS in self._offsets else NONE)
        self._key_errors: dict[tuple[TransformCandidate, str], float] = {}
        self._value_errors: dict[TransformCandidate, float] = {}

    def combinations(self) -> list[TransformCandidate]:
        """All of an offset, an equalization, and Hadamard on keys or not."""
        combinations = itertools.product(self._offsets, self._factors, (True, False))
        return [TransformCandidate(offset, factor, key_hadamard=rotated) for offset, factor, rotated in combinations]

    def with_fewer_pairs(self, candidate: TransformCandidate) -> Iterator[TransformCandidate]:
        """The same with an offset in fewer RoPE pairs, from the fewest on; none without an offset or rotation."""
        if self._rotated is not None and candidate.offset != NONE:
            for count in range(PAIRS_STEP, self._rotated.rotary_dim // 2, PAIRS_STEP):
                yield replace(candidate, pairs=count)

    def transforms(self, candidate: TransformCandidate) -> LayerTransforms:
        """With its tensors, without a rotary table."""
        return LayerTransforms(
            key_offset=self._key_offset(candidate),
            key_equalization=self._factors[candidate.equalization],
            key_hadamard=candidate.key_hadamard,
            value_hadamard=candidate.value_hadamard,
            range_search=candidate.range_search,
        )

    def statics(self, candidate: TransformCandidate) -> LayerStatics:
        """Its tensors, as a statics file holds them."""
        offset, factor = self._key_offset(candidate), self._factors[candidate.equalization]
        return LayerStatics(
            None if offset is None else offset.cpu().numpy(), None if factor is None else factor.cpu().numpy()
        )

    def key_error(self, candidate: TransformCandidate, positions: str) -> float:
        """Output error at quantized keys, the geometric mean over their bits."""
        if (known := self._key_errors.get((candidate, positions))) is not None:
            return known
        errors = self._meters[positions].key_errors(self.transforms(candidate))
        return self._key_errors.setdefault((candidate, positions), _geometric_mean(errors.values()))

    def key_ratio(self, candidate: TransformCandidate, positions: str) -> float:
        """Its key error over the baseline's."""
        return self.key_error(candidate, positions) / self.key_error(self.baseline, positions)

    def value_error(self, candidate: TransformCandidate) -> float:
        """As :meth:`key_error` of values, which positions do not change."""
        if (known := self._value_errors.get(candidate)) is not None:
            return known
        errors = self._meters[NEAR].value_errors(self.transforms(candidate))
        return self._value_errors.setdefault(candidate, _geometric_mean(errors.values()))

    def pair_errors(self, transforms: LayerTransforms) -> dict[str, dict[str, float]]:
        """Positions -> pair -> output error."""
        return {
            positions: {pair.name: error for pair, error in meter.pair_errors(transforms).output.items()}
            for positions, meter in self._meters.items()
        }

    def _key_offset(self, candidate: TransformCandidate) -> torch.Tensor | None:
        offset = self._offsets[candidate.offset]
        if offset is None or candidate.pairs is None:
            return offset
        assert self._rotated is not None
        return self._rotated.largest_pairs(offset, candidate.pairs)


def _geometric_mean(errors: Collection[float]) -> float:
    return math.exp(sum(math.log(max(error, LEAST_ERROR)) for error in errors) / len(errors))
