"""``kvtuner statics``: the key offset of a model from its k projection's bias, without data.

The bias is what the projection adds to every key before RoPE, so it is the offset as
:mod:`vllm_kvtuner.profile.statics` defines it. Checkpoints of the Llama and Qwen families keep channels in half-split
(neox) order, the order in which vLLM's k projection emits a head too; nothing is reordered.
"""

import argparse
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kvtuner_tools.model_files import read_config, refuse_model_folder, shape_of_values
from vllm_kvtuner.profile.model_shape import LayerShape, ModelShape
from vllm_kvtuner.profile.problems import ProfileError, format_layers
from vllm_kvtuner.profile.statics import LayerStatics, save_statics

_TENSOR = re.compile(
    r"(?P<tower>.*?)\b(?:layers|h)\.(?P<layer>[0-9]+)\.(?:self_attn|self_attention|attention|attn)\."
    r"(?P<projection>k_proj|qkv_proj|qkv|query_key_value|c_attn|k_norm)\.(?P<kind>bias|weight)"
)
_OTHER_TOWER = re.compile("vision|visual|audio|encoder|speech")
_CONCATENATED = ("chatglm", "internlm3", "phi3", "qwen")
"""Model types whose fused bias holds all query heads, then all key heads, then all value heads."""
_PER_HEAD = ("gpt_neox",)
"""Model types whose fused bias holds query, key and value of one head after the other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model folder or id with safetensors weights")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="safetensors file to write")


def run(args: argparse.Namespace) -> int:
    if not args.out.parent.is_dir():
        raise ProfileError([f"{args.out}: --out must be in a folder that exists, but got {str(args.out.parent)!r}"])
    refuse_model_folder(args.model, args.out.parent)
    statics = key_offsets(args.model)
    metadata = {"model": args.model, "method": "k_proj.bias"}
    metadata |= {name: importlib.metadata.version(name) for name in ("numpy", "safetensors")}
    save_statics(args.out, statics, metadata)
    print(f"{args.out}: key_offset of layers {format_layers(statics)}, from the k projection's bias of {args.model}")
    return 0


def key_offsets(model: str) -> dict[int, LayerStatics]:
    """Key offset of every attention layer.

    Args:
        model: folder or id.

    Raises:
        ProfileError: no weights in safetensors, no k bias, or a bias that is no offset before RoPE.
    """
    shape = shape_of_values(model)
    if shape.unsupported:
        raise ProfileError(shape.refusals)
    biases = {layer: bias for layer, bias in _key_biases(model, shape) if shape.layers[layer].num_kv_heads}
    if not biases:
        rule = "must have a k projection with a bias to make a key offset of"
        advice = "none: the offset would be zero; leave key_offset out of the profile"
        raise ProfileError([f"{model}: model {rule}, but got {advice}"])
    if missing := [layer for layer in shape.attention_layers if layer not in biases]:
        raise ProfileError([f"{model}: k projections must all have a bias, but got none for {format_layers(missing)}"])
    return {layer: LayerStatics(key_offset=bias) for layer, bias in sorted(biases.items())}


def _key_biases(model: str, shape: ModelShape) -> Iterator[tuple[int, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    config = read_config(model)
    for path in _weight_files(model):
        try:
            weights = safe_open(path, framework="pt")  # numpy knows no bfloat16, so torch reads the biases
        except SafetensorError as error:
            raise ProfileError([f"{path}: the file must be a complete safetensors file, but got {error}"]) from None
        with weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                match = _TENSOR.fullmatch(name)
                if match is None or _OTHER_TOWER.search(match["tower"]):
                    continue
                if match["projection"] == "k_norm":
                    rule = "must not normalize keys after their projection for its bias to be an offset"
                    raise ProfileError([f"{path}: model {rule}, but got {name}"])
                layer = int(match["layer"])
                if match["kind"] == "weight" or layer >= len(shape.layers) or not shape.layers[layer].num_kv_heads:
                    continue
                bias = weights.get_tensor(name).float().numpy()
                yield layer, _key_rows(f"{path}: {name}", match["projection"], bias, shape.layers[layer], config)


def _key_rows(where: str, projection: str, bias: np.ndarray, layer: LayerShape, config: Any) -> np.ndarray:
    """The key's part of a bias, [num_kv_heads, head_size]."""
    key_size = layer.num_kv_heads * layer.head_size
    kind = config.get("model_type") if isinstance(config, dict) else config.model_type
    if projection == "k_proj":
        size = key_size
    elif kind in _CONCATENATED:
        size = bias.size  # the query's part is the rest, whatever its head count
    elif kind in _PER_HEAD:
        size = 3 * key_size
    else:
        known = ", ".join((*_CONCATENATED, *_PER_HEAD))
        raise ProfileError([f"{where} must be fused as in models of the types {known}, but got {kind}"])
    query_size = size - 2 * key_size
    if bias.shape != (size,) or (projection != "k_proj" and (query_size <= 0 or query_size % key_size)):
        raise ProfileError([f"{where} must have {size} numbers for {layer}, but got {list(bias.shape)}"])
    if projection == "k_proj":
        key = bias
    elif kind in _PER_HEAD:
        key = bias.reshape(layer.num_kv_heads, 3, layer.head_size)[:, 1]
    else:
        key = bias[query_size : query_size + key_size]
    return key.reshape(layer.num_kv_heads, layer.head_size)


def _weight_files(model: str) -> list[Path]:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ProfileError([f"{model}: model must have weights in safetensors, but got a folder without"])
    return files
