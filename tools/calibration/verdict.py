"""Which of a calibration's files to serve: the searched profile, or the uniform pair that it must beat to be worth it.

Both were scored on the same tokens, so they are compared by the difference of each token's KL, whose standard error is
a fraction of that of either mean.
"""

from dataclasses import dataclass

from kvtuner_tools.calibration.outcome import PROFILE_FILE, Heldout, Scored, bits_text, label, uniform_file

GOOD, NEUTRAL, BAD = "good", "neutral", "bad"
SURE = 2
"""Standard errors beyond which a difference is one."""


@dataclass(frozen=True)
class Verdict:
    """What came of a calibration.

    Args:
        text: one sentence or two.
        tone: ``good``, ``neutral`` or ``bad`` news of the search.
        serve: the setting to serve.
        file: its file in the output folder.
    """

    text: str
    tone: str
    serve: Scored
    file: str


def judge(heldout: Heldout, max_bits: float) -> Verdict:
    """Compare the profile with the best uniform setting within the budget.

    Args:
        heldout: complete.
        max_bits: the budget in stored bits.
    """
    ours = heldout.chosen
    if heldout.uniform_pair is not None:
        name = label(f"uniform {heldout.uniform_pair}")
        text = f"The profile is {name} in all layers: no mix of pairs within the budget scored better in the search."
        return Verdict(text, NEUTRAL, ours, PROFILE_FILE)
    rival = heldout.rival(max_bits)
    if rival is None:
        text = "No uniform setting fits the budget, so there is nothing simpler to compare the profile with."
        return Verdict(text, NEUTRAL, ours, PROFILE_FILE)
    difference, stderr = heldout.differences[rival.origin]
    tokens = ours.quality.num_tokens
    numbers = (
        f"KL {ours.quality.kl_mean:.5f} at {bits_text(ours)} against {rival.quality.kl_mean:.5f} at "
        f"{bits_text(rival)}; on the same {tokens:,} held-out tokens, the uniform setting's is {abs(difference):.5f} ± "
        f"{stderr:.5f} {'more' if difference > 0 else 'less'}"
    )
    their_file = uniform_file(rival)
    if difference > SURE * stderr:
        text = f"Serve {PROFILE_FILE}: it is better than {label(rival.origin)}, the best uniform setting ({numbers})."
        return Verdict(text, GOOD, ours, PROFILE_FILE)
    if difference < -SURE * stderr:
        text = f"Serve {their_file}: {label(rival.origin)} is BETTER than the searched profile ({numbers})."
        return Verdict(text, BAD, rival, their_file)
    serve, file = (rival, their_file) if difference < 0 else (ours, PROFILE_FILE)
    text = f"{PROFILE_FILE} and {their_file}, {label(rival.origin)}, are equally good within {SURE} standard errors"
    return Verdict(f"{text} ({numbers}). Serve {file}, whose KL is less.", NEUTRAL, serve, file)
