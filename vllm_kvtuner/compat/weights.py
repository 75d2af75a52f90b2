"""What is done once weights were loaded into a running engine."""

import functools
from typing import Any

from vllm.v1.engine.core import EngineCore

from vllm_kvtuner.engine.weight_updates import follows_weights, renew_transforms

ENDS_OF_UPDATES = ("reload_weights", "finish_weight_update")
"""Calls of workers behind which all weights are those of one model."""
PENDING = "kvtuner_weights_pending"
"""Attribute of an engine core: workers were called, and may have loaded weights."""


def renew_what_follows_weights() -> None:
    """Let key offsets and round feedback that are made of weights follow these.

    Symptom: after trainers have swapped the weights of an engine that began with dummy ones, keys are stored as if they
    had no bias, and answers are bad. Cause: weights are loaded by any call of a worker's method, vLLM's or a trainer's
    own, in one or in many, and attention implementations do not hear of it. So workers are asked behind the calls with
    which vLLM ends an update, where a refusal reaches the trainer, and behind all others before the next step. Can go
    when implementations hear of the end of an update.
    """
    collective_rpc = EngineCore.collective_rpc

    @functools.wraps(collective_rpc)
    def call_and_renew(self: EngineCore, method: Any, *args: Any, **kwargs: Any) -> Any:
        results = collective_rpc(self, method, *args, **kwargs)
        if follows_weights(self.vllm_config):
            setattr(self, PENDING, True)
            if method in ENDS_OF_UPDATES:
                _renew(self)
        return results

    EngineCore.collective_rpc = call_and_renew
    for name in ("step", "step_with_batch_queue"):
        setattr(EngineCore, name, _renewed_before(getattr(EngineCore, name)))


def _renewed_before(step: Any) -> Any:
    @functools.wraps(step)
    def renew_and_step(self: EngineCore) -> Any:
        if getattr(self, PENDING, False):
            _renew(self)
        return step(self)

    return renew_and_step


def _renew(core: EngineCore) -> None:
    setattr(core, PENDING, False)
    if any(core.model_executor.collective_rpc(renew_transforms)):
        # Requests begin anew, since their pages were stored with other offsets.
        core.scheduler.reset_prefix_cache(reset_running_requests=True)
