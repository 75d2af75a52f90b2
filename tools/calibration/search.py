"""Search the settings with Optuna: mean KL divergence and stored bits, both as small as can be, within a budget.

Proposals come from Optuna's sampler and, in turn with it, from the integer program over errors refitted to the scores
so far. A trial that proposes a known setting is answered from the study, and one over the budget is not scored: its
setting made to fit stands in line instead. So evaluations, which cost an engine's pass each, go to new settings within
the budget, and to the uniform ones that everything is compared with.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from kvtuner_tools.calibration.artifacts import Evaluator, Quality
from kvtuner_tools.calibration.greedy import greedy
from kvtuner_tools.calibration.integer_program import integer_program
from kvtuner_tools.calibration.outcome import Scored, SearchResult, Setting
from kvtuner_tools.calibration.refit import refit
from kvtuner_tools.calibration.space import Choice, SearchSpace
from kvtuner_tools.calibration.study import SEEDED, TRIALS, WORKER, SearchPlan, at_work, put_back, reclaim
from kvtuner_tools.progress import Progress
from vllm_kvtuner.pages.layout import PrecisionPair

BARREN_TRIALS = 100
"""Trials in a row without a new setting, after which the sampler has nothing more to say."""
LOWER_BUDGETS = 6
"""Budgets below the wanted one for which the integer program's choices are seeds too: a first Pareto front."""
PROBED_BITS = (4, 8)
"""Bits of keys and values beside which half as many are probed."""
PROBE = "probe"
"""How origins of probes begin."""
SOLVERS = {"integer_program": integer_program, "greedy": greedy}
"""Choices that take errors as additive."""
REFIT_EVERY = 2
"""Settings scored between two that the refitted integer program proposes."""
QUALITY = "quality"
ORIGIN = "origin"
REFITTED = "refitted"
REPAIR_OF = "repair_of"
DUPLICATE_OF = "duplicate_of"
"""User attributes of a trial: its scores, where a seed came from, the number of scores that its errors were refitted
to, the trial over the budget that it is made from, and the trial that already had its setting."""
BUDGET = "stored bits over the budget"
"""The constraint: kept where it is at most 0."""
_POLL_SECONDS = 2.0


def seeds(plan: SearchPlan) -> list[tuple[str, Choice]]:
    """Settings to score first, each once: uniform ones, probes, the greedy and the exact choice, exact ones of less.

    A probe takes bits from one cluster's keys or values in a uniform setting: their KL tells what these bits are worth.
    """
    space = plan.space
    found: list[tuple[str, Choice]] = []

    def add(origin: str, choice: Choice | None) -> None:
        if choice is not None and all(choice != known for _, known in found):
            found.append((origin, choice))

    for pair in space.uniform_pairs():
        add(f"uniform {pair}", space.choice_of(space.uniform(pair)))
    for origin, choice in _probes(plan):
        add(origin, choice)
    for name, solve in SOLVERS.items():
        add(name.replace("_", " "), solve(space.clusters, plan.max_bytes))
    least = space.bytes_per_token(space.cheapest())
    for step in range(LOWER_BUDGETS, 0, -1):
        lower = least + (plan.max_bytes - least) * step // (LOWER_BUDGETS + 1)
        add(f"integer program at {space.stored_bits(lower):.2f} stored bits", integer_program(space.clusters, lower))
    return found


def _probes(plan: SearchPlan) -> Iterator[tuple[str, Choice]]:
    """Around the uniform pair of keys and values of equal bits that is just above the budget."""
    space = plan.space
    nominal, _ = space.budget_bits(plan.max_bytes)
    bits = next((bits for bits in PROBED_BITS if bits >= nominal), PROBED_BITS[-1])
    base = space.choice_of(space.uniform(PrecisionPair(bits, bits)))
    if base is None:
        return
    for position, each in enumerate(space.clusters):
        for pair in (PrecisionPair(bits // 2, bits), PrecisionPair(bits, bits // 2)):
            if pair in each.pairs:
                yield f"{PROBE} {each.name} at {pair}", (*base[:position], pair, *base[position + 1 :])


def run_search(
    study: Study, plan: SearchPlan, make_evaluator: Callable[[], Evaluator], trials: int | None = None
) -> None:
    """Work on the study until it has the evaluations wanted; also what a worker that joins does.

    Args:
        study: made by ``study.create_study``.
        plan: its plan.
        make_evaluator: starts the measuring engine; called when the first setting has to be scored.
        trials: evaluations wanted, those of earlier runs included; None, for a worker that joins, takes what the study
            was last given, and leaves the seeds to whoever made it.
    """
    if trials is not None:
        study.set_user_attr(TRIALS, trials)
        if SEEDED not in study.user_attrs:
            for origin, choice in seeds(plan):
                study.enqueue_trial(_params(plan.space, choice), user_attrs={ORIGIN: origin}, skip_if_exists=True)
            study.set_user_attr(SEEDED, True)
    while SEEDED not in study.user_attrs:
        time.sleep(_POLL_SECONDS)  # whoever made the study is still putting its seeds in line
    with (
        Progress("search", "setting") as progress,
        closing(LazyEvaluator(make_evaluator, progress.restart)) as evaluator,
        at_work(study) as me,
    ):
        while _wait_for_turn(study, me, progress):
            _propose_refitted(study, plan)
            trial = study.ask()
            try:
                trial.set_user_attr(WORKER, me)
                _run_trial(study, plan, trial, evaluator)
            except UpdateFinishedTrialError:
                # SQLite has no row locks, so another worker may have taken the same trial from the queue, and have
                # ended it before this one asked for anything, or (skip_if_finished below) while it was scored here.
                continue
            except BaseException:
                put_back(study, trial._trial_id)
                raise
            _show_best(progress, study, plan)
        for pair in plan.space.uniform_pairs():
            pairs = plan.space.uniform(pair)
            is_fit = plan.space.bytes_of(pairs) <= plan.max_bytes
            if is_fit and plan.space.choice_of(pairs) is None and _uniform_attr(pair) not in study.user_attrs:
                study.set_user_attr(_uniform_attr(pair), asdict(evaluator.score(pairs)))


class LazyEvaluator:
    """An Evaluator that starts the engine when it is first needed: what is finished needs none.

    Args:
        make: starts it.
        started: called when it has started.
    """

    def __init__(self, make: Callable[[], Evaluator], started: Callable[[], None]) -> None:
        self._make, self._started = make, started
        self._evaluator: Evaluator | None = None

    def score(self, pairs: Mapping[int, PrecisionPair]) -> Quality:
        return self._running().score(pairs)

    def score_tokens(self, pairs: Mapping[int, PrecisionPair]) -> tuple[Quality, np.ndarray]:
        return self._running().score_tokens(pairs)

    def _running(self) -> Evaluator:
        if self._evaluator is None:
            self._evaluator = self._make()
            self._started()
        return self._evaluator

    def close(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()


def _wait_for_turn(study: Study, me: str, progress: Progress) -> bool:
    """True when a trial may be asked for, False when the search is done."""
    while True:
        reclaim(study, me)
        trials = study.get_trials(deepcopy=False)
        scored = sum(trial.state == TrialState.COMPLETE for trial in trials)
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        wanted = study.user_attrs[TRIALS]
        # Seeds are scored in any case, so they may be more than were wanted.
        seeds_left = sum(trial.state == TrialState.WAITING and ORIGIN in trial.user_attrs for trial in trials)
        progress.show(scored, max(wanted, scored + running + seeds_left))
        if seeds_left or (scored + running < wanted and _barren(trials) < BARREN_TRIALS):
            return True
        if not running:
            return False
        time.sleep(_POLL_SECONDS)  # another worker's trial may yet be put back


def _propose_refitted(study: Study, plan: SearchPlan) -> None:
    """Every now and then, put the setting in line that is best by errors learned from the study and is not known yet.

    What is put in line follows from the trials alone, so doing it again after a kill changes nothing.
    """
    trials = study.get_trials(deepcopy=False)
    scored = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    seeds_left = any(trial.state == TrialState.WAITING and ORIGIN in trial.user_attrs for trial in trials)
    if seeds_left or len(scored) % REFIT_EVERY:
        return
    space = plan.space
    choices = [_choice(space, trial) for trial in scored]
    scores = [(choice, trial.values[0]) for choice, trial in zip(choices, scored, strict=True)]
    within = [kl for choice, kl in scores if space.bytes_per_token(choice) <= plan.max_bytes]
    learned = refit(space.clusters, scores, near=min(within or [kl for _, kl in scores]))
    if (choice := integer_program(learned, plan.max_bytes, set(choices))) is not None:
        study.enqueue_trial(_params(space, choice), user_attrs={REFITTED: len(scored)}, skip_if_exists=True)


def _barren(trials: Sequence[FrozenTrial]) -> int:
    """Trials since the last one that was scored."""
    finished = [trial.state for trial in trials if trial.state.is_finished()]
    return next((n for n, state in enumerate(reversed(finished)) if state == TrialState.COMPLETE), len(finished))


def _run_trial(study: Study, plan: SearchPlan, trial: Trial, evaluator: LazyEvaluator) -> None:
    # Optuna samples when a parameter is first asked for, so never for a trial from the queue; NSGA-II gives a trial its
    # generation then, and one without is no parent.
    _ = trial.relative_params
    space = plan.space
    choice = tuple(
        PrecisionPair.parse(trial.suggest_categorical(each.name, [pair.name for pair in each.pairs]))
        for each in space.clusters
    )
    size = space.bytes_per_token(choice)
    trials = study.get_trials(deepcopy=False)
    this = trials[trial.number]
    if BUDGET not in this.constraints:  # it is there if the trial was put back
        trial.set_constraint(BUDGET, space.stored_bits(size) - space.stored_bits(plan.max_bytes))
    scored_or_before = (
        each
        for each in trials
        if each.state == TrialState.COMPLETE or (each.state == TrialState.RUNNING and each.number < trial.number)
    )
    same = (each for each in scored_or_before if each.params == trial.params)
    if (known := next(same, None)) is not None:
        trial.set_user_attr(DUPLICATE_OF, known.number)
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    elif size > plan.max_bytes and ORIGIN not in this.user_attrs:
        repaired = _params(space, space.repair(choice, plan.max_bytes))
        study.enqueue_trial(repaired, user_attrs={REPAIR_OF: trial.number}, skip_if_exists=True)
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    else:
        if QUALITY not in this.user_attrs:
            trial.set_user_attr(QUALITY, asdict(evaluator.score(space.pairs(choice))))
        quality = Quality(**trial.user_attrs[QUALITY])
        study.tell(trial, [quality.kl_mean, space.stored_bits(size)], skip_if_finished=True)


def _params(space: SearchSpace, choice: Choice) -> dict[str, str]:
    return {each.name: pair.name for each, pair in zip(space.clusters, choice, strict=True)}


def _choice(space: SearchSpace, trial: FrozenTrial) -> Choice:
    return tuple(PrecisionPair.parse(trial.params[each.name]) for each in space.clusters)


def _origin(plan: SearchPlan, trial: FrozenTrial) -> str:
    if REFITTED in trial.user_attrs:
        return f"refitted to {trial.user_attrs[REFITTED]} scores"
    if REPAIR_OF in trial.user_attrs:
        return f"{plan.sampler}, made to fit"
    return trial.user_attrs.get(ORIGIN, plan.sampler)


def _uniform_attr(pair: PrecisionPair) -> str:
    return f"uniform {pair}"


def _show_best(progress: Progress, study: Study, plan: SearchPlan) -> None:
    scored = scored_settings(study, plan)
    if any(_fits(each, plan) for each in scored):
        best = choose(scored, plan)
        text = f"{best.nominal_bits:.2f} nominal, {best.stored_bits:.2f} stored bits"
        progress.show(len(scored), note=f"best KL {best.quality.kl_mean:.5f} at {text}")


def scored_settings(study: Study, plan: SearchPlan) -> list[Scored]:
    """Everything that was scored, in the order of trials; last uniform settings that are no choice of candidates."""
    space = plan.space
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        pairs = space.pairs(_choice(space, trial))
        found.append(_scored(trial.number, _origin(plan, trial), pairs, space, trial.user_attrs[QUALITY]))
    for pair in space.uniform_pairs():
        if (quality := study.user_attrs.get(_uniform_attr(pair))) is not None:
            found.append(_scored(None, f"uniform {pair}", space.uniform(pair), space, quality))
    return found


def _scored(
    number: int | None, origin: str, pairs: dict[int, PrecisionPair], space: SearchSpace, quality: dict[str, Any]
) -> Scored:
    nominal, stored = space.bits(pairs)
    return Scored(number, origin, pairs, nominal, stored, Quality(**quality))


def _fits(each: Scored, plan: SearchPlan) -> bool:
    return plan.space.bytes_of(each.pairs) <= plan.max_bytes


def choose(scored: Sequence[Scored], plan: SearchPlan) -> Scored:
    """The setting within the budget with the least mean KL; of equal ones that of fewer bits, then the earlier."""
    within = [each for each in scored if _fits(each, plan)]
    return min(within, key=lambda each: (each.quality.kl_mean, each.stored_bits))


def allocate(plan: SearchPlan, budget: str) -> SearchResult:
    """The integer program's choice, with nothing scored.

    Args:
        plan: of the search that is not made.
        budget: in words.
    """
    space = plan.space
    choices = {name: solve(space.clusters, plan.max_bytes) for name, solve in SOLVERS.items()}
    plain = {name: {} if choice is None else space.pairs(choice) for name, choice in choices.items()}
    pairs = plain["integer_program"]
    assert pairs, "check_budget leaves room for the cheapest choice"
    return SearchResult(
        study="none",
        sampler="none",
        seed=plan.seed,
        budget=budget,
        max_bits=space.stored_bits(plan.max_bytes),
        data={},
        chosen=Setting(None, "integer program", pairs, *space.bits(pairs)),
        scored=(),
        trials={"scored": 0, "duplicates": 0, "over_budget": 0},
        evaluation_seconds=None,
        **plain,
    )


def search_result(study: Study, plan: SearchPlan, budget: str, data: Mapping[str, Any]) -> SearchResult:
    """What a search that is done found.

    Args:
        study: the search's.
        plan: its plan.
        budget: in words.
        data: identity of the text that settings were scored on.
    """
    space = plan.space
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    duplicates = sum(DUPLICATE_OF in trial.user_attrs for trial in trials)
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    choices = {name: solve(space.clusters, plan.max_bytes) for name, solve in SOLVERS.items()}
    scored = scored_settings(study, plan)
    return SearchResult(
        study=study.study_name,
        sampler=plan.sampler,
        seed=plan.seed,
        budget=budget,
        max_bits=space.stored_bits(plan.max_bytes),
        data=data,
        chosen=choose(scored, plan),
        scored=tuple(scored),
        trials={"scored": len(complete), "duplicates": duplicates, "over_budget": pruned - duplicates},
        evaluation_seconds=median(trial.duration.total_seconds() for trial in complete if trial.duration),
        **{name: {} if choice is None else space.pairs(choice) for name, choice in choices.items()},
    )
