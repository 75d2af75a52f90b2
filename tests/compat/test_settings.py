"""What a user says: dtype and profile on the command line."""

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvtuner.engine.config import PROFILE_KEY
from vllm_kvtuner.plugin import register


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
