"""How sensitive each layer is to the precision of its keys and values: errors of all pairs on captured samples."""

from pathlib import Path

import torch

from kvtuner_tools.calibration.artifacts import LayerSensitivity, SensitivityTable
from kvtuner_tools.calibration.attention_error import AttentionMeter
from kvtuner_tools.calibration.captured import Capture
from kvtuner_tools.calibration.feedback_choice import FeedbackChoice
from kvtuner_tools.calibration.table_stages import SENSITIVITY_FILE
from kvtuner_tools.calibration.transform_choice import TransformChoice, default_device, layer_transforms
from kvtuner_tools.progress import track
from vllm_kvtuner.pages.transforms import LayerTransforms
from vllm_kvtuner.profile.profile import RecentWindow, TransformSettings


def measure_sensitivity(
    capture: Capture,
    choice: TransformChoice | FeedbackChoice | None,
    out_dir: Path,
    *,
    recent_window: RecentWindow | None = None,
    device: torch.device | str | None = None,
) -> SensitivityTable:
    """Measure every layer at the captured positions and write ``sensitivity.json``.

    With round feedback, output errors are counted as what reads the outputs counts them: it trades errors that nothing
    reads for those that count.

    Args:
        capture: what to measure on.
        choice: each layer's transforms; None measures without any, which is the published method's setting.
        out_dir: the calibration's output folder; holds the choice's statics.
        recent_window: tokens of each query that are not quantized; None where all are.
        device: where to measure; by default the first GPU, or the CPU.
    """
    device = device or default_device()
    built = {}
    if choice is not None:
        statics = None if choice.statics is None else out_dir / choice.statics
        built = layer_transforms(choice.transforms, statics, device)
    is_weighted = isinstance(choice, FeedbackChoice)
    layers = []
    for layer in track(capture.layers, "sensitivity", "layer", total=len(capture.layers)):
        rotary = capture.load_rotary(layer, device)
        near = None if rotary is None else rotary.near
        gram = capture.load_output_gram(layer, device) if is_weighted else None
        meter = AttentionMeter(layer, capture.load_layer(layer, device), near, recent_window, gram)
        errors = meter.pair_errors(built.get(layer.index, LayerTransforms()))
        layers.append(
            LayerSensitivity(
                index=layer.index,
                num_kv_heads=layer.num_kv_heads,
                head_size=layer.head_size,
                sliding_window=layer.sliding_window,
                transforms=TransformSettings() if choice is None else choice.transforms[layer.index],
                output_error={pair.name: error for pair, error in errors.output.items()},
                score_error={f"K{bits}": error for bits, error in errors.score.items()},
                output_error_per_head={pair.name: heads for pair, heads in errors.output_per_head.items()},
            )
        )
    table = SensitivityTable(
        model=capture.model, data=capture.data, seed=capture.seed, versions=capture.versions, layers=tuple(layers)
    )
    table.write(out_dir / SENSITIVITY_FILE)
    return table
