"""What a calibration's report and summary are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from kvtuner_tools.calibration.artifacts import SensitivityTable
from kvtuner_tools.calibration.cluster import Cluster
from kvtuner_tools.calibration.feedback_choice import FeedbackChoice
from kvtuner_tools.calibration.options import CalibrationOptions
from kvtuner_tools.calibration.outcome import Heldout, SearchResult
from kvtuner_tools.calibration.prune import LayerCandidates
from kvtuner_tools.calibration.transform_choice import TransformChoice
from kvtuner_tools.calibration.verdict import Verdict, judge


@dataclass(frozen=True)
class ReportInputs:
    """The files of a finished calibration, read.

    Args:
        out: its folder.
        options: that it was run with.
        table: sensitivity of every layer.
        candidates: what pruning left.
        clusters: what shares a decision.
        result: what the search found.
        heldout: scores on text that nothing was chosen by.
        transforms: of all layers; None where none were asked for.
        feedback: round feedback of all layers; None where it was not asked for.
        study_figures: title -> figure of Optuna's; empty where no study was made.
        costs: stage -> seconds.
        device: the card or CPU of this machine.
    """

    out: Path
    options: CalibrationOptions
    table: SensitivityTable
    candidates: Sequence[LayerCandidates]
    clusters: Sequence[Cluster]
    result: SearchResult
    heldout: Heldout
    transforms: TransformChoice | None
    feedback: FeedbackChoice | None
    study_figures: Mapping[str, go.Figure]
    costs: Mapping[str, float]
    device: str

    @property
    def verdict(self) -> Verdict:
        return judge(self.heldout, self.result.max_bits)

    @property
    def shapes(self) -> dict[int, tuple[int, int]]:
        """KV heads and head size of every layer."""
        return {layer.index: (layer.num_kv_heads, layer.head_size) for layer in self.table.layers}
