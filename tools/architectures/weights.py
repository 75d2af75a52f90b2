"""Random weights of vLLM's own modules, by a model loader of vLLM's: no checkpoint is written or read.

They are large enough that attention and logits are far from uniform, so that an error in a cache shows.
"""

import math
import re
import zlib

import torch
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

LOAD_FORMAT = "kvtuner_random"
GAIN = 1.3
"""A matrix multiplies the norm of its input by about this much."""
BIAS_STD = 0.1
ATTENTION_BIAS_STD = 1.0
"""Of the biases of queries, keys and values: large enough that the key offset is used."""

_ATTENTION_BIAS = re.compile(r"(qkv|q_proj|k_proj|v_proj|c_attn|query_key_value|wqkv).*bias$", re.IGNORECASE)
_UNIFORM = {
    "weight": (0.5, 1.5),  # of a norm: what else has one dimension is a bias
    "A": (-1.5, -0.5),  # of Mamba, as the kernels take it: below 0
    "A_log": (-1.0, 1.0),
    "dt_bias": (-2.0, 0.0),
    "D": (0.5, 1.5),
    "sinks": (2.0, 6.0),  # about what the largest of a text's tokens have
}
"""Bounds by the last part of the name."""


@register_model_loader(LOAD_FORMAT)
class RandomLoader(BaseModelLoader):
    """Fills every floating-point parameter by its name and shape; the same names give the same numbers."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)

    def download_model(self, model_config: ModelConfig) -> None:
        pass

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        for prefix, module in model.named_modules():
            from_one = "Gemma" in type(module).__name__ and "Norm" in type(module).__name__
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.is_floating_point():
                    fill(name, parameter.data)
                    if from_one:  # the module adds 1
                        parameter.data.sub_(1.0)


def fill(name: str, values: torch.Tensor) -> None:
    """Random numbers of a parameter, in place; the same ones for the same name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    last = name.rpartition(".")[2]
    if last in _UNIFORM and (values.dim() < 2 or last != "weight"):
        values.uniform_(*_UNIFORM[last], generator=generator)
    elif values.numel() == 1:
        values.fill_(1.0)
    elif values.dim() < 2:
        std = ATTENTION_BIAS_STD if _ATTENTION_BIAS.search(name) else BIAS_STD
        values.normal_(std=std, generator=generator)
    else:
        values.normal_(std=GAIN / math.sqrt(values.shape[-1]), generator=generator)
