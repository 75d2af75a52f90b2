"""A key offset under M-RoPE: which of a token's positions turns each rotary pair, and where an engine has them.

An engine that takes no images has tokens of one position each, whatever the model: all of theirs are equal. Nothing
here is needed then, and all kernels serve.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvtuner.pages.positions import TokenPositions
from vllm_kvtuner.pages.transforms import RotaryTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvtuner.profile.profile import ResolvedProfile

PROBES = 16
"""Tokens that a rotary embedding is asked about."""
PROBE_TOLERANCE = 1e-3
"""By how much a cosine or sine may differ from the table's, which the embedding multiplies with 1."""


def has_several_positions(config: VllmConfig) -> bool:
    """Whether tokens of an engine may have several positions that differ."""
    return config.model_config.uses_mrope and config.model_config.supports_multimodal_inputs


def unserved_positions(config: VllmConfig, resolved: ResolvedProfile) -> tuple[str, ...]:
    """What a key offset does not work with where tokens have several positions."""
    if not has_several_positions(config) or not any(layer.transforms.key_offset for layer in resolved.layers):
        return ()
    problems = []
    source = resolved.profile.source or resolved.profile.name
    rule = "key_offset must be false or the engine serve text alone (--language-model-only)"
    if config.kv_transfer_config is not None:
        problems.append(
            f"{source}: {rule} with a KV connector and M-RoPE, since connectors bring pages and not the positions of "
            f"their tokens, but got {config.kv_transfer_config.kv_connector} for {config.model_config.model}"
        )
    if config.parallel_config.use_ubatching:
        problems.append(
            f"{source}: {rule} with microbatches and M-RoPE, since vLLM does not say which tokens' positions are a "
            f"microbatch's, but got use_ubatching=True for {config.model_config.model}"
        )
    return tuple(problems)


@dataclass
class MRope:
    """The rotary tables of an engine whose tokens have several positions.

    Args:
        step: [num_axes, tokens] int64, the engine's buffer of the positions of the batch in flight.
    """

    step: torch.Tensor
    _tables: dict[torch.nn.Module, RotaryTable] = field(default_factory=dict)

    @classmethod
    def of(cls, runner: Any, config: VllmConfig) -> MRope | None:
        """That of a model runner, V1 or V2, once the model is loaded; None where a token has one position."""
        if not has_several_positions(config):
            return None
        if hasattr(runner, "mrope_positions"):
            return cls(runner.mrope_positions.gpu)
        return cls(runner.model_state.rope_state.positions)

    def table(self, module: torch.nn.Module, plain: RotaryTable) -> RotaryTable:
        """That of a rotary embedding, the same object for all layers that share it.

        Args:
            module: of vLLM's, on the device it runs on.
            plain: its table of one position per token, in the dtype it rotates in.

        Raises:
            ValueError: what is needed, and what the module is.
        """
        if module not in self._tables:
            axes = turning_axes(module, plain, self.step.shape[0])
            positions = TokenPositions(axes, self.step)
            self._tables[module] = dataclasses.replace(plain, positions=positions)
        return self._tables[module]


def turning_axes(module: torch.nn.Module, table: RotaryTable, num_axes: int) -> torch.Tensor:
    """[rotary_dim / 2] int32, which of a token's positions turns each pair of a rotary embedding.

    The embedding itself is asked: it turns keys whose pairs are (1, 0) to cosines and sines of tokens whose positions
    all differ. So neither the order of sections nor how axes interleave has to be known.

    Args:
        module: of vLLM's.
        table: its table of one position per token.
        num_axes: positions of a token.

    Raises:
        ValueError: what is needed, and what the module is: its pairs do not turn by one row of the table each.
    """
    cos_sin, half = table.cos_sin, table.rotary_dim // 2
    device, size = cos_sin.device, module.head_size
    random = torch.Generator().manual_seed(0)
    positions = torch.randint(cos_sin.shape[0], (num_axes, PROBES), generator=random).to(device)
    first, second = table.pairs(device)
    key = torch.zeros(PROBES, size, dtype=cos_sin.dtype, device=device)
    key[:, first] = 1
    with torch.no_grad():
        turned = module(positions, key.clone(), key.clone())[1].float()
    found = torch.stack([turned[:, first], turned[:, second]])
    angles = cos_sin[positions].float().unflatten(-1, (2, half)).permute(2, 0, 1, 3)  # cos and sin, axis, token, pair
    errors, axes = (angles - found[:, None]).abs().amax(dim=(0, 2)).min(dim=0)
    if not errors.max().item() <= PROBE_TOLERANCE:
        raise ValueError(
            f"rotary pairs that turn by one of a token's positions each, but the model's {type(module).__name__} "
            "turns them otherwise"
        )
    return axes.int()
