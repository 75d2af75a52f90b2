"""``kvtuner calibrate`` and a command for each of its stages.

``pipeline`` loads torch, so it is imported where a stage runs: help, and options that are refused, do without.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna

from kvtuner_tools.calibration.keep import (
    keep_for_user,
    keep_in_model,
    profile_to_serve,
    refuse_unwritable_model,
)
from kvtuner_tools.calibration.option_checks import check_options
from kvtuner_tools.calibration.options import (
    OPTIONS_FILE,
    STAGES,
    CalibrationOptions,
    add_option,
    add_options,
    given_options,
    merge,
)
from kvtuner_tools.calibration.table_stages import TABLE_STAGES, TableStages
from kvtuner_tools.engine_arguments import NO_WORDS, check_engine_words, refuse_computed
from kvtuner_tools.processes import STDERR, OwnProcess, output_to, redirect
from kvtuner_tools.vllm_logs import import_vllm
from vllm_kvtuner.profile.hub import FOLDER
from vllm_kvtuner.profile.problems import ProfileError

ENGINE_LOG = "engine.log"
"""Name of the file in the output folder that engines of the latest command wrote to."""
ENGINE_LINES = 40
"""Lines of it that are shown where a stage fails."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


@dataclass(frozen=True)
class Command:
    """What ``cli`` asks of a subcommand.

    Args:
        add_arguments: adds its arguments to a parser.
        run: runs it and returns the exit status.
    """

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _run(options: CalibrationOptions, out: Path, stages: Sequence[str], *, verbose: bool) -> int:
    with ExitStack() as stack:
        # Importing vLLM takes as long as an engine's start: the first engine's process does while options are checked.
        process = stack.enter_context(closing(_warm_process())) if "capture" in stages else None
        checked = check_options(options, out, stages)
        if checked.note is not None:
            print(checked.note, file=sys.stderr)
        (out / ENGINE_LOG).unlink(missing_ok=True)
        if set(stages) <= set(TABLE_STAGES):
            options.write(out)
            return _run_stages(TableStages(out, checked.options), stages, verbose=verbose)
        from kvtuner_tools.calibration.pipeline import Calibration
        from kvtuner_tools.calibration.run_engines import RunEngines

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        engines = stack.enter_context(closing(RunEngines(process)))
        is_whole = len(stages) > 1
        calibration = Calibration(out, checked.options, checked.texts, engines, is_whole=is_whole)
        options.write(out)
        if process is not None:
            process.submit(redirect, STDERR if verbose else out / ENGINE_LOG)
        started = time.monotonic()
        status = _run_stages(calibration, stages, verbose=verbose)
        if is_whole:
            print(f"all stages: {time.monotonic() - started:.1f} s")
            for name, text in calibration.summary():
                print(f"{name + ':':12}{text}")
        return status


def _run_stages(calibration: TableStages, stages: Sequence[str], *, verbose: bool) -> int:
    log = calibration.out / ENGINE_LOG
    with _interruptible(), output_to(STDERR if verbose else log):
        for number, stage in enumerate(stages, 1):
            try:
                line = calibration.run(stage)
            except Exception:
                _show_end(log)
                raise
            print(f"{number}/{len(stages)} {line}" if len(stages) > 1 else line, flush=True)
    return 0


def _warm_process() -> OwnProcess:
    """A process that imports vLLM, and says nothing until it is told where to."""
    with output_to(Path(os.devnull)):
        process = OwnProcess()
    process.submit(import_vllm)
    return process


def _show_end(log: Path) -> None:
    """What the engines wrote last, where a stage has failed."""
    if log.exists():
        lines = log.read_text(errors="replace").splitlines()[-ENGINE_LINES:]
        print(f"{log}, its last {len(lines)} lines:", *lines, sep="\n", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted; everything so far is kept: run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _all_arguments(parser: argparse.ArgumentParser) -> None:
    _first_arguments(parser)
    add_options(parser, STAGES[1:])
    add_option(parser, "quick")
    parser.add_argument(
        "--save",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the profile to serve in the user's folder (KVTUNER_PROFILE_FOLDER), where auto finds it (default)",
    )
    parser.add_argument(
        "--save-to-model", action="store_true", help=f"keep it in MODEL/{FOLDER}/ too, where auto finds it first"
    )


def _first_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or id")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="output folder; a run goes on in it")
    _add_verbose(parser)
    add_options(parser, ("capture",))


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    text = f"show what engines write, on stderr, instead of keeping it in DIR/{ENGINE_LOG}"
    parser.add_argument("-v", "--verbose", action="store_true", help=text)


def _calibrate(args: argparse.Namespace) -> int:
    if args.save_to_model:
        refuse_unwritable_model(args.model)
    status = _run(merge(_known(args.out), given_options(args)), args.out, STAGES, verbose=args.verbose)
    if args.save or args.save_to_model:
        _keep(args)
    return status


def _keep(args: argparse.Namespace) -> None:
    """Put the profile that is to be served where ``auto`` finds it."""
    profile = profile_to_serve(args.out)
    kept = [keep_in_model(profile, args.model)] if args.save_to_model else []
    if args.save and (path := keep_for_user(profile)) is not None:
        kept.append(path)
    for path in kept:
        print(f"{'kept:':12}{path}")


def _capture(args: argparse.Namespace) -> int:
    return _run(merge(_known(args.out), given_options(args)), args.out, ("capture",), verbose=args.verbose)


def _known(out: Path) -> CalibrationOptions:
    """The folder's options where it has some, so that a command goes on with what an earlier one was given."""
    return CalibrationOptions.read(out) if (out / OPTIONS_FILE).exists() else CalibrationOptions()


def _stage(name: str) -> Command:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("out", metavar="DIR", type=Path, help="output folder of the stages before")
        _add_verbose(parser)
        add_options(parser, (name,))

    def run(args: argparse.Namespace) -> int:
        _require(args.out)
        return _run(
            merge(CalibrationOptions.read(args.out), given_options(args)), args.out, (name,), verbose=args.verbose
        )

    return Command(add_arguments, run)


def _require(out: Path) -> None:
    if not (out / OPTIONS_FILE).exists():
        rule = "must be the output folder of kvtuner capture or kvtuner calibrate"
        raise ProfileError([f"{out}: the folder {rule}, but got one without {OPTIONS_FILE}"])


def _search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="DIR", type=Path, nargs="?", help="output folder of the stages before")
    parser.add_argument(
        "--join",
        metavar="DIR_OR_URL",
        help="work on the search of this output folder or Optuna storage as one more worker",
    )
    parser.add_argument("--study", metavar="NAME", help="with --join: the study (default: the one made last)")
    _add_verbose(parser)
    add_options(parser, ("search",))


def _search(args: argparse.Namespace) -> int:
    given = given_options(args)
    if args.join is None:
        if args.out is None or args.study is not None:
            raise ProfileError(
                ["kvtuner search must be given DIR, or --join with an optional --study, but got neither"]
            )
        return STAGE_COMMANDS["search"].run(args)
    words = given.pop("engine", NO_WORDS)
    if args.out is not None or given:
        raise ProfileError(["--join takes the search as it was made: it must stand alone or with --study"])
    check_engine_words(words)
    refuse_computed(words)
    folder = Path(args.join)
    is_folder = "://" not in args.join
    if is_folder:
        _require(folder)
    storage = CalibrationOptions.read(folder).storage_url(folder) if is_folder else args.join
    from kvtuner_tools.calibration.pipeline import join

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _interruptible(), output_to(folder / ENGINE_LOG if is_folder and not args.verbose else STDERR):
        join(storage, args.study, words)
    return 0


STAGE_COMMANDS = {name: _stage(name) for name in STAGES[1:]}

calibrate = Command(_all_arguments, _calibrate)
capture = Command(_first_arguments, _capture)
transforms = STAGE_COMMANDS["transforms"]
feedback = STAGE_COMMANDS["feedback"]
sensitivity = STAGE_COMMANDS["sensitivity"]
prune = STAGE_COMMANDS["prune"]
cluster = STAGE_COMMANDS["cluster"]
search = Command(_search_arguments, _search)
export = STAGE_COMMANDS["export"]
report = STAGE_COMMANDS["report"]
