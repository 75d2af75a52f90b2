"""What command line and configuration are made of."""

from vllm_kvtuner.compat.inspection import Seam
from vllm_kvtuner.compat.seams.names import SPECS

_ARGUMENTS = "vllm.engine.arg_utils:"

SEAMS = (
    Seam(
        "registry of cache dtypes", "vllm.config.cache:register_kv_cache_dtype",
        "compat.settings.register_kv_cache_dtype", ("name",), since="0.33",
    ),
    Seam(
        "handler of a cache dtype", "vllm.config.cache:KVCacheDTypeHandler",
        "compat.settings.register_kv_cache_dtype", attributes=("name", "torch_dtype", "quant_mode"), since="0.33",
    ),
    Seam(
        "no quantization as vLLM knows it", SPECS + "KVQuantMode.NONE", "compat.settings.register_kv_cache_dtype",
        since="0.33",
    ),
    Seam(
        "closed list of cache dtypes", "vllm.config.cache:CacheDType.__args__",
        "compat.settings.register_kv_cache_dtype", before="0.33",
    ),
    Seam(
        "tensors' dtypes by cache dtype", "vllm.utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE",
        "compat.settings.register_kv_cache_dtype", before="0.33",
    ),
    Seam(
        "arguments kept by configuration class", _ARGUMENTS + "_compute_kwargs.cache_clear",
        "compat.settings.register_kv_cache_dtype", before="0.33",
    ),
    Seam(
        "arguments of the command line", _ARGUMENTS + "EngineArgs.add_cli_args", "compat.settings.add_profile_argument",
        ("parser",), exact=True,
    ),
    Seam(
        "engine arguments from the command line", _ARGUMENTS + "EngineArgs.from_cli_args",
        "compat.settings.add_profile_argument", ("args",), exact=True,
    ),
    Seam(
        "configuration that plugins share", _ARGUMENTS + "EngineArgs", "compat.settings.add_profile_argument",
        attributes=("additional_config",),
    ),
    Seam(
        "engine configuration", _ARGUMENTS + "EngineArgs.create_engine_config", "compat.settings.check_engine_config"
    ),
)  # fmt: skip
