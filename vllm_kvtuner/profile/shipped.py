"""The profiles that come with this package.

Those in the folder itself were measured as they are served, and their names have their stored bits. Those in
``published/`` are allocations that a paper found for another format; they keep the publication's names, which have
nominal bits, and nobody has measured them as they are served here.
"""

from pathlib import Path

PUBLISHED = "published/"
"""How names of published allocations begin; they are found without it too."""
EARLIER_NAMES = {
    "smollm2_135m_window_4.00bit": "smollm2_135m_window_4.50bit",
    "smollm2_135m_window_5.00bit": "smollm2_135m_window_5.50bit",
}
"""Names with nominal bits, which measurements of their time have, and those now. No name has had two meanings."""
_LARGE = "qwen25_coder_1.5b_feedback"
_SMALL, _SMOL = "qwen25_coder_0.5b_feedback_3.50bit", "smollm2_135m_feedback_3.50bit"
REPLACED = {
    **dict.fromkeys((f"qwen25_coder_1.5b_{bits}bit" for bits in ("5.25", "5.00", "4.25", "4.00")), f"{_LARGE}_4.25bit"),
    **dict.fromkeys((f"qwen25_coder_1.5b_{bits}bit" for bits in ("3.50", "3.25")), f"{_LARGE}_3.50bit"),
    **dict.fromkeys((f"qwen25_coder_1.5b_{bits}bit" for bits in ("uniform_3.25", "3.00")), f"{_LARGE}_3.00bit"),
    **dict.fromkeys((f"qwen25_coder_1.5b_window_{bits}bit" for bits in ("4.25", "4.00")), f"{_LARGE}_4.25bit"),
    **dict.fromkeys((f"qwen25_coder_1.5b_window_{bits}bit" for bits in ("3.50", "3.25")), f"{_LARGE}_3.50bit"),
    **dict.fromkeys((f"qwen25_coder_1.5b_window_{bits}bit" for bits in ("3.00", "2.75")), f"{_LARGE}_3.00bit"),
    **dict.fromkeys((f"qwen25_coder_0.5b_{bits}bit" for bits in ("3.50", "4.25", "5.25")), _SMALL),
    **dict.fromkeys((f"qwen25_coder_0.5b_{bits}bit" for bits in ("3.00", "3.75", "4.75")), _SMALL),
    **dict.fromkeys((f"smollm2_135m_{bits}bit" for bits in ("3.50", "4.23", "5.23")), _SMOL),
    **dict.fromkeys((f"smollm2_135m_{bits}bit" for bits in ("3.00", "3.73", "4.73")), _SMOL),
    **dict.fromkeys((f"smollm2_135m_window_{bits}bit" for bits in ("3.50", "3.00")), _SMOL),
}
"""Names of profiles that have left, those with nominal bits included, and what has less loss in no more bits.

They are refused, since another profile under an old name would change what a server stores without a word.
"""


def shipped_profiles() -> dict[str, Path]:
    """Name (without ``.yaml``) and file of each shipped profile, sorted, the measured ones first."""
    package = Path(__file__).resolve().parent.parent
    # A wheel holds the folder inside the package, a checkout (or an editable install) beside it.
    folders = (package / "precision_profiles", package.parent / "precision_profiles")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        return {}
    return {prefix + path.stem: path for prefix in ("", PUBLISHED) for path in sorted((folder / prefix).glob("*.yaml"))}


def find_shipped(name: str) -> Path | None:
    """The file of a shipped profile; None where there is none of that name.

    Args:
        name: with or without ``published/`` and ``.yaml``, or an earlier one.
    """
    shipped = shipped_profiles()
    name = name.removesuffix(".yaml")
    wanted = (name, PUBLISHED + name, EARLIER_NAMES.get(name, name))
    return next((shipped[each] for each in wanted if each in shipped), None)
