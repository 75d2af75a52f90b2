"""Pictures in prompts with vLLM's CPU build, which does without torchvision.

vLLM's wheel for CPUs brings a torchvision that needs CUDA, so the project's set-up leaves none. Models that take
pictures import it all the same, for videos and for a way of resizing that transformers has with Pillow too.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.helpers.tiny_model import SLIDING_WINDOW, WEIGHT_STD, make_tokenizer

PICTURE = (263, 265, 264)
"""Tokens of a prompt that a picture takes the place of: its begin, itself, its end."""
_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_qwen2_5_vl(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a random Qwen2.5-VL into ``folder`` and return the folder; each picture token is 28 pixels high and wide.

    Its keys' biases are large in three RoPE pairs, one for each of time, height and width.
    """
    layers, heads, kv_heads, size = 4, 4, 2, 64
    text = dict(
        num_hidden_layers=layers, hidden_size=heads * size, intermediate_size=512, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=512, max_position_embeddings=4096, initializer_range=WEIGHT_STD,
        bos_token_id=256, eos_token_id=257, pad_token_id=258, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=heads * size,
        window_size=112, fullatt_block_indexes=[1],
    )  # fmt: skip
    begin, picture, end = PICTURE
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, image_token_id=picture, video_token_id=266,
            vision_start_token_id=begin, vision_end_token_id=end, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            bias = layer.self_attn.k_proj.bias
            bias.normal_(std=WEIGHT_STD)
            bias.view(kv_heads, size)[:, [2, 10, size // 2 + 21]] = torch.tensor([20.0, -27.0, 23.0])
    return _save(model, folder, dtype, "Qwen2VLImageProcessor", min_pixels=28 * 28, max_pixels=1 << 18)


GEMMA_PICTURE = (263,)
"""Token of a prompt that a picture takes the place of."""
GEMMA_PICTURE_TOKENS = 16
"""Tokens of a picture of Gemma's, whatever its size."""
GEMMA_EXPANDED = (268, 263, *[265] * GEMMA_PICTURE_TOKENS, 264, 268)
"""What a picture's token becomes: an empty line, its begin, the picture, its end, and another empty line."""


def make_gemma3_vision(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a random Gemma 3 that takes pictures into ``folder`` and return the folder; every second layer slides."""
    layers, heads, kv_heads, size = 4, 4, 2, 64
    text = dict(
        num_hidden_layers=layers, hidden_size=heads * size, intermediate_size=512, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=size, vocab_size=512, max_position_embeddings=4096,
        initializer_range=WEIGHT_STD, bos_token_id=256, eos_token_id=257, pad_token_id=258,
        sliding_window=SLIDING_WINDOW, query_pre_attn_scalar=size,
        layer_types=["full_attention" if index % 2 else "sliding_attention" for index in range(layers)],
    )  # fmt: skip
    vision = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    begin, end, picture = 263, 264, 265
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=GEMMA_PICTURE_TOKENS, boi_token_index=begin,
            eoi_token_index=end, image_token_index=picture, initializer_range=WEIGHT_STD,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=4 * WEIGHT_STD)
    return _save(model, folder, dtype, "Gemma3ImageProcessor", size={"height": 56, "width": 56})


def gemma3_logprobs(folder: Path, tokens: Sequence[int], pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Log-probabilities [tokens, vocabulary] of transformers' own Gemma 3, in fp32.

    Args:
        folder: as :func:`make_gemma3_vision` wrote it.
        tokens: pictures as GEMMA_EXPANDED.
        pictures: in the order of their tokens.
    """
    model = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")["pixel_values"]
    ids = torch.tensor([list(tokens)])
    inputs = {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == model.config.image_token_id).long()}
    with torch.inference_mode():
        return model.eval()(**inputs).logits[0].double().log_softmax(-1).float().numpy()


def _save(model: PreTrainedModel, folder: Path, dtype: torch.dtype, processor: str, **settings: object) -> Path:
    model.to(dtype).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(_TOKENS)})
    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])  # which vLLM looks for around Gemma's pictures
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = ("boi_token", "eoi_token", "image_token", "video_token")
    config["extra_special_tokens"] = dict(zip(names, _TOKENS, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor, **settings}))
    if isinstance(model, Gemma3ForConditionalGeneration):
        # As released checkpoints have it; what transformers writes today, vLLM does not read.
        weights = load_file(folder / "model.safetensors")
        named = {name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in weights.items()}
        save_file(named, folder / "model.safetensors", {"format": "pt"})
        (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": GEMMA_PICTURE_TOKENS}))
    return folder


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A random one, [height, width, 3] uint8: low frequencies beside noise, so that its tokens differ."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3)).repeat(-(-height // 4), 0).repeat(-(-width // 4), 1)[:height, :width]
    return (coarse // 2 + random.integers(0, 128, (height, width, 3))).astype(np.uint8)


def stand_in_for_torchvision() -> None:
    """Let models that take pictures be imported, built and asked, in this process; nothing where torchvision is."""
    from transformers.utils import is_torchvision_available

    # Asked first, since transformers keeps the answer: it then takes Pillow where it would take what follows.
    if is_torchvision_available():
        return
    from transformers import processing_utils
    from transformers.models.auto.video_processing_auto import AutoVideoProcessor
    from transformers.video_processing_utils import BaseVideoProcessor
    from vllm.model_executor.models import registry

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        module = types.ModuleType(name)
        module.__path__ = []
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        sys.modules[name] = module
    sys.modules["torchvision.transforms.v2"].functional = types.ModuleType("functional")

    class NoVideos(BaseVideoProcessor):
        """Of an engine whose prompts have none."""

        def __init__(self) -> None:
            self.merge_size = self.temporal_patch_size = 2
            self.patch_size = 16
            self.size = {"shortest_edge": 1 << 10, "longest_edge": 1 << 20}

        def to_dict(self) -> dict:
            return {}

    # Which the package hides without torchvision.
    processing_utils.transformers_module.VideoProcessorMixin = BaseVideoProcessor
    AutoVideoProcessor.from_pretrained = lambda *_, **__: NoVideos()
    # Models are looked at in a process of their own, which would know nothing of this.
    registry._run_in_subprocess = lambda function: function()
