"""Keep a profile where ``auto`` finds it: in the user's folder, or in the model's own."""

import hashlib
from pathlib import Path

import yaml

from kvtuner_tools.calibration.export import statics_name
from kvtuner_tools.calibration.outcome import REPORT_FILE, Heldout, SearchResult
from kvtuner_tools.calibration.verdict import judge
from kvtuner_tools.results import write_bytes
from vllm_kvtuner import envs
from vllm_kvtuner.profile.hub import FOLDER
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.problems import ProfileError, read_yaml


def profile_to_serve(out: Path) -> Path:
    """The file that a finished calibration's verdict is for.

    Args:
        out: its output folder.
    """
    return out / judge(Heldout.read(out), SearchResult.read(out).max_bits).file


def keep_for_user(profile: Path) -> Path | None:
    """Copy a calibrated profile, and its report, into the user's folder, under the digest of its model's weights.

    Its name has a digest of the file, so that it takes no other's place: which is best, ``auto`` decides.

    Args:
        profile: with its statics beside it.

    Returns:
        The copy; None for a profile that names no weights.
    """
    weights = load_profile(str(profile)).weights
    if weights is None:
        return None
    digest = hashlib.sha256(profile.read_bytes()).hexdigest()[:8]
    kept = copy_profile(profile, envs.profile_folder() / weights, f"{bits_name(profile)}-{digest}")
    report = profile.with_name(REPORT_FILE)
    if report.exists():
        write_bytes(kept.with_suffix(".html"), report.read_bytes())
    return kept


def keep_in_model(profile: Path, model: str) -> Path:
    """Copy a profile into a model's folder; one of as many bits is replaced.

    Args:
        profile: with its statics beside it.
        model: its folder.
    """
    return copy_profile(profile, Path(model) / FOLDER, bits_name(profile))


def bits_name(profile: Path) -> str:
    """What a profile is called in a folder of one model's: its stored bits.

    Raises:
        ProfileError: it names no model, which its stored bits depend on.
    """
    loaded = load_profile(str(profile))
    if loaded.model is None:
        rule = "model must be given, since a profile's name has its stored bits"
        raise ProfileError([f"{profile}: {rule}, but got none"])
    return f"{loaded.resolve(loaded.model).stored_bits:.2f}bit"


def copy_profile(profile: Path, folder: Path, name: str) -> Path:
    """Write a profile under another name, its statics beside it, each at once or not at all.

    Args:
        profile: to copy.
        folder: made if it does not exist.
        name: of the copy, without ``.yaml``.
    """
    document = read_yaml(profile, str(profile))
    target = folder / f"{name}.yaml"
    if "statics" in document:
        write_bytes(folder / statics_name(target), (profile.parent / document["statics"]).read_bytes())
        document["statics"] = statics_name(target)
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=110)
    write_bytes(target, text.encode(), check=lambda file: load_profile(str(file)))
    return target


def refuse_unwritable_model(model: str) -> None:
    """Refuse to keep a profile in a model's folder where there is none.

    Raises:
        ProfileError: the model is no folder.
    """
    if not Path(model).is_dir():
        rule = "--save-to-model must be given with a model's folder (kvtuner profile upload is for the hub)"
        raise ProfileError([f"{rule}, but got {model!r}"])
