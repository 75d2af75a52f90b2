"""Optuna's samplers, made so that what they propose follows from the seed, the trial's number and the trials before it.

A sampler that is kept over trials carries a random state that dies with the process. Here every trial, and every
parameter that is drawn by itself, has a random state of its own, so a search that was killed goes on as it would have.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

SAMPLERS = ("nsga2", "tpe", "moead")
POPULATION = 16
"""Trials of a generation: few, since a trial costs an evaluation and the first generation already holds good ones."""
Make = Callable[[int, int], BaseSampler]
"""A new sampler from a seed and the number of the trial that it is for."""


class PerTrialSampler(BaseSampler):
    """Asks a new sampler for every trial.

    Args:
        make: makes it.
        seed: of the search.
    """

    def __init__(self, make: Make, seed: int) -> None:
        self._make = make
        self._seed = seed
        self._sampler = self._fresh(0)

    def _fresh(self, number: int, parameter: str = "") -> BaseSampler:
        text = f"{self._seed} {number} {parameter}"
        return self._make(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]), number)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler = self._fresh(trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # Of a trial that was killed between two parameters, only the second is drawn again.
        sampler = self._fresh(trial.number, param_name)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler.after_trial(study, trial, state, values)


def make_sampler(name: str, seed: int) -> PerTrialSampler:
    """The sampler that ``--sampler`` names.

    Raises:
        ValueError: no such sampler, or one that cannot be had here.
    """
    makers: dict[str, Callable[[], Make]] = {"nsga2": lambda: _nsga2, "tpe": lambda: _tpe, "moead": _load_moead}
    if name not in makers:
        raise ValueError(f"--sampler must be one of {', '.join(SAMPLERS)}, but got {name!r}")
    return PerTrialSampler(makers[name](), seed)


def _nsga2(seed: int, number: int) -> BaseSampler:
    return NSGAIISampler(population_size=POPULATION, seed=seed)


def _tpe(seed: int, number: int) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=POPULATION)


def _load_moead() -> Make:
    try:
        import optunahub

        sampler_class = optunahub.load_module("samplers/moead").MOEADSampler
        _moead(sampler_class, 0, 0)
    except Exception as error:  # the package, the network, the registry or another version of it: all mean the same
        rule = "--sampler moead must be able to load samplers/moead from OptunaHub (pip install optunahub, network)"
        raise ValueError(f"{rule}, but got {type(error).__name__}: {error}") from None
    return lambda seed, number: _moead(sampler_class, seed, number)


def _moead(sampler_class: Any, seed: int, number: int) -> BaseSampler:
    """OptunaHub's MOEA/D keeps its neighbourhoods and the subproblem in turn in the object; both are set anew."""
    sampler = sampler_class(population_size=POPULATION, n_neighbors=POPULATION // 4, seed=seed)
    selection = sampler._elite_population_selection_strategy
    selection._compute_neighborhoods(selection._generate_weight_vectors(POPULATION, 2))
    sampler._child_generation_strategy._subproblem_id = number % POPULATION
    return sampler
