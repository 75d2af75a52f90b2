"""What a user says: the cache's dtype, the argument that names a profile, and the check of both."""

import functools
import sys
from typing import Any

import torch
from vllm.config import CacheConfig, VllmConfig
from vllm.config import cache as cache_module
from vllm.engine import arg_utils
from vllm.engine.arg_utils import EngineArgs

from vllm_kvtuner.compat.patching import after
from vllm_kvtuner.engine.checks import check_config
from vllm_kvtuner.engine.config import KV_CACHE_DTYPE, PROFILE_KEY

COMMAND = "kvtuner_command"
"""Attribute of engine arguments that came from a command of vLLM's: its name."""
USAGE_ERROR = 2
"""Exit status of arguments that a command does not take, as argparse has it."""


def register_kv_cache_dtype() -> None:
    """Make ``kvtuner`` a value of ``--kv-cache-dtype``.

    Symptom: argparse and pydantic refuse the value. Cause: 0.32.0 has a closed Literal; 0.33.0 has a registry. The
    Literal branch can go with 0.32.0.
    """
    if hasattr(cache_module, "register_kv_cache_dtype"):
        _register_with_vllm()
    else:
        _extend_literal()


def _register_with_vllm() -> None:
    """Since 0.33.0.

    The quantization mode is NONE on purpose: CUSTOM is an alias of OCTAVE_K3V4, so ``is_octave`` would be true of us,
    and no code of vLLM's has to know that the pages are quantized.
    """
    from vllm.v1.kv_cache_interface import KVQuantMode

    @cache_module.register_kv_cache_dtype(KV_CACHE_DTYPE)
    class Handler:
        name = KV_CACHE_DTYPE

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.NONE


def _extend_literal() -> None:
    """Before 0.33.0."""
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    STR_DTYPE_TO_TORCH_DTYPE[KV_CACHE_DTYPE] = torch.uint8
    # The Literal object itself is extended, because modules hold references to it.
    literal = cache_module.CacheDType
    literal.__args__ = (*literal.__args__, KV_CACHE_DTYPE)
    for config in (CacheConfig, VllmConfig):
        rebuild_dataclass(config, force=True)
    arg_utils._compute_kwargs.cache_clear()


def add_profile_argument() -> None:
    """Add ``--kvtuner-profile`` and carry it in additional_config.

    Symptom: unknown argument. Cause: vLLM's parser has no hook for plugins' arguments. Can go when it has one.
    """
    add_cli_args, from_cli_args = EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__

    @functools.wraps(add_cli_args)
    def add_cli_args_and_ours(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(title="kvtuner", description="Mixed-precision KV cache.")
        group.add_argument(
            "--kvtuner-profile",
            metavar="PROFILE",
            default=None,
            help="Precision profile for --kv-cache-dtype kvtuner: a YAML file, the name of a shipped profile, "
            "hf://ORG/REPO[@REVISION][/FILE.yaml], or a pair such as K8V4 for all layers, with the transforms and "
            "the recent window that need no data (K8V4:plain: without). auto, the default, or auto:BITS is the best "
            "for the model within that many stored bits, auto:fit=CONTEXTxREQUESTS the best that so many requests "
            "fit with; auto:BITS,calibrate calibrates first where nobody has.",
        )
        return parser

    @functools.wraps(from_cli_args)
    def from_cli_args_and_ours(cls: type[EngineArgs], args: Any) -> EngineArgs:
        engine_args = from_cli_args(cls, args)
        if command := getattr(args, "subparser", None):
            setattr(engine_args, COMMAND, command)
        if profile := getattr(args, "kvtuner_profile", None):
            engine_args.additional_config = {**engine_args.additional_config, PROFILE_KEY: profile}
            # Where several API servers run, each is a new process that reads these arguments before it loads plugins.
            args.additional_config = engine_args.additional_config
        return engine_args

    EngineArgs.add_cli_args = staticmethod(add_cli_args_and_ours)
    EngineArgs.from_cli_args = classmethod(from_cli_args_and_ours)


def check_engine_config() -> None:
    """Refuse a bad profile before anything is loaded.

    Symptom: the error would come from a worker, after seconds or minutes; of a command of vLLM's, it would be the last
    line of a traceback. Cause: no configuration hook for plugins other than a platform's, and none for an argument that
    only the model's configuration can tell to be wrong. Can go when there are.
    """
    after(EngineArgs, "create_engine_config", lambda config, args, *_, **__: check_or_exit(config, args))


def check_or_exit(config: VllmConfig, args: EngineArgs) -> None:
    """Check a new configuration; end a command as its parser would, with a line for each problem.

    Raises:
        ValueError: what is wrong, to programs.
        SystemExit: with argparse's status, where the arguments are those of ``vllm serve`` or another command.
    """
    try:
        check_config(config)
    except ValueError as error:
        command = getattr(args, COMMAND, None)
        if command is None:
            raise
        for line in str(error).splitlines():
            print(f"vllm {command}: error: {line}", file=sys.stderr, flush=True)
        raise SystemExit(USAGE_ERROR) from None
