"""The search on a made-up engine: what it finds, what it spends, and what a kill leaves behind."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from kvtuner_tools.calibration import sampling
from kvtuner_tools.calibration import search as search_module
from kvtuner_tools.calibration.cluster import cluster
from kvtuner_tools.calibration.prune import prune
from kvtuner_tools.calibration.sampling import make_sampler
from kvtuner_tools.calibration.search import run_search, scored_settings, search_result
from kvtuner_tools.calibration.space import SearchSpace, bytes_for_bits
from kvtuner_tools.calibration.study import (
    EvaluatorSpec,
    SearchPlan,
    create_study,
    find_plan,
    open_storage,
    reclaim,
    sqlite_url,
)
from tests.helpers.calibration import TRANSFORMS, FakeEvaluator, sensitivity_table
from vllm_kvtuner.pages.layout import UNQUANTIZED, PrecisionPair

TABLE = sensitivity_table(9)
TRIALS = 40
WRITES = (
    "_set_trial_param",
    "create_new_trial",
    "set_study_system_attr",
    "set_study_user_attr",
    "set_trial_state_values",
    "set_trial_system_attr",
    "set_trial_user_attr",
)
"""Everything that a search writes to its storage."""


@pytest.fixture(autouse=True)
def quiet_optuna():
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def make_plan(max_bits=4.0, sampler="nsga2", seed=0, table=TABLE, unquantized=()):
    clusters = cluster(prune(table, unquantized=unquantized, keep_all=True))
    shapes = {layer.index: (layer.num_kv_heads, layer.head_size) for layer in table.layers}
    engine = EvaluatorSpec(
        model="fake",
        dtype="bfloat16",
        windows=((1, 2, 3),),
        transforms={layer.index: TRANSFORMS for layer in table.layers},
        statics=b"\x00\xff",
        unquantized=unquantized,
        kv_memory_bytes=1 << 20,
    )
    return SearchPlan(SearchSpace(clusters, shapes), bytes_for_bits(max_bits, shapes), sampler, seed, engine)


def searched(plan, trials=TRIALS, storage=None, evaluator=None, table=TABLE):
    storage = storage or InMemoryStorage()
    evaluator = evaluator or FakeEvaluator(table)
    study = create_study(storage, plan, make_sampler(plan.sampler, plan.seed))
    run_search(study, plan, lambda: evaluator, trials)
    return study, evaluator


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
@pytest.mark.parametrize("max_bits", [3.5, 4.0, 5.25])
def test_never_worse_than_its_seeds_and_within_the_budget(sampler, max_bits):
    plan = make_plan(max_bits, sampler)
    study, _ = searched(plan)
    result = search_result(study, plan, "test", {})
    chosen = result.chosen
    assert chosen.stored_bits <= max_bits
    within = [each for each in result.scored if each.stored_bits <= max_bits]
    assert chosen.quality.kl_mean == min(each.quality.kl_mean for each in within)
    seeds = {each.origin for each in within}
    assert "uniform K2V2" in seeds and "integer program" in seeds
    for pairs in (result.greedy, result.integer_program):
        assert result.find(pairs) in within
    # Uniform settings that are no choice of candidates are scored too where they fit.
    fake = FakeEvaluator(TABLE)
    for pair in plan.space.uniform_pairs():
        uniform = plan.space.uniform(pair)
        if plan.space.bits(uniform)[1] <= max_bits:
            assert chosen.quality.kl_mean <= fake.score(uniform).kl_mean


@pytest.mark.slow
def test_finds_what_additive_errors_do_not_show():
    # A layer that hurts far more than its own error tells.
    class Skewed(FakeEvaluator):
        def score(self, pairs):
            quality = super().score(pairs)
            extra = 40 * TABLE.layers[0].output_error[pairs[0].name] ** 2
            return replace(quality, kl_mean=quality.kl_mean + extra)

    plan = make_plan(4.1)
    study, _ = searched(plan, 60, evaluator=Skewed(TABLE))
    result = search_result(study, plan, "test", {})
    exact = result.find(result.integer_program)
    assert result.chosen.quality.kl_mean < 0.9 * exact.quality.kl_mean


@pytest.mark.slow
def test_seeds_count_as_wanted_in_what_progress_says(monkeypatch):
    said = []
    monkeypatch.setattr(search_module.Progress, "show", lambda _, done, total=None, note=None: said.append(total))
    study, evaluator = searched(make_plan(4.0), trials=1)
    totals = [total for total in said if total is not None]
    assert len(evaluator.scored) > 1 and min(totals) >= len(study.get_trials(states=(TrialState.COMPLETE,)))


@pytest.mark.slow
def test_every_setting_is_scored_once_and_none_over_the_budget_but_seeds():
    plan = make_plan(4.0)
    study, evaluator = searched(plan)
    settings = [tuple(sorted(pairs.items())) for pairs in evaluator.scored]
    assert len(settings) == len(set(settings))
    over = [pairs for pairs in evaluator.scored if plan.space.bytes_of(pairs) > plan.max_bytes]
    # Uniform ones, and probes around one.
    assert all(Counter(pairs.values()).most_common(1)[0][1] >= len(pairs) - 2 for pairs in over) and over
    for trial in study.trials:
        pairs = plan.space.pairs(tuple(PrecisionPair.parse(trial.params[c.name]) for c in plan.space.clusters))
        excess = plan.space.bits(pairs)[1] - plan.space.stored_bits(plan.max_bytes)
        assert trial.constraints == {"stored bits over the budget": pytest.approx(excess)}
        if trial.state == TrialState.COMPLETE:
            assert trial.values == [FakeEvaluator(TABLE).score(pairs).kl_mean, pytest.approx(plan.space.bits(pairs)[1])]
    known = {trial.number: trial.params for trial in study.trials if trial.state == TrialState.COMPLETE}
    duplicates = [trial for trial in study.trials if "duplicate_of" in trial.user_attrs]
    assert duplicates and all(known[trial.user_attrs["duplicate_of"]] == trial.params for trial in duplicates)
    assert len(known) == TRIALS


@pytest.mark.slow
def test_seeds_are_parents_of_the_next_generation():
    study, _ = searched(make_plan())
    seeds = [trial for trial in study.trials if "origin" in trial.user_attrs]
    assert seeds and all(any("generation" in key for key in trial.system_attrs) for trial in seeds)


def test_probes_take_bits_from_one_cluster_at_a_time():
    plan = make_plan(4.0)
    found = dict(search_module.seeds(plan))
    probes = {origin: choice for origin, choice in found.items() if origin.startswith("probe")}
    base = found["uniform K4V4"]
    assert len(probes) == 2 * len(plan.space.clusters)
    for origin, choice in probes.items():
        ((cluster, pair),) = [
            (each, pair) for each, pair, before in zip(plan.space.clusters, choice, base, strict=True) if pair != before
        ]
        assert origin == f"probe {cluster.name} at {pair}"
        assert pair.name in ("K2V4", "K4V2")


def test_a_small_space_ends_before_its_trials():
    table = replace(TABLE, layers=TABLE.layers[:1])
    plan = make_plan(5.0, table=table)
    evaluator = FakeEvaluator(table)
    searched(plan, 100, evaluator=evaluator)
    assert len(evaluator.scored) <= 9


@pytest.mark.slow
def test_unquantized_layers_stay():
    plan = make_plan(7.0, unquantized=(0,))
    _, evaluator = searched(plan)
    assert {pairs[0] for pairs in evaluator.scored} == {UNQUANTIZED}
    assert all(pairs[1].is_quantized for pairs in evaluator.scored)


@pytest.mark.slow
def test_more_trials_go_on_and_a_finished_search_needs_no_engine():
    storage = InMemoryStorage()
    plan = make_plan()
    study, evaluator = searched(plan, 40, storage)
    assert evaluator.closed

    def no_engine():
        raise AssertionError("an engine was started")

    run_search(study, plan, no_engine, 40)
    _, second = searched(plan, 50, storage)
    assert len(second.scored) == 10
    undisturbed, _ = searched(plan, 50)
    assert history(create_study(storage, plan, make_sampler("nsga2", 0))) == history(undisturbed)


def history(study):
    return [(t.number, t.state, t.params, t.values, t.user_attrs.get("duplicate_of")) for t in study.trials]


@pytest.mark.slow
def test_seed_decides():
    first, again, other = (history(searched(make_plan(seed=seed))[0]) for seed in (1, 1, 2))
    assert first == again != other


def _killed_after(writes, url, plan, trials, table):
    """Search in this process, and SIGKILL it after so many writes to the storage."""
    storage = open_storage(url)
    counter = itertools.count(1)

    def counted(write):
        def then_kill(*args, **kwargs):
            result = write(*args, **kwargs)
            if next(counter) == writes:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return then_kill

    for name in WRITES:
        setattr(storage, name, counted(getattr(storage, name)))
    searched(plan, trials, storage, table=table)


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "writes"), [("nsga2", 31), ("nsga2", 60), ("tpe", 53)])
def test_killed_and_resumed_equals_undisturbed(tmp_path, monkeypatch, sampler, writes):
    monkeypatch.setattr(sampling, "POPULATION", 8)  # more generations in few trials
    table = replace(TABLE, layers=TABLE.layers[:4])
    plan = make_plan(4.1, sampler, table=table)
    trials = 22
    undisturbed, _ = searched(plan, trials, table=table)
    url = sqlite_url(tmp_path / "study.db")
    open_storage(url)  # the schema is made once
    context = multiprocessing.get_context("fork")
    codes = []
    while not codes or codes[-1] != 0:
        process = context.Process(target=_killed_after, args=(writes, url, plan, trials, table))
        process.start()
        process.join()
        codes.append(process.exitcode)
        assert codes[-1] in (0, -signal.SIGKILL) and len(codes) < 60
    assert len(codes) > 3
    study = create_study(open_storage(url), plan, make_sampler(sampler, plan.seed))
    assert history(study) == history(undisturbed)
    chosen = [search_result(each, plan, "test", {}).chosen for each in (study, undisturbed)]
    assert chosen[0] == chosen[1]


@pytest.mark.slow
def test_interrupted_trial_is_put_back():
    class Interrupted(FakeEvaluator):
        def score(self, pairs):
            if len(self.scored) == 5:
                raise KeyboardInterrupt
            return super().score(pairs)

    storage = InMemoryStorage()
    plan = make_plan()
    broken = Interrupted(TABLE)
    with pytest.raises(KeyboardInterrupt):
        searched(plan, 20, storage, broken)
    assert broken.closed
    study = create_study(storage, plan, make_sampler("nsga2", 0))
    assert Counter(trial.state for trial in study.trials)[TrialState.RUNNING] == 0
    study, _ = searched(plan, 20, storage)
    undisturbed, _ = searched(plan, 20)
    assert history(study) == history(undisturbed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The constraint value is ignored")  # of a trial that two workers took (SQLite)
def test_several_workers_share_the_trials(tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "_POLL_SECONDS", 0.05)
    url = sqlite_url(tmp_path / "study.db")
    plan = make_plan()
    create_study(open_storage(url), plan, make_sampler("nsga2", 0))
    evaluators = [FakeEvaluator(TABLE, seconds=0.05) for _ in range(2)]

    def work(evaluator):
        storage = open_storage(url)
        if evaluator is evaluators[0]:
            searched(plan, 40, storage, evaluator)
            return
        joined = find_plan(storage, url, None)
        assert joined == plan
        study = create_study(storage, joined, make_sampler(joined.sampler, joined.seed))
        run_search(study, joined, lambda: evaluator)

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, evaluators))
    study = create_study(open_storage(url), plan, make_sampler("nsga2", 0))
    assert all(len(each.scored) > 3 for each in evaluators)
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) in (40, 41)
    assert not any(trial.state == TrialState.RUNNING for trial in study.trials)
    assert scored_settings(study, plan)


def test_only_trials_of_workers_that_are_gone_are_reclaimed():
    plan = make_plan()
    study = create_study(InMemoryStorage(), plan, make_sampler("nsga2", 0))
    here = {"host": os.uname().nodename, "pid": os.getpid(), "started": 0.0, "beat": 2e9}
    study.set_user_attr("worker gone", here)  # another process once had this number
    study.set_user_attr("worker far", {**here, "host": "elsewhere", "beat": 4e9})
    study.set_user_attr("worker silent", {**here, "host": "elsewhere", "beat": 0.0})
    trials = {}
    for worker in ("worker gone", "worker far", "worker silent"):
        trials[worker] = study.ask()
        trials[worker].set_user_attr("worker", worker)
    unnamed = study.ask()
    reclaim(study, "worker me")
    states = [trial.state.name for trial in study.trials]
    assert states == ["WAITING", "RUNNING", "WAITING", "RUNNING"]
    study.set_user_attr("worker far", None)
    reclaim(study, "worker me")
    assert study.trials[unnamed.number].state == TrialState.WAITING


def test_plan_round_trip_and_names():
    plan = make_plan()
    plain = json.loads(json.dumps(plan.to_plain()))
    assert SearchPlan.from_plain(plain) == plan
    names = {make_plan(**change).study_name for change in ({}, {"seed": 1}, {"max_bits": 4.1}, {"sampler": "tpe"})}
    assert len(names) == 4 and make_plan().study_name in names


def test_join_needs_a_study_of_ours():
    storage = InMemoryStorage()
    with pytest.raises(ValueError, match=r"--study must name a search in this storage \(none\), but got None"):
        find_plan(storage, "url", None)
    optuna.create_study(storage=storage, study_name="foreign")
    plan = make_plan()
    create_study(storage, plan, make_sampler("nsga2", 0))
    assert find_plan(storage, "url", None) == plan
    with pytest.raises(ValueError, match="'foreign'"):
        find_plan(storage, "url", "foreign")


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/folder/x.db", "oracle99://x/y"])
def test_storage_that_cannot_be_opened(url):
    with pytest.raises(ValueError, match="--storage must be a database that can be opened"):
        open_storage(url)


def test_errors_do_not_show_a_password():
    with pytest.raises(ValueError, match=r"got 'nosuch://me:\*\*\*@host/db'") as caught:
        open_storage("nosuch://me:secret@host/db")
    assert "secret" not in str(caught.value)


def test_moead_without_optunahub_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optunahub", None)
    with pytest.raises(ValueError, match=r"--sampler moead must be able to load samplers/moead from OptunaHub"):
        make_sampler("moead", 0)


def test_a_storage_whose_driver_is_missing_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed
    with pytest.raises(ValueError, match="its driver, the package psycopg, is not installed"):
        open_storage("postgresql+psycopg://me:secret@host/db")
