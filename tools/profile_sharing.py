"""``kvtuner profile upload`` and ``download``: profiles in repositories of the Hugging Face hub."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from kvtuner_tools.calibration.keep import bits_name, copy_profile, profile_to_serve
from kvtuner_tools.calibration.outcome import HELDOUT_FILE, REPORT_FILE
from kvtuner_tools.results import write_bytes
from vllm_kvtuner.profile.hub import (
    FOLDER,
    PREFIX,
    Repository,
    fetch_file,
    hub_problems,
    list_files,
    parse_spec,
    profiles_among,
)
from vllm_kvtuner.profile.load import load_profile
from vllm_kvtuner.profile.places import heldout_kl
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.weights import ANY_WEIGHTS

CARD = "README.md"
CARD_MARK = "<!-- made by kvtuner profile upload -->"
"""By which a card is known that may be made anew; others are their authors'."""
TAGS = ("vllm", "kv-cache", "kvtuner")


def upload(source: Path, repo: str, *, private: bool, revision: str | None) -> list[str]:
    """Put a profile into a repository's ``kvtuner/``, with its statics, a report if there is one, and a model card.

    Args:
        source: a profile, or the output folder of a calibration, whose verdict says which.
        repo: ``org/name``; made if it is not there.
        private: of a repository that is made.
        revision: branch to put it on; None for the main one.

    Returns:
        Lines that say what was done and how to serve it.

    Raises:
        ProfileError: no such profile, or the hub does not take it.
    """
    from huggingface_hub import HfApi

    profile = _profile(source)
    repository = Repository(repo, revision)
    asked = f"{PREFIX}{repo}"
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="kvtuner-upload-") as folder, hub_problems(asked):
        staged = copy_profile(profile, Path(folder) / FOLDER, bits_name(profile))
        reports = (profile.with_suffix(".html"), profile.with_name(REPORT_FILE))  # of a kept one, of an output folder
        if (report := next((each for each in reports if each.exists()), None)) is not None:
            write_bytes(staged.with_suffix(".html"), report.read_bytes())
        api.create_repo(repo, private=private, exist_ok=True)
        there = list_files(repository, asked)
        if _may_write_card(repository, there):
            others = [
                fetch_file(repository, name, f"{asked}/{name}").path
                for name in profiles_among(there)
                if name != f"{FOLDER}/{staged.name}"
            ]
            write_bytes(Path(folder) / CARD, model_card(repo, sorted([*others, staged], key=_name)).encode())
        message = f"Precision profile of the KV cache, {staged.stem}"
        commit = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    spec = f"{PREFIX}{repo}@{commit.oid}/{staged.name}"
    lines = [f"uploaded {profile} as {FOLDER}/{staged.name}", f"commit   {commit.oid}"]
    if load_profile(str(profile)).weights is None:
        lines.append(f"note     model.weights names none: {ANY_WEIGHTS} weights of this shape are served with it")
    return [*lines, f"serve    vllm serve MODEL --kv-cache-dtype kvtuner --kvtuner-profile {spec}"]


def download(spec: str, out: Path) -> list[Path]:
    """Bring a repository's profiles into a folder, with their statics.

    Args:
        spec: ``org/repo``, ``org/repo@REVISION``, or with ``hf://`` before and a file behind.
        out: made if it does not exist; files of the same names are replaced.

    Raises:
        ProfileError: no such repository or file, no profiles in it, or one that does not load.
    """
    spec = spec if spec.lower().startswith(PREFIX) else f"{PREFIX}{spec}"
    repository, wanted = parse_spec(spec)
    there = list_files(repository, spec)
    names = [name for name in there if wanted in (None, name, Path(name).name) and name.endswith(".yaml")]
    names = profiles_among(names) or names
    if not names:
        rule = "the repository must have the profile" if wanted else f"the repository must have profiles in {FOLDER}/"
        raise ProfileError([f"{spec}: {rule}, but got {', '.join(there) or 'no files'}"])
    fetched = [fetch_file(repository, name, f"{spec}: {name}").path for name in names]
    return [copy_profile(path, out, path.stem) for path in fetched]


def model_card(repo: str, profiles: Sequence[Path]) -> str:
    """The README of a repository with profiles.

    Args:
        repo: its name.
        profiles: all that it will have.
    """
    models = [model for path in profiles if (model := load_profile(str(path)).model) is not None]
    bases = sorted({model.name for model in models if model.name.count("/") == 1})
    named = ", ".join(sorted({model.name for model in models})) or "any model"
    head = ["---", *_listed("base_model", bases), "library_name: vllm", *_listed("tags", TAGS), "---"]
    rows = ["| file | stored bits | x bf16 | window + sinks | KL, nats a token | weights |"]
    rows += ["| --- | ---: | ---: | ---: | ---: | --- |", *map(_row, profiles)]
    return "\n".join(
        [
            *head,
            CARD_MARK,
            f"# KV cache precision profiles of {named}",
            "",
            "Each keeps the layers of vLLM's KV cache at the bits that they can bear, with the plugin vllm-kvtuner.",
            "",
            *rows,
            "",
            "x bf16: tokens that fit in the same memory. KL: from the unquantized cache on held-out text, as",
            "calibration measured it. How each was made stands in its `provenance`.",
            "",
            "```bash",
            f"vllm serve {bases[0] if bases else 'MODEL'} --kv-cache-dtype kvtuner \\",
            f"  --kvtuner-profile {PREFIX}{repo}/{profiles[0].name}",
            "```",
            "",
        ]
    )


def _row(path: Path) -> str:
    profile = load_profile(str(path))
    assert profile.model is not None, "it was named by its bits"
    resolved = profile.resolve(profile.model)
    kl = heldout_kl(profile)
    cells = (
        f"`{FOLDER}/{path.name}`",
        f"{resolved.stored_bits:.3f}",
        f"{resolved.bf16_bytes_per_token / resolved.bytes_per_token:.2f}",
        f"{profile.recent_window} + {profile.sink_tokens}",
        "-" if kl is None else f"{kl:.4f}",
        profile.weights or "not named",
    )
    return f"| {' | '.join(cells)} |"


def _profile(source: Path) -> Path:
    """The profile that is meant by a file or a calibration's folder."""
    if source.is_file():
        return source
    if (source / HELDOUT_FILE).exists():
        return profile_to_serve(source)
    rule = "must be a profile, or the output folder of a calibration that has ended"
    raise ProfileError(
        [f"{source}: what is uploaded {rule}, but got {'a folder' if source.is_dir() else 'no such file'}"]
    )


def _may_write_card(repository: Repository, names: Iterable[str]) -> bool:
    if CARD not in names:
        return True
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repository.id, CARD, revision=repository.revision))
    return CARD_MARK in path.read_text(encoding="utf-8", errors="replace")


def _listed(key: str, values: Iterable[str]) -> list[str]:
    """A list in YAML, nothing for none."""
    lines = [f"- {value}" for value in values]
    return [f"{key}:", *lines] if lines else []


def _name(path: Path) -> str:
    return path.name
