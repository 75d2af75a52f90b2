"""The stages of a calibration, each from the files of those before it in the output folder to its own.

A stage whose files follow from the same inputs is not run again: capture, transforms and round feedback know their own,
a key lies beside the sensitivity table, the search goes on in the study that its plan names, and held-out scores are
kept per setting. The rest takes no time.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from kvtuner_tools.cache_setting import AUTO
from kvtuner_tools.calibration.artifacts import (
    STATICS_FILE,
    SensitivityTable,
    digest,
    read_artifact,
    read_statics,
    unquantized_tokens,
)
from kvtuner_tools.calibration.calibration_text import CalibrationText, read_generated
from kvtuner_tools.calibration.capture import CAPTURE_FOLDER, CaptureRequest, run_capture
from kvtuner_tools.calibration.captured import Capture
from kvtuner_tools.calibration.cluster import read_clusters
from kvtuner_tools.calibration.engine_evaluator import start_engine
from kvtuner_tools.calibration.export import write_profiles
from kvtuner_tools.calibration.feedback_choice import FEEDBACK_STATICS_FILE, FeedbackChoice, choose_feedback
from kvtuner_tools.calibration.generated_text import MAX_NUM_SEQS, generate_text, longest_answer
from kvtuner_tools.calibration.heldout_scores import HeldoutRequest, additive_errors, score_heldout, wanted_settings
from kvtuner_tools.calibration.options import CalibrationOptions, Texts, load_texts
from kvtuner_tools.calibration.outcome import (
    REPORT_FILE,
    Heldout,
    SearchResult,
    bits_text,
)
from kvtuner_tools.calibration.plots import read_study_figures, write_study_figures
from kvtuner_tools.calibration.prune import read_candidates
from kvtuner_tools.calibration.report import build_report
from kvtuner_tools.calibration.report_inputs import ReportInputs
from kvtuner_tools.calibration.run_engines import RunEngines
from kvtuner_tools.calibration.sampling import make_sampler
from kvtuner_tools.calibration.search import allocate, run_search, search_result
from kvtuner_tools.calibration.sensitivity import measure_sensitivity
from kvtuner_tools.calibration.space import SearchSpace, check_budget
from kvtuner_tools.calibration.study import EvaluatorSpec, SearchPlan, create_study, find_plan, open_storage
from kvtuner_tools.calibration.summary import summarize
from kvtuner_tools.calibration.table_stages import (
    CANDIDATES_FILE,
    CLUSTERS_FILE,
    SENSITIVITY_FILE,
    TableStages,
    read_costs,
)
from kvtuner_tools.calibration.transform_choice import TransformChoice, choose_transforms
from kvtuner_tools.data_files import file_sha256
from kvtuner_tools.engine_arguments import NO_WORDS, EngineWords
from kvtuner_tools.engines.evaluate import EngineOptions, max_model_len_for
from kvtuner_tools.model_files import load_tokenizer, max_positions
from kvtuner_tools.results import device_name, write_bytes, write_json
from vllm_kvtuner.pages.layout import QUANTIZED_PAIRS
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.profile import TRANSFORM_KEYS, TransformSettings
from vllm_kvtuner.profile.statics import FEEDBACK_KINDS

SENSITIVITY_KEY_FILE = "sensitivity.key.json"
KEY_SCHEMA = "kvtuner-stage-key/1"
"""What the sensitivity table follows from, and its digest."""
FIGURES_FILE = "study_figures.json"


class Calibration(TableStages):
    """All ``STAGES`` on one output folder.

    Args:
        out: the folder; made if it does not exist.
        options: what is asked for.
        texts: drawn by the options; None where the stages to run read none.
        engines: that stages share; the caller closes them.
        is_whole: whether all stages are run, one after the other, so that engines can start ahead of theirs.
    """

    def __init__(
        self,
        out: Path,
        options: CalibrationOptions,
        texts: Texts | None = None,
        engines: RunEngines | None = None,
        *,
        is_whole: bool = False,
    ) -> None:
        super().__init__(out, options)
        self._texts = texts
        self._engines = engines or RunEngines()
        self._is_whole = is_whole

    @property
    def texts(self) -> Texts:
        assert self._texts is not None, "stages that read text are given it"
        return self._texts

    def capture(self) -> str:
        options = self.options
        engine = self._engines.unquantized(self._unquantized_options())
        generated = generate_text(options, self.out, engine)
        if options.generated_tokens:
            tokenizer = load_tokenizer(options.model, options.source)
            self._texts = load_texts(options, tokenizer, read_generated(self.out))
        request = CaptureRequest(
            options.model,
            self.texts.capture,
            seed=options.seed,
            dtype=options.dtype,
            kv_memory_bytes=options.kv_memory,
            words=options.engine,
        )
        capture = run_capture(request, self.out, engine)
        if self._records:
            self._engines.record(self.texts.heldout.windows)
        self._engines.end_unquantized()
        if self._records:
            self._engines.start_ahead(self._spec(self.texts.heldout))
        asked = {"capture": options.capture_tokens, "search": options.search_tokens, "held-out": options.heldout_tokens}
        texts = (self.texts.capture, self.texts.search, self.texts.heldout)
        got = [f"{name} {each.tokens:,} of {asked[name]:,} asked" for name, each in zip(asked, texts, strict=True)]
        return f"{len(capture.layers)} layers; {generated}; tokens: {', '.join(got)}"

    def _unquantized_options(self) -> EngineOptions:
        """Of the engine that writes text, captures a window a step, and gives the held-out text's logits if need be."""
        options = self.options
        assert options.window is not None, "window_default.fill comes first"
        longest = max(options.window, longest_answer(options), options.longest_window if self._records else 0)
        return EngineOptions(
            label="held-out reference",
            model=options.model,
            dtype=options.dtype,
            setting=AUTO,
            max_model_len=max_model_len_for(longest, max_positions(options.model, options.source)),
            chunk=options.window,
            kv_memory_bytes=options.kv_memory,
            max_num_seqs=MAX_NUM_SEQS,
            prefix_caching=False,
            words=options.engine,
        )

    @property
    def _records(self) -> bool:
        """Whether held-out scores follow without a search, whose engine would come first."""
        return self._is_whole and self.options.quick

    def transforms(self) -> str:
        if self.options.transforms != "choose":
            return "none"
        choice = self._transforms()
        return f"{len(choice.layers)} layers, {_named(choice.transforms.values())}"

    def feedback(self) -> str:
        choice = self._feedback()
        if choice is None:
            return "none"
        return f"{len(choice.layers)} layers, {_named(choice.transforms.values(), FEEDBACK_KINDS)}"

    def sensitivity(self) -> str:
        capture = self._capture
        recent_window = self.options.recent
        choice = self._chosen()
        measured = [capture.inputs, None if choice is None else choice.inputs, unquantized_tokens(recent_window)]
        inputs = digest(measured)
        path, key_path = self.out / SENSITIVITY_FILE, self.out / SENSITIVITY_KEY_FILE
        known = read_artifact(key_path, KEY_SCHEMA, ("inputs", "sha256")) if key_path.exists() else {}
        if path.exists() and known == {"inputs": inputs, "sha256": file_sha256(path)}:
            return "as it was"
        table = measure_sensitivity(capture, choice, self.out, recent_window=recent_window)
        write_json(key_path, {"schema": KEY_SCHEMA, "inputs": inputs, "sha256": file_sha256(path)})
        return f"{len(table.layers)} layers, {len(QUANTIZED_PAIRS)} pairs each"

    def search(self) -> str:
        plan = self._plan()
        options = self.options
        budget = options.budget_text(*plan.space.budget_bits(plan.max_bytes))
        decisions = f"{len(plan.space.clusters)} decisions"
        if options.quick:
            result = allocate(plan, budget)
            result.write(self.out)
            return f"{budget}, {decisions} by the integer program, {bits_text(result.chosen)}"
        study = create_study(
            open_storage(options.storage_url(self.out)), plan, make_sampler(options.sampler, options.seed)
        )
        print(f"search: {budget}, {decisions}, study {study.study_name}", file=sys.stderr)
        run_search(study, plan, lambda: start_engine(plan.engine), options.trials)
        result = search_result(study, plan, budget, self.texts.search.identity)
        result.write(self.out)
        write_study_figures(self.out / FIGURES_FILE, study, sum(len(each.pairs) > 1 for each in plan.space.clusters))
        chosen = result.find(result.chosen.pairs)
        assert chosen is not None
        found = f"best {chosen.origin}, KL {chosen.quality.kl_mean:.5f} at {bits_text(chosen)}"
        return f"{budget}; {result.trials['scored']} settings scored, {found}"

    def export(self) -> str:
        heldout = self._score_heldout()
        table = SensitivityTable.read(self.out / SENSITIVITY_FILE)
        result = SearchResult.read(self.out)
        source = self.options.source
        weights = ModelFiles(self.options.model, source.revision, source.download_dir).weights
        write_profiles(self.out, table, self._statics, result, heldout, self.options.recent, weights)
        return f"{len(heldout.settings)} settings on {heldout.chosen.quality.num_tokens:,} held-out tokens"

    def report(self) -> str:
        html = build_report(self._inputs_of_report())
        write_bytes(self.out / REPORT_FILE, html.encode())
        return str(self.out / REPORT_FILE)

    def _inputs_of_report(self) -> ReportInputs:
        costs = {stage: cost["seconds"] for stage, cost in read_costs(self.out).items() if stage != "report"}
        return ReportInputs(
            out=self.out,
            options=self.options,
            table=SensitivityTable.read(self.out / SENSITIVITY_FILE),
            candidates=read_candidates(self.out / CANDIDATES_FILE),
            clusters=read_clusters(self.out / CLUSTERS_FILE),
            result=SearchResult.read(self.out),
            heldout=Heldout.read(self.out),
            transforms=TransformChoice.read(self.out) if self.options.transforms == "choose" else None,
            feedback=FeedbackChoice.read(self.out) if self.options.has_feedback else None,
            study_figures={} if self.options.quick else read_study_figures(self.out / FIGURES_FILE),
            costs=costs,
            device=device_name(),
        )

    def summary(self) -> list[tuple[str, str]]:
        """What to do with the outcome, as names and texts."""
        return summarize(self._inputs_of_report())

    @property
    def _capture(self) -> Capture:
        return Capture.read(self.out / CAPTURE_FOLDER)

    def _transforms(self) -> TransformChoice:
        return choose_transforms(self._capture, self.out, recent_window=self.options.recent)

    def _feedback(self) -> FeedbackChoice | None:
        """Round feedback of all layers; None where it is not asked for."""
        if not self.options.has_feedback:
            return None
        return choose_feedback(self._capture, self._transforms(), self.out, recent_window=self.options.recent)

    def _chosen(self) -> TransformChoice | FeedbackChoice | None:
        """What the layers do before they store; None for nothing."""
        if self.options.transforms != "choose":
            return None
        return self._feedback() or self._transforms()

    @property
    def _statics(self) -> Path:
        """The file that the layers' transforms read, if any does."""
        return self.out / (FEEDBACK_STATICS_FILE if self.options.has_feedback else STATICS_FILE)

    def _plan(self) -> SearchPlan:
        candidates = read_candidates(self.out / CANDIDATES_FILE)
        shapes = {layer.index: (layer.num_kv_heads, layer.head_size) for layer in candidates}
        max_bytes = self.options.max_bytes(shapes)
        check_budget(max_bytes, shapes, [layer.pairs[0] for layer in candidates])
        return SearchPlan(
            space=SearchSpace(read_clusters(self.out / CLUSTERS_FILE), shapes),
            max_bytes=max_bytes,
            sampler=self.options.sampler,
            seed=self.options.seed,
            engine=self._engine(self.texts.search),
        )

    def _engine(self, text: CalibrationText) -> EvaluatorSpec:
        table = SensitivityTable.read(self.out / SENSITIVITY_FILE)
        transforms = {layer.index: layer.transforms for layer in table.layers}
        needs_statics = any(each.needs_statics for each in transforms.values())
        statics = read_statics(self._statics) if needs_statics else None
        return replace(self._spec(text), transforms=transforms, statics=statics)

    def _spec(self, text: CalibrationText) -> EvaluatorSpec:
        """An engine before its transforms are known."""
        return EvaluatorSpec(
            model=self.options.model,
            dtype=self.options.dtype,
            windows=text.windows,
            transforms={},
            statics=None,
            unquantized=self.options.unquantized_layers,
            kv_memory_bytes=self.options.kv_memory,
            recent_window=self.options.recent,
            words=self.options.engine,
        )

    def _score_heldout(self) -> Heldout:
        result = SearchResult.read(self.out)
        plan = self._plan()
        engine = self._engine(self.texts.heldout)
        table = SensitivityTable.read(self.out / SENSITIVITY_FILE)
        error = additive_errors(plan.space, {layer.index: layer.output_error for layer in table.layers})
        wanted = wanted_settings(result, plan, error, full=self.options.full_report)
        text = self.texts.heldout
        positions = tuple((kind, len(window) - 1) for kind, window in zip(text.kinds, text.windows, strict=True))
        request = HeldoutRequest(digest(engine.identity), text.identity, wanted, positions)
        return score_heldout(request, lambda: self._engines.evaluator(engine) or start_engine(engine), self.out)


def _named(settings: Iterable[TransformSettings], names: Iterable[str] = TRANSFORM_KEYS) -> str:
    """How many layers have each transform that any has."""
    counts = Counter(name for each in settings for name in each.names if name in names)
    return ", ".join(f"{name} in {count}" for name, count in counts.items()) or "none of them"


def join(storage: str, study_name: str | None, words: EngineWords = NO_WORDS) -> None:
    """Work on a search that another process made, until it is done.

    Args:
        storage: URL of the Optuna storage.
        study_name: the study; None takes the one made last.
        words: vLLM's engine arguments that say where this worker's engine runs; by default those of the search.

    Raises:
        ValueError: no such storage or study.
    """
    opened = open_storage(storage)
    plan = find_plan(opened, storage, study_name)
    study = create_study(opened, plan, make_sampler(plan.sampler, plan.seed))
    run_search(study, plan, lambda: start_engine(plan.engine.placed(words)))
