"""What a user says: dtype and profile on the command line, and what is answered there."""

import argparse

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvtuner.compat import settings
from vllm_kvtuner.engine.config import PROFILE_KEY
from vllm_kvtuner.plugin import register
from vllm_kvtuner.profile.problems import ProfileError


def test_the_profile_stays_in_the_arguments_that_other_processes_read():
    """A process that unpickles them makes the engine's arguments before vLLM loads plugins there."""
    register()
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = ["--kvtuner-profile", "K8V4", "--additional-config", '{"other": 1}']
    args = parser.parse_args(["--model", "m", "--kv-cache-dtype", "kvtuner", *given])
    expected = {"other": 1, PROFILE_KEY: "K8V4"}
    assert EngineArgs.from_cli_args(args).additional_config == expected
    without_plugin = EngineArgs.from_cli_args.__func__.__wrapped__
    assert without_plugin(EngineArgs, args).additional_config == expected


@pytest.fixture
def engine_args(monkeypatch):
    """Makes engine arguments, as a command of vLLM's or a program does; their check finds two problems."""
    register()

    def refuse(config):
        raise ProfileError(["mine.yaml: version must be 1", "mine.yaml: layers must be given"])

    monkeypatch.setattr(settings, "check_config", refuse)
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())

    def make(command):
        args = parser.parse_args(["--model", "m"])
        return EngineArgs.from_cli_args(argparse.Namespace(**vars(args), **({"subparser": command} if command else {})))

    return make


def test_a_command_ends_with_a_line_for_each_problem(engine_args, capsys):
    with pytest.raises(SystemExit) as ended:
        settings.check_or_exit(None, engine_args("serve"))
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "vllm serve: error: mine.yaml: version must be 1",
        "vllm serve: error: mine.yaml: layers must be given",
    ]
    assert ended.value.__suppress_context__, "nothing is left to print a traceback of"


def test_a_program_gets_the_error(engine_args):
    with pytest.raises(ProfileError, match="version must be 1"):
        settings.check_or_exit(None, engine_args(None))
