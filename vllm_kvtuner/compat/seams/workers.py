"""Warm-up, sleep, and weights that are loaded anew."""

from vllm_kvtuner.compat.inspection import Seam
from vllm_kvtuner.compat.seams.names import CORE, WORKER

SEAMS = (
    Seam("warm-up", WORKER + ".compile_or_warm_up_model", "compat.worker.warm_kernels_up", exact=True),
    Seam("waking up", WORKER + ".wake_up", "compat.worker.wake_kernels_up", ("tags",), exact=True),
    Seam(
        "calls of workers, loading among them", "vllm.v1.engine.core:EngineCore.collective_rpc",
        "compat.weights.renew_what_follows_weights", ("method", "timeout", "args", "kwargs"), exact=True,
    ),
    Seam("a step", "vllm.v1.engine.core:EngineCore.step", "compat.weights.renew_what_follows_weights", exact=True),
    Seam(
        "a step of several in flight", "vllm.v1.engine.core:EngineCore.step_with_batch_queue",
        "compat.weights.renew_what_follows_weights", exact=True,
    ),
    Seam("loading anew", WORKER + ".reload_weights", "compat.weights.renew_what_follows_weights"),
    Seam("end of an update", WORKER + ".finish_weight_update", "compat.weights.renew_what_follows_weights"),
    Seam(
        "forgetting the cache", CORE + "sched.scheduler:Scheduler.reset_prefix_cache",
        "compat.weights.renew_what_follows_weights", ("reset_running_requests",),
    ),
)  # fmt: skip
