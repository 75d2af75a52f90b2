"""Profiles in repositories of the Hugging Face hub, through huggingface_hub, which vLLM brings along.

Nothing of a repository is run: profiles are YAML that is read safely, statics are safetensors. A file is taken with
its commit's others, and everything lies in the hub's cache afterwards.
"""

import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from vllm_kvtuner.profile.problems import Problems, ProfileError, read_yaml, show

PREFIX = "hf://"
FORM = f"{PREFIX}ORG/REPO[@REVISION][/FILE.yaml]"
TIMEOUT_S = 10.0
"""Of one question to the hub."""
FOLDER = "kvtuner"
"""Where a model's folder or repository has its profiles."""

_SPEC = re.compile(
    rf"{PREFIX}(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/@]+))?(?:/(?P<file>[^@]+\.yaml))?", re.IGNORECASE
)
_MODEL_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Repository:
    """A model repository on the hub.

    Args:
        id: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        cache_dir: of downloads; None for the hub's own cache.
        token: of an account; None for what the hub's library finds, such as HF_TOKEN.
    """

    id: str
    revision: str | None = None
    cache_dir: str | None = None
    token: str | bool | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Fetched:
    """A profile of a repository, on this machine.

    Args:
        path: the file, with its statics beside it where it names some.
        commit: of the repository.
    """

    path: Path
    commit: str


def is_hub_spec(spec: str) -> bool:
    """Whether a profile's spec names a repository, right or wrong."""
    return spec.lower().startswith(PREFIX)


def is_model_id(model: str) -> bool:
    """Whether a model that is no folder can be one of the hub's."""
    return _MODEL_ID.fullmatch(model) is not None


def fetch_profile(spec: str, cache_dir: str | None = None, token: str | bool | None = None) -> Fetched:
    """Bring a profile of a repository here.

    Without a file, it is the repository's only one, in ``kvtuner/`` or, where that is none, at its root.

    Args:
        spec: ``hf://ORG/REPO[@REVISION][/FILE.yaml]``; a file of ``kvtuner/`` is found without the folder too.
        cache_dir: see :class:`Repository`, as for ``token``.

    Raises:
        ProfileError: no such spec, repository or file, several profiles, or no way to the hub.
    """
    repository, wanted = parse_spec(spec)
    repository = replace(repository, cache_dir=cache_dir, token=token)
    names = list_files(repository, spec)
    if wanted is not None:
        found = [name for name in (wanted, f"{FOLDER}/{wanted}") if name in names][:1]
    else:
        found = profiles_among(names) or [name for name in names if "/" not in name and name.endswith(".yaml")]
    if len(found) != 1:
        rule = "must name a file of the repository" if wanted else "must name one of the repository's profiles"
        there = [name for name in names if name.endswith(".yaml")]
        raise ProfileError([f"{spec}: profile {rule}, but got {wanted or 'none'}; it has {', '.join(there) or 'none'}"])
    return fetch_file(repository, found[0], spec)


def parse_spec(spec: str) -> tuple[Repository, str | None]:
    """The repository of a spec, and the file if it names one.

    Raises:
        ProfileError: not of that form.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ProfileError([f"{spec}: a profile of a repository must be {FORM}, but got {show(spec)}"])
    revision = None if match["revision"] is None else unquote(match["revision"])
    return Repository(match["repo"], revision), match["file"]


def profiles_among(names: list[str]) -> list[str]:
    """Those of a repository's files that ``auto`` looks at."""
    return [name for name in names if posixpath.dirname(name) == FOLDER and name.endswith(".yaml")]


def list_files(repository: Repository, asked: str) -> list[str]:
    """Names of a revision's files, sorted; those in the cache where there is no way to the hub.

    Args:
        repository: with its revision.
        asked: what problems are of.

    Raises:
        ProfileError: no such repository or revision, or no way to the hub and nothing in the cache.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    with hub_problems(asked):
        try:
            return sorted(HfApi(token=repository.token).list_repo_files(repository.id, revision=repository.revision))
        except HfHubHTTPError:
            raise  # the hub has answered
        except _unreachable():
            snapshot = local_snapshot(repository.id, repository.revision, repository.cache_dir)
            if snapshot is None:
                raise
            return sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())


def fetch_file(repository: Repository, name: str, asked: str) -> Fetched:
    """Bring one profile here, and the statics that it names.

    Args:
        repository: with its revision.
        name: of the profile in it.
        asked: what problems are of.

    Raises:
        ProfileError: a file is not there or cannot be brought, or the profile is no YAML.
    """
    with hub_problems(asked):
        path = _download(repository, name)
    commit = _commit(path)
    statics = read_yaml(path, asked).get("statics")
    if isinstance(statics, str):
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(name), statics))
        if inside.startswith(("..", "/")):
            problems = Problems(asked)
            problems.add("statics", "must name a file of the repository", show(statics))
            problems.raise_if_any()
        with hub_problems(f"{asked}: statics"):
            _download(replace(repository, revision=commit or repository.revision), inside)
    return Fetched(path, commit)


def local_snapshot(model: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """The folder in the cache that has a model's files of a revision; None where nothing was brought here yet."""
    if not is_model_id(model):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for name in ("config.json", "params.json", "README.md"):
        found = try_to_load_from_cache(model, name, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def refuse_unknown_model(model: str, revision: str | None, cache_dir: str | None) -> None:
    """Ask the hub once for a model that it has not brought here yet, before others ask it file by file for minutes.

    Raises:
        ProfileError: the hub has no such model or revision, or there is no way to it.
    """
    # Weights may lie in a folder of their own, configurations in the hub's cache.
    caches = {None, cache_dir}
    if not is_model_id(model) or any(local_snapshot(model, revision, each) is not None for each in caches):
        return
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        return
    if constants.HF_HUB_OFFLINE:
        return  # nobody asks it then
    rule = f"{model}: model must be a folder, or the id of a model that the hub has"
    try:
        HfApi().model_info(model, revision=revision, timeout=TIMEOUT_S)
    except RepositoryNotFoundError:
        raise ProfileError([f"{rule}, but it has none of that name for this account"]) from None
    except RevisionNotFoundError:
        raise ProfileError([f"{model}: revision must be one that the hub has, but got {revision!r}"]) from None
    except HfHubHTTPError:
        return  # it has answered; whoever reads the files says more
    except _unreachable() as error:
        raise ProfileError([f"{rule}, but it could not be asked: {error}"]) from None


def _download(repository: Repository, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            repository.id,
            name,
            revision=repository.revision,
            cache_dir=repository.cache_dir,
            token=repository.token,
        )
    )


def _commit(path: Path) -> str:
    """Of a file in the cache: ``.../snapshots/COMMIT/NAME``."""
    *_, last = (index for index, part in enumerate(path.parts) if part == "snapshots")
    return path.parts[last + 1]


def _unreachable() -> tuple[type[Exception], ...]:
    """What the hub's library raises where it cannot reach the hub, or must not, or is asked for what cannot be."""
    try:
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return (OSError, ValueError)
    # Its own errors are those of the library beneath too, whose name has changed more than once.
    beneath = (each for each in HfHubHTTPError.__mro__ if each.__name__ == "HTTPError")
    return (OSError, ValueError, *(each for each in beneath if issubclass(each, Exception)))


@contextmanager
def hub_problems(asked: str) -> Iterator[None]:
    """Turn the library's errors into a line.

    Raises:
        ProfileError: whatever went wrong.
    """
    try:
        yield
    except ProfileError:
        raise
    except ImportError:
        raise ProfileError([f"{asked}: profiles of the hub need the package huggingface_hub, but got none"]) from None
    except _unreachable() as error:
        reason = " ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
        raise ProfileError([f"{asked}: the hub must answer as asked, but got {reason}"]) from None
