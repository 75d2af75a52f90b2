"""What two engines must share, so that one may read pages that the other has written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_kvtuner import __version__
from vllm_kvtuner.engine.config import DIGEST_KEY, needs_packed_blocks, resolved_profile
from vllm_kvtuner.profile.problems import format_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.profile import LayerPrecision, RecentWindow, ResolvedProfile

_ENFORCE = "enforce_handshake_compat"
"""vLLM's key of a NIXL connector: whether ends with unequal digests refuse each other."""
_MOVED_LAYOUT = "DS"
"""vLLM's word for states of convolutions that lie channel by channel, of which a rank's are a piece."""
_MOVED_STATES = 2
"""States of a layer of Mamba and of a gated delta net; a short convolution has one."""
MARK = " kvtuner "
"""What stands between vLLM's own digest of an engine and the facts."""


def with_facts(digest: str, config: VllmConfig) -> str:
    """vLLM's digest of an engine, and behind it what its pages depend on: equal where pages mean the same."""
    return digest + MARK + json.dumps(page_facts(config), sort_keys=True)


def refused_transfers(config: VllmConfig) -> list[str]:
    """NIXL connectors, alone or among several, that would move pages unchecked or cannot move a model's states."""
    transfer = config.kv_transfer_config
    if transfer is None:
        return []
    asked = [{"kv_connector": transfer.kv_connector, "kv_connector_extra_config": transfer.kv_connector_extra_config}]
    asked += transfer.get_from_extra_config("connectors", [])
    problems = []
    for each in asked:
        name = str(each["kv_connector"])
        if not (each.get("kv_connector_extra_config") or {}).get(_ENFORCE, True):
            problems.append(
                f"kv_connector_extra_config.{_ENFORCE} must be true with --kv-cache-dtype kvtuner, since an engine of "
                f"another profile would read pages that mean something else, but got false for {name}"
            )
        ranks = config.parallel_config.decode_context_parallel_size
        if "Nixl" in name and ranks > 1:
            problems.append(
                "decode_context_parallel_size must be 1 with --kv-cache-dtype kvtuner and NIXL, which finds "
                f"the parts of a request on several ranks for latent attention alone, but got {ranks} with {name}"
            )
        if "Nixl" in name and config.model_config.is_hybrid:
            problems += _unmoved_states(config, name)
    return problems


def _unmoved_states(config: VllmConfig, connector: str) -> list[str]:
    """What vLLM's NIXL asks of the states of linear-attention layers, which it says once weights are loaded."""
    from vllm import envs as vllm_envs
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform

    problems = []
    # On a CPU, vLLM chooses the layout for a connector, unless it is given one.
    layout = vllm_envs.VLLM_SSM_CONV_STATE_LAYOUT
    if layout != _MOVED_LAYOUT and not (layout is None and current_platform.is_cpu()):
        problems.append(
            "VLLM_SSM_CONV_STATE_LAYOUT must be DS with NIXL and a model with linear-attention layers, "
            f"but got {layout or 'none'} with {connector} and {config.model_config.model}"
        )
    model, _ = ModelRegistry.resolve_model_cls(config.model_config.architecture, model_config=config.model_config)
    if hasattr(model, "get_mamba_specs_from_config"):
        kinds = {tuple(spec.shapes) for spec in model.get_mamba_specs_from_config(config)}
    else:
        kinds = {tuple(model.get_mamba_state_shape_from_config(config))}
    if len(kinds) > 1 or any(len(shapes) != _MOVED_STATES for shapes in kinds):
        got = " or ".join(sorted(" and ".join(map(str, map(tuple, shapes))) for shapes in kinds))
        problems.append(
            "kv_connector must not be NIXL's for a model whose linear-attention layers differ in their states, or keep "
            f"other than a convolution's and a recurrent one, but got {connector} and states of {got} in "
            f"{config.model_config.model}"
        )
    return problems


def page_facts(config: VllmConfig) -> dict[str, str]:
    """What pages depend on, by the name that a refusal gives it."""
    resolved = resolved_profile(config)
    statics = resolved.profile.statics
    facts = {
        "vllm-kvtuner": __version__,
        # A page of ours is not made of pages of half its tokens: scales lie behind the codes of all of them.
        "block_size": str(config.cache_config.block_size),
        "pairs": _by_layer(resolved, lambda layer: str(layer.pair)),
        "transforms": _short(repr([layer.transforms for layer in resolved.layers]).encode()),
        "recent windows": _by_layer(resolved, lambda layer: _window(layer.recent)),
        "statics": "none" if statics is None else _short(statics.read_bytes()),
        "profile and statics": config.additional_config[DIGEST_KEY],
    }
    if needs_packed_blocks(config, resolved):
        # Of pages that share blocks, a rank's share of the heads is no fixed share of the bytes.
        facts["tensor_parallel_size"] = str(config.parallel_config.tensor_parallel_size)
    return facts


def differences(ours: str, theirs: str) -> str:
    """Why an engine may not read another's pages, for its log.

    Args:
        ours: :func:`with_facts` of this engine.
        theirs: the same of the other one, or what an engine without our cache says.
    """
    (digest, _, written), (other, mark, other_written) = ours.partition(MARK), theirs.partition(MARK)
    here = json.loads(written)
    if not mark:
        return "the other engine's KV cache is not kvtuner's; give both --kv-cache-dtype kvtuner and one profile"
    there = json.loads(other_written)
    found = [
        f"{name} is {here.get(name, 'any')} here and {there.get(name, 'any')} there"
        for name in sorted(here | there)
        if here.get(name) != there.get(name)
    ]
    if digest != other:
        found.append("vLLM's version, model, dtype, attention backend, speculation or transfer mode is another")
    return f"the two engines' pages differ: {'; '.join(found)}"


def _by_layer(resolved: ResolvedProfile, value: Callable[[LayerPrecision], str]) -> str:
    """``K8V8: 0-3, 7; K4V2: 4-6``."""
    layers: dict[str, list[int]] = {}
    for layer in resolved.layers:
        layers.setdefault(value(layer), []).append(layer.index)
    return "; ".join(f"{text}: {format_layers(numbers)}" for text, numbers in layers.items())


def _window(window: RecentWindow | None) -> str:
    if window is None:
        return "none"
    return f"{window.tokens} tokens at {window.pair} and {window.sink_tokens} sink tokens"


def _short(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
