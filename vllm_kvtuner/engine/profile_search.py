"""Put a profile's file in the place of what was asked for: ``auto``, or one of a repository."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vllm_kvtuner.engine.cache_memory import memory_of_keys_and_values
from vllm_kvtuner.engine.calibrate_once import calibrate_once
from vllm_kvtuner.engine.config import AUTO_KEY, PROFILE_KEY, REQUEST_TOKENS_KEY
from vllm_kvtuner.pages.layout import PrecisionPair
from vllm_kvtuner.profile.auto import best_pair, find_calibrated, is_auto, make_budget, resolve_auto
from vllm_kvtuner.profile.auto_request import CALIBRATE, Need, parse_request
from vllm_kvtuner.profile.hub import fetch_profile, is_hub_spec
from vllm_kvtuner.profile.model_files import ModelFiles
from vllm_kvtuner.profile.model_shape import ModelShape
from vllm_kvtuner.profile.places import WEIGHTS
from vllm_kvtuner.profile.problems import ProfileError
from vllm_kvtuner.profile.shipped import shipped_profiles

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.places import Candidate
    from vllm_kvtuner.profile.profile import Profile

logger = logging.getLogger("vllm.kvtuner")

DUMMY = "dummy"
"""vLLM's load format of random weights, to which no digest belongs."""


def look_for(config: VllmConfig, shape: ModelShape) -> None:
    """Replace a spec that means a file elsewhere by that file; what was asked is kept beside it.

    Raises:
        ProfileError: nothing is found, or what is found cannot be brought here or made.
    """
    additional = config.additional_config
    spec = additional[PROFILE_KEY]
    if additional.get(AUTO_KEY, ["", ""])[1] != spec:  # an engine's arguments may be checked again
        additional.pop(AUTO_KEY, None)
    if is_hub_spec(spec):
        fetched = fetch_profile(spec, config.load_config.download_dir, config.model_config.hf_token)
        found, source = str(fetched.path), f"the hub, commit {fetched.commit[:12]}"
    elif is_auto(spec):
        chosen = _resolve(config, spec, shape)
        found, source = chosen.spec, chosen.source
    else:
        return
    additional[PROFILE_KEY] = found
    additional[AUTO_KEY] = [spec, found, source]


def _resolve(config: VllmConfig, spec: str, shape: ModelShape) -> Candidate:
    request = parse_request(spec)
    memory = None
    if request.need is not None and not shape.unsupported:
        length = config.model_config.max_model_len
        if request.need.context > length:
            rule = f"requests must be of at most max_model_len ({length:,}) tokens"
            raise ProfileError([f"{spec}: {rule}, but got {request.need.context:,}"])
        memory = memory_of_keys_and_values(config, model_files(config), spec, shape)
        how = "as given" if config.cache_config.kv_cache_memory_bytes else "estimated"
        logger.info("kvtuner: %s: %s bytes for keys and values over all ranks, %s", spec, f"{memory:,}", how)
        # A pair's window is chosen for requests of this length.
        config.additional_config.setdefault(REQUEST_TOKENS_KEY, request.need.context)
    if request.calibrate:
        budget = make_budget(spec, request, shape, memory)
        pair = best_pair(shape, budget)

        def known() -> Candidate | None:
            return find_calibrated(model_files(config), shape, budget, pair).chosen

        return known() or calibrate_once(config, spec, budget, known)
    chosen = resolve_auto(spec, model_files(config), shape, memory).chosen
    if chosen.source == WEIGHTS and PrecisionPair.parse(chosen.spec).nominal_bits < 8:
        better = f"{spec}{',' if ':' in spec else ':'}{CALIBRATE}"
        logger.info(
            "kvtuner: %s finds no profile of this model, so a pair is served; calibration loses less at the "
            "same bits: --kvtuner-profile %s",
            spec,
            better,
        )
    return chosen


def model_files(config: VllmConfig) -> ModelFiles:
    """Where the weights are that the engine will load."""
    model = config.model_config
    return ModelFiles(model.model, model.revision, config.load_config.download_dir, model.hf_token)


def other_weights(config: VllmConfig, profile: Profile) -> tuple[str, ...]:
    """A profile that names weights is for no others, whoever chose it.

    One that is shipped cannot be edited to be for any. Chosen by its name, it is served, with a warning.
    """
    if profile.weights is None or config.load_config.load_format == DUMMY:
        return ()
    problem = profile.weights_problem(model_files(config).weights)
    if problem is None:
        return ()
    line = f"{profile.source}: {problem}"
    if profile.source in shipped_profiles().values():
        logger.warning("%s: quality with these weights was not measured", line)
        return ()
    return (line,)


def asked_need(config: VllmConfig) -> Need | None:
    """The requests that ``auto`` was asked to have room for, if it was."""
    asked = config.additional_config.get(AUTO_KEY, ("",))[0]
    return parse_request(asked).need if is_auto(asked) else None
