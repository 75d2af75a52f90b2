"""Which file a calibration says to serve, by the difference on the same tokens."""

from dataclasses import replace

import numpy as np
import pytest

from kvtuner_tools.calibration.outcome import Heldout, Scored, paired_difference
from kvtuner_tools.calibration.verdict import judge
from tests.helpers.calibration import FakeEvaluator, sensitivity_table
from vllm_kvtuner.pages.layout import PrecisionPair

MIXED = {0: "K8V4", 1: "K4V2"}


def scored(origin, pairs, kl, stored):
    pairs = {layer: PrecisionPair.parse(pair) for layer, pair in pairs.items()}
    quality = replace(FakeEvaluator(sensitivity_table(2)).score(pairs), kl_mean=kl, kl_stderr=0.05)
    return Scored(None, origin, pairs, stored - 0.5, stored, quality)


def heldout(kl, difference, stderr, pairs=MIXED):
    uniform = scored("uniform K4V2", dict.fromkeys((0, 1), "K4V2"), kl + difference, 3.5)
    above = scored("uniform K8V8", dict.fromkeys((0, 1), "K8V8"), 0.0, 8.5)
    ours = scored("this profile", pairs, kl, 4.0)
    return Heldout(
        "", {}, (ours, uniform, above), {"uniform K4V2": (difference, stderr), "uniform K8V8": (-kl, 0.01)}, {}
    )


@pytest.mark.parametrize(
    ("difference", "tone", "file", "begin"),
    [
        (
            0.021,
            "good",
            "profile.yaml",
            "Serve profile.yaml: it is better than K4V2 with this calibration's transforms",
        ),
        (0.019, "neutral", "profile.yaml", "profile.yaml and uniform_K4V2.yaml"),
        (-0.019, "neutral", "uniform_K4V2.yaml", "profile.yaml and uniform_K4V2.yaml"),
        (
            -0.021,
            "bad",
            "uniform_K4V2.yaml",
            "Serve uniform_K4V2.yaml: K4V2 with this calibration's transforms is BETTER",
        ),
    ],
)
def test_two_standard_errors_of_the_paired_difference_decide(difference, tone, file, begin):
    """Those of the means, of 0.05 each, would never tell them apart."""
    verdict = judge(heldout(0.2, difference, 0.01), 4.0)
    assert (verdict.tone, verdict.file) == (tone, file)
    assert verdict.text.startswith(begin)
    more = "more" if difference > 0 else "less"
    assert "on the same 1,000 held-out tokens" in verdict.text
    assert f"the uniform setting's is {abs(difference):.5f} ± 0.01000 {more}" in verdict.text
    assert "3.500 stored bits (3.000 nominal)" in verdict.text
    assert verdict.serve.origin == ("this profile" if file == "profile.yaml" else "uniform K4V2")


def test_a_profile_is_not_compared_with_itself():
    verdict = judge(heldout(0.2, 0.1, 0.01, pairs={0: "K4V2", 1: "K16V16"}), 4.0)
    assert verdict.text.startswith("The profile is K4V2 with this calibration's transforms in all layers")
    assert (verdict.tone, verdict.file) == ("neutral", "profile.yaml") and "against" not in verdict.text


def test_without_a_uniform_setting_in_the_budget():
    verdict = judge(heldout(0.2, 0.1, 0.01), 3.0)
    assert verdict.text.startswith("No uniform setting fits the budget") and verdict.file == "profile.yaml"


def test_paired_difference():
    random = np.random.default_rng(0)
    hard = random.exponential(size=4000).astype(np.float32)
    noise = random.normal(size=4000).astype(np.float32) * 0.1
    mean, stderr = paired_difference(hard + 0.5 + noise, hard)
    assert mean == pytest.approx(0.5, abs=0.01)
    assert stderr == pytest.approx(0.1 / 4000**0.5, rel=0.05)
