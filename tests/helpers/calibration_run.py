"""Whole calibrations from a sensitivity table on, with a made-up engine."""

from dataclasses import replace

import numpy as np

from kvtuner_tools.calibration import pipeline
from kvtuner_tools.calibration.calibration_text import CalibrationText
from kvtuner_tools.calibration.feedback_choice import (
    FEEDBACK_STATICS_FILE,
    FeedbackChoice,
    LayerFeedback,
    SideChoice,
)
from kvtuner_tools.calibration.options import STAGES, CalibrationOptions, Texts
from kvtuner_tools.calibration.pipeline import Calibration
from kvtuner_tools.calibration.transform_choice import LayerChoice, TransformChoice
from tests.helpers.calibration import FakeEvaluator
from vllm_kvtuner.profile.profile import TransformSettings
from vllm_kvtuner.profile.statics import FeedbackStatics, LayerStatics, save_statics

AFTER_SENSITIVITY = STAGES[STAGES.index("sensitivity") + 1 :]
STATICS = TransformSettings(key_offset=True, key_hadamard=True, key_round_feedback=True)
FEEDBACK = FeedbackStatics(
    factors=np.broadcast_to(np.eye(64, dtype=np.float16), (2, 64, 64)),
    ranges={2: (0.75, 1.0), 4: (1.0,)},
    transforms=("key_hadamard",),
)
OFFSETS = {
    layer: LayerStatics(key_offset=np.full((2, 64), layer, dtype=np.float32), key_round_feedback=FEEDBACK)
    for layer in (0, 2, 3)
}


def texts():
    return Texts(
        *(
            CalibrationText("bundled", "ab" * 32, ((1, 2, 3, number),) * 2, ("generated", "prose"))
            for number in range(3)
        )
    )


def calibration(out, table, evaluators, monkeypatch, **options):
    """A calibration whose first stages have run; every engine that it starts is added to ``evaluators``."""

    def start(settings):
        evaluators.append(FakeEvaluator(table))
        return evaluators[-1]

    monkeypatch.setattr(pipeline, "start_engine", start)
    defaults = {"max_bits": 4.0, "trials": 30, "recent_window": 0, "sink_tokens": 0}
    options = CalibrationOptions(model="fake", **(defaults | options))
    made = Calibration(out, options, texts())
    table.write(out / "sensitivity.json")
    feedback = FeedbackChoice("made up", FEEDBACK_STATICS_FILE, tuple(map(feedback_of, table.layers)))
    feedback.write(out)
    layers = [LayerChoice(each.index, each.transforms, "mean", 8, "none", None, {}, None) for each in table.layers]
    TransformChoice("made up", None, tuple(layers)).write(out)
    save_statics(out / FEEDBACK_STATICS_FILE, OFFSETS, {"data": "bundled", "method": "test", "model": "fake"})
    return made


def feedback_of(layer):
    ranges = {str(bits): each for bits, each in FEEDBACK.ranges.items()}
    errors = {"nearest": {"2": 0.4, "4": 0.04}, "feedback": {"2": 0.1, "4": 0.01}}
    keys = SideChoice(layer.transforms.key_round_feedback, ranges, errors, 0.25)
    return LayerFeedback(layer.index, layer.transforms, keys, replace(keys, is_on=False, ratio=1.125), None, None)
