"""vLLM's own engine arguments, which every command that starts an engine takes beside its own options.

vLLM's parser reads them, so that each vLLM version's are known, under all their spellings. It takes seconds to import,
and is, only where a word of the command line is no option of the command. The words are kept as they were typed, under
vLLM's name of the argument: JSON holds them, and each process that starts an engine reads them again.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from kvtuner_tools.model_files import MODEL_AS_IT_IS, ModelSource
from kvtuner_tools.vllm_logs import importing_vllm
from vllm_kvtuner.profile.problems import ProfileError, show

EngineWords = Mapping[str, Sequence[str]]
"""vLLM's name of an argument, such as ``tensor_parallel_size`` -> the words that give it."""
NO_WORDS: EngineWords = {}
GROUP = "vLLM's engine arguments"
DESCRIPTION = (
    "All other options are those of vLLM's engine, such as --tensor-parallel-size 2, --pipeline-parallel-size 2, "
    "--distributed-executor-backend ray, --quantization fp8, --trust-remote-code or --revision REVISION. "
    "'vllm serve --help=all' lists them. What a command must set itself is refused."
)
PLACEMENT = frozenset(
    {
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "enable_expert_parallel",
        "distributed_executor_backend",
        "disable_custom_all_reduce",
        "gpu_memory_utilization",
        "cpu_offload_gb",
        "download_dir",
        "max_parallel_loading_workers",
        "nnodes",
        "node_rank",
        "master_addr",
        "master_port",
        "device_ids",
    }
)
"""Where an engine runs and not what it computes: measurements that differ in these alone are the same."""

_ONE_BY_ONE = "windows of text run one at a time, each in steps of a size that the command knows"
_EAGER = "engines that measure run without compilation and CUDA graphs, so that they differ in the cache alone"
_BACKEND = "quantized layers have a backend of their own, and settings must differ in the cache alone"
_ONE_MODEL = "what is measured is the model alone"
_REPLICA = "one replica measures; kvtuner search --join adds workers to a search"
_CONTEXT = "packed pages are not served with context parallelism"
_SIZE = "--kv-cache-memory-bytes gives the size of the KV cache"
_FILES = "arguments are kept in files; set HF_TOKEN instead"
_CACHE = "the command sets what the cache stores, and whether prompts share it"
REFUSED: Mapping[str, str] = {
    "model": "the command has the model as an argument of its own",
    "served_model_name": "nothing is served",
    "dtype": "kvtuner capture, calibrate and evaluate have it as an option of their own",
    "seed": "nothing that is measured is sampled",
    "kv_cache_dtype": _CACHE,
    "kv_cache_dtype_skip_layers": _CACHE,
    "calculate_kv_scales": _CACHE,
    "kvtuner_profile": _CACHE,
    "enable_prefix_caching": _CACHE,
    "kv_transfer_config": _CACHE,
    "kv_cache_memory_bytes": "the command sets it",
    "num_gpu_blocks_override": _SIZE,
    "hf_token": _FILES,
    "attention_backend": _BACKEND,
    "attention_config": _BACKEND,
    **dict.fromkeys(
        (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_scheduled_tokens",
            "long_prefill_token_threshold",
            "enable_chunked_prefill",
        ),
        _ONE_BY_ONE,
    ),
    **dict.fromkeys(
        ("compilation_config", "optimization_level", "cudagraph_capture_sizes", "max_cudagraph_capture_size"), _EAGER
    ),
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens", "enable_lora"), _ONE_MODEL),
    **dict.fromkeys(("runner", "convert", "diffusion_config"), "texts are generated"),
    **dict.fromkeys(
        (
            "data_parallel_size",
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_backend",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
        ),
        _REPLICA,
    ),
    **dict.fromkeys(("prefill_context_parallel_size", "decode_context_parallel_size"), _CONTEXT),
}
"""vLLM's names of arguments that a command must set itself, and why."""


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Say in a command's help that it takes vLLM's engine arguments, and let ``cli`` know."""
    parser.add_argument_group(GROUP, DESCRIPTION)


def takes_engine_arguments(parser: argparse.ArgumentParser) -> bool:
    return any(group.title == GROUP for group in parser._action_groups)


def split_engine_words(argv: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], dict[str, list[str]]]:
    """The words of a command line that are the command's, and those that are vLLM's.

    Args:
        argv: words behind the command's name.
        parser: of the command, whose own options go first.
    """
    own = parser._option_string_actions
    if all(not word.startswith("-") or word.partition("=")[0] in own for word in argv):
        return list(argv), {}
    known = _parser()._option_string_actions
    mine: list[str] = []
    theirs: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        option = word.partition("=")[0]
        # vLLM takes underscores for dashes, and --json-argument.key VALUE for a part of a JSON argument.
        action = None if option in own else known.get(option.partition(".")[0].replace("_", "-"))
        if action is None or not word.startswith("-"):
            mine.append(word)
            continue
        words = theirs.setdefault(action.dest, [])
        words.append(word)
        if "=" not in word:
            words += [rest.pop(0) for _ in range(_num_values(action, rest))]
    return mine, theirs


def parse_engine_words(words: EngineWords) -> dict[str, Any]:
    """Values by vLLM's names, of the arguments that are given alone; vLLM's parser ends the process at a wrong one."""
    if not words:
        return {}
    return vars(_parser().parse_args([word for group in words.values() for word in group]))


def check_engine_words(words: EngineWords) -> None:
    """Refuse arguments that contradict what a command must set, all at once.

    Raises:
        ProfileError: the arguments, each with the reason.
    """
    problems = []
    values = parse_engine_words(words)
    for name in words:
        value, reason = values[name], REFUSED.get(name)
        if name == "enforce_eager" and not value:
            reason = _EAGER
        elif name == "distributed_executor_backend" and value == "external_launcher":
            reason = "the command starts the ranks of an engine"
        elif name == "additional_config" and any(str(key).startswith("kvtuner_") for key in value):
            reason = _CACHE
        elif name == "hf_overrides" and (not isinstance(value, dict) or "head_dtype" in value):
            reason = "measured logits are fp32, and head_dtype is set for that"
        if reason is not None:
            problems.append(f"{_typed(words, name)} must be left out, since {reason}, but got {show(value)}")
    if problems:
        raise ProfileError(problems)


def check_cache_dtypes(dtypes: Sequence[str]) -> None:
    """Refuse values of ``--kv-cache-dtype`` that vLLM does not know.

    Raises:
        ProfileError: the values.
    """
    if not dtypes:
        return
    with importing_vllm():
        from vllm.config.cache import CacheConfig, CacheDType

    problems = []
    for dtype in dtypes:
        try:
            CacheConfig(cache_dtype=dtype)  # vLLM's own check, which counts dtypes that plugins add
        except ValueError:
            rule = f"--kv-cache-dtype must be one of {', '.join(get_args(CacheDType))}"
            problems.append(f"{rule}, but got {show(dtype)}")
    if problems:
        raise ProfileError(problems)


def check_max_model_len(words: EngineWords, least: int) -> None:
    """Refuse a ``max_model_len`` that does not hold what is run.

    Raises:
        ProfileError: it is less than ``least``.
    """
    if (given := parse_engine_words(words).get("max_model_len", least)) < least:
        rule = f"must hold the longest window of text and a token more, {least:,}"
        raise ProfileError([f"{_typed(words, 'max_model_len')} {rule}, but got {given:,}"])


def model_source(words: EngineWords) -> ModelSource:
    """Where arguments say that a model's config and tokenizer come from, and what its verdict may depend on."""
    fields = vars(MODEL_AS_IT_IS).keys()
    wanted = [name for name in words if name in fields or not (name in PLACEMENT or name in REFUSED)]
    if not wanted:
        return MODEL_AS_IT_IS
    values = parse_engine_words({name: words[name] for name in wanted})
    own = {name: values.pop(name) for name in fields if name in values}
    return ModelSource(**own, arguments=values)


def engine_keywords(words: EngineWords, own: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of vLLM's ``LLM``: the given arguments, and over them what a command sets.

    Mappings of both are joined. The longer ``max_model_len`` counts, since some models rotate by it. What
    ``gpu_memory_utilization`` is given for has no effect on the size of the cache, but vLLM asks for that share.
    """
    given = parse_engine_words(words)
    keywords = {**given, **own}
    for name in ("hf_overrides", "additional_config"):
        if name in given and name in own:
            keywords[name] = {**given[name], **own[name]}
    if "max_model_len" in given:
        keywords["max_model_len"] = max(given["max_model_len"], own["max_model_len"])
    if "gpu_memory_utilization" in given:
        keywords["gpu_memory_utilization"] = given["gpu_memory_utilization"]
    return keywords


def ranks(words: EngineWords) -> tuple[int, int]:
    """Tensor-parallel and pipeline-parallel size."""
    given = parse_engine_words(words)
    return given.get("tensor_parallel_size", 1), given.get("pipeline_parallel_size", 1)


def computed_by(words: EngineWords) -> dict[str, list[str]]:
    """Arguments that measurements follow from, as JSON's types: all but ``PLACEMENT``."""
    return {name: list(words[name]) for name in sorted(words) if name not in PLACEMENT}


def placed_by(words: EngineWords) -> dict[str, list[str]]:
    """The others."""
    return {name: list(words[name]) for name in sorted(words) if name in PLACEMENT}


def refuse_computed(words: EngineWords) -> None:
    """Refuse arguments that say more than where an engine runs.

    Raises:
        ProfileError: the arguments.
    """
    if computed := computed_by(words):
        typed = ", ".join(_typed(words, name) for name in computed)
        raise ProfileError([f"--join takes the search as it was made, wherever its engines run, but got {typed}"])


def _typed(words: EngineWords, name: str) -> str:
    """How an argument was typed, without its value."""
    return words[name][0].partition("=")[0]


def _num_values(action: argparse.Action, rest: Sequence[str]) -> int:
    """How many of the following words are an option's values."""
    if isinstance(action.nargs, int):
        return min(action.nargs, len(rest))
    if action.nargs is None:
        return min(1, len(rest))
    values = next((number for number, word in enumerate(rest) if word.startswith("-")), len(rest))
    return min(values, 1) if action.nargs == "?" else values


@functools.cache
def _parser() -> argparse.ArgumentParser:
    """vLLM's, without defaults, so that it gives what was given alone."""
    with importing_vllm():
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="kvtuner", usage="kvtuner COMMAND ...", add_help=False, allow_abbrev=False)
    EngineArgs.add_cli_args(parser)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return parser
