"""The Optuna study that a search lives in: everything a worker needs, who is at work, and what was left behind.

The study holds the plan and the engine's settings, so that a worker needs nothing but the storage and the model. Each
worker renews a line of its own; a trial whose worker is gone is put back in line with the parameters it has.
"""

import base64
import re
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from optuna.trial import TrialState

from kvtuner_tools.calibration.artifacts import digest, plain_window, read_window
from kvtuner_tools.calibration.cluster import Cluster
from kvtuner_tools.calibration.space import SearchSpace
from kvtuner_tools.engine_arguments import EngineWords, computed_by, placed_by
from vllm_kvtuner.profile.profile import RecentWindow, TransformSettings

PLAN = "plan"
TRIALS = "trials"
SEEDED = "seeded"
WORKER = "worker"
"""User attributes of the study: the plan, the evaluations wanted, that all seeds are in line; and of a
trial: who runs it. Each worker's own line is an attribute ``worker <id>``."""
OBJECTIVES = ("kl_mean", "stored_bits")
_BEAT_SECONDS = 15.0
_GONE_SECONDS = 90.0
"""A worker on another machine is gone when it has not renewed its line for this long."""


@dataclass(frozen=True)
class EvaluatorSpec:
    """What the measuring engine is built from.

    Args:
        model: folder or id.
        dtype: of the model.
        windows: token ids that every setting is scored on.
        transforms: of every layer that caches keys and values.
        statics: bytes of the statics file, or None.
        unquantized: layers that stay with vLLM's own cache.
        kv_memory_bytes: memory of the KV cache on each rank.
        recent_window: that of every quantized layer, if any.
        words: vLLM's engine arguments.
    """

    model: str
    dtype: str
    windows: tuple[tuple[int, ...], ...]
    transforms: Mapping[int, TransformSettings]
    statics: bytes | None
    unquantized: tuple[int, ...]
    kv_memory_bytes: int
    recent_window: RecentWindow | None = None
    words: EngineWords = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What scores follow from, as JSON's types: all but where the engine runs."""
        return {**self.to_plain(), "words": computed_by(self.words)}

    def placed(self, words: EngineWords) -> "EvaluatorSpec":
        """The same engine on another machine: arguments that say where it runs, instead of those that it has."""
        return replace(self, words={**computed_by(self.words), **(words or placed_by(self.words))})

    def to_plain(self) -> dict[str, Any]:
        """As JSON's types; :meth:`from_plain` reads it back."""
        statics = None if self.statics is None else base64.b64encode(self.statics).decode()
        transforms = {str(layer): list(each.names) for layer, each in self.transforms.items()}
        return {
            **vars(self),
            "windows": [list(window) for window in self.windows],
            "transforms": transforms,
            "statics": statics,
            "words": {name: list(words) for name, words in self.words.items()},
            **plain_window(self.recent_window),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "EvaluatorSpec":
        transforms = {
            int(layer): TransformSettings(**dict.fromkeys(names, True)) for layer, names in plain["transforms"].items()
        }
        return cls(
            model=plain["model"],
            dtype=plain["dtype"],
            windows=tuple(map(tuple, plain["windows"])),
            transforms=transforms,
            statics=None if plain["statics"] is None else base64.b64decode(plain["statics"]),
            unquantized=tuple(plain["unquantized"]),
            kv_memory_bytes=plain["kv_memory_bytes"],
            recent_window=read_window(plain),
            words=plain["words"],
        )


@dataclass(frozen=True)
class SearchPlan:
    """What is searched; two searches with equal plans are the same study.

    Args:
        space: the settings.
        max_bytes: the budget, bytes per token.
        sampler: one of ``sampling.SAMPLERS``.
        seed: of the sampler.
        engine: what settings are scored with.
    """

    space: SearchSpace
    max_bytes: int
    sampler: str
    seed: int
    engine: EvaluatorSpec

    @property
    def study_name(self) -> str:
        return f"kvtuner-{digest({**self.to_plain(), 'engine': self.engine.identity})[:16]}"

    def to_plain(self) -> dict[str, Any]:
        """As JSON's types; :meth:`from_plain` reads it back."""
        return {
            "clusters": [each.to_plain() for each in self.space.clusters],
            "shapes": {str(layer): list(shape) for layer, shape in self.space.shapes.items()},
            "max_bytes": self.max_bytes,
            "sampler": self.sampler,
            "seed": self.seed,
            "engine": self.engine.to_plain(),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "SearchPlan":
        clusters = tuple(map(Cluster.from_plain, plain["clusters"]))
        shapes = {int(layer): (heads, size) for layer, (heads, size) in plain["shapes"].items()}
        engine = EvaluatorSpec.from_plain(plain["engine"])
        return cls(SearchSpace(clusters, shapes), plain["max_bytes"], plain["sampler"], plain["seed"], engine)


def open_storage(url: str) -> RDBStorage:
    """The storage of an SQLAlchemy URL.

    Raises:
        ValueError: it cannot be opened.
    """
    # Workers that share an SQLite file wait for one another's writes.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return RDBStorage(url, engine_kwargs=engine)
    except Exception as error:  # SQLAlchemy's, the driver's and the import's errors have no common base
        missing = isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name
        reason = f"its driver, the package {missing}, is not installed" if missing else str(error).splitlines()[0]
        got = f"{url!r}: {reason}".replace(url, hide_password(url))
        raise ValueError(f"--storage must be a database that can be opened, but got {got}") from None


def hide_password(url: str) -> str:
    """The URL as messages may show it."""
    return re.sub(r"(://[^:/@]*):[^@/]+@", r"\1:***@", url)


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{path.resolve()}"


def create_study(storage: BaseStorage, plan: SearchPlan, sampler: optuna.samplers.BaseSampler) -> Study:
    """The plan's study, made or found again."""
    study = optuna.create_study(
        storage=storage,
        sampler=sampler,
        study_name=plan.study_name,
        directions=["minimize"] * len(OBJECTIVES),
        load_if_exists=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(list(OBJECTIVES))
    if PLAN not in study.user_attrs:
        study.set_user_attr(PLAN, plan.to_plain())
    return study


def find_plan(storage: BaseStorage, url: str, name: str | None) -> SearchPlan:
    """The plan of a study that another worker made.

    Args:
        storage: where it is.
        url: how the user calls the storage.
        name: the study's name; None takes the one that was made last.

    Raises:
        ValueError: no such study, or one that is no search of ours.
    """
    studies = {each.study_name: each for each in optuna.get_all_study_summaries(storage, include_best_trial=False)}
    ours = [each for each in studies.values() if PLAN in each.user_attrs]
    if name is None and ours:
        return SearchPlan.from_plain(ours[-1].user_attrs[PLAN])
    if name in studies and PLAN in studies[name].user_attrs:
        return SearchPlan.from_plain(studies[name].user_attrs[PLAN])
    known = ", ".join(each.study_name for each in ours) or "none"
    raise ValueError(f"{hide_password(url)}: --study must name a search in this storage ({known}), but got {name!r}")


@contextmanager
def at_work(study: Study) -> Iterator[str]:
    """Be known as a worker of the study; yields the worker's name."""
    name = f"{WORKER} {uuid.uuid4().hex}"
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_BEAT_SECONDS):
            study.set_user_attr(name, _line())

    study.set_user_attr(name, _line())
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield name
    finally:
        stop.set()
        thread.join()
        study.set_user_attr(name, None)


def reclaim(study: Study, me: str) -> None:
    """Put trials of workers that are gone back in line; they keep their numbers and the parameters they have."""
    # Trials first: whoever runs one of these has a line by then.
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    lines = {name: line for name, line in study.user_attrs.items() if name.startswith(f"{WORKER} ") and line}
    alive = {name for name, line in lines.items() if name == me or _is_alive(line)}
    for trial in running:
        worker = trial.user_attrs.get(WORKER)
        # A worker names itself right after it takes a trial: without a name, anyone alive may hold it.
        if worker not in alive and (worker is not None or alive <= {me}):
            put_back(study, trial._trial_id)


def put_back(study: Study, trial_id: int) -> None:
    """Put a trial back in line, unless it is finished."""
    with suppress(UpdateFinishedTrialError):
        study._storage.set_trial_state_values(trial_id, TrialState.WAITING)


def _line() -> dict[str, Any]:
    me = psutil.Process()
    return {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time(), "beat": time.time()}


def _is_alive(line: Mapping[str, Any]) -> bool:
    if line["host"] != socket.gethostname():
        return time.time() - line["beat"] < _GONE_SECONDS
    try:
        # The start tells it from a later process of the same number.
        return abs(psutil.Process(line["pid"]).create_time() - line["started"]) < 1
    except psutil.NoSuchProcess:
        return False
