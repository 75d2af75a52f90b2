"""Gradients of a text's log-likelihood by keys before RoPE and by values, from transformers, in a process of its own.

vLLM computes none. KVQuant weights its tables by their squares, the diagonal of the Fisher information.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvtuner_tools.progress import track


@dataclass(frozen=True)
class GradientJob:
    """What to differentiate.

    Args:
        model: folder or id.
        windows: token ids.
        folder: to write to.
    """

    model: str
    windows: tuple[tuple[int, ...], ...]
    folder: Path


def write_gradients(job: GradientJob) -> None:
    """Write one file a window, with the gradients of every attention layer in order.

    Raises:
        ValueError: a model whose attention layers have no projections of keys and of values of their own.
    """
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval().to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            kept[name] = output

        return hook

    parents = [module for module in model.modules() if hasattr(module, "k_proj") and hasattr(module, "v_proj")]
    if not parents:
        raise ValueError(f"{job.model}: gradients need layers k_proj and v_proj, but the model has none")
    for place, parent in enumerate(parents):
        parent.k_proj.register_forward_hook(keep(f"{place}.key"))
        parent.v_proj.register_forward_hook(keep(f"{place}.value"))
    for number, window in enumerate(track(job.windows, "gradients", "window", total=len(job.windows))):
        ids = torch.tensor([window], device=device)
        logits = model(ids, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        grads = {name: output.grad[0].cpu() for name, output in kept.items() if output.grad is not None}
        save_file(grads, _file(job.folder, number))
        kept.clear()
        gc.collect()


def read_gradients(folder: Path, window: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By the keys and values of a window's attention layer, [num_tokens, num_kv_heads * head_size] fp32 each.

    Args:
        folder: that :func:`write_gradients` wrote to.
        window: its number.
        place: of the layer among those with attention.
    """
    with safe_open(_file(folder, window), framework="pt") as file:
        return file.get_tensor(f"{place}.key"), file.get_tensor(f"{place}.value")


def _file(folder: Path, window: int) -> Path:
    return folder / f"gradients_{window}.safetensors"
