"""What a pair alone means as a profile: all layers store it, with the best treatment that needs no data.

``K4V4`` is how a user asks for four bits, and without transforms four bits are noise on many models. ``K4V4:plain`` is
the format alone, for papers and tests.
"""

import re
from collections.abc import Mapping
from typing import Any

from vllm_kvtuner.pages.layout import FEEDBACK_BITS, PAIR_FORM, PrecisionPair
from vllm_kvtuner.profile.problems import ProfileError, show
from vllm_kvtuner.profile.profile import FROM_WEIGHTS, Profile, TransformSettings

PLAIN = "plain"
"""What follows a pair and a colon where the pair is to be stored without any treatment."""
RECENT_WINDOW = 64
"""Tokens of a pair's recent window, where it costs little enough (engine/pair_window.py)."""
SINK_TOKENS = 4

_WITH_SUFFIX = re.compile(rf"(?P<pair>{PAIR_FORM.pattern})(?::(?P<suffix>.*))?", re.IGNORECASE | re.DOTALL)


def is_pair(spec: str) -> bool:
    """Whether a profile's spec is a pair, right or wrong, rather than a file or a name."""
    return _WITH_SUFFIX.fullmatch(spec) is not None


def pair_profile(spec: str) -> Profile:
    """The profile that a pair alone means.

    Args:
        spec: such as ``K4V4`` or ``K4V4:plain``, in any case.

    Raises:
        ProfileError: no such pair, or another suffix than ``plain``.
    """
    match = _WITH_SUFFIX.fullmatch(spec)
    assert match is not None, spec
    try:
        pair = PrecisionPair.parse(match["pair"])
    except ValueError as error:
        raise ProfileError([f"{spec}: {error}"]) from None
    if (suffix := match["suffix"]) is None:
        return Profile(name=pair.name, source=None, pairs=pair, adapts=True, **treatment(pair))
    if suffix.lower() != PLAIN:
        raise ProfileError([f"{spec}: a pair must be followed by nothing or by :{PLAIN}, but got {show(suffix)}"])
    return Profile(name=f"{pair.name}:{PLAIN}", source=None, pairs=pair)


def treatment(pair: PrecisionPair) -> Mapping[str, Any]:
    """What layers of a pair do where nobody says more: all that is known to help and needs no data.

    The only place that says so. Whatever is learned to follow from weights alone belongs here, as key_offset and
    key_round_feedback do. Feedback of values does not (docs/notes/feedback-from-weights.md).

    Returns:
        Fields of :class:`Profile`.
    """
    if not pair.is_quantized:
        return {}
    transforms = TransformSettings(
        key_offset=FROM_WEIGHTS,
        key_hadamard=True,
        value_hadamard=True,
        range_search=min(pair.k_bits, pair.v_bits) < 8,
        key_round_feedback=FROM_WEIGHTS if pair.k_bits in FEEDBACK_BITS else False,
    )
    if min(pair.k_bits, pair.v_bits) >= 8:  # what 8 bits lose is too little for a window to matter
        return {"transforms": transforms}
    return {"transforms": transforms, "recent_window": RECENT_WINDOW, "sink_tokens": SINK_TOKENS}
