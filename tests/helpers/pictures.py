"""Pictures in prompts with vLLM's CPU build, which does without torchvision.

vLLM's wheel for CPUs brings a torchvision that needs CUDA, so the project's set-up leaves none. Models that take
pictures import it all the same, for videos and for a way of resizing that transformers has with Pillow too.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.helpers.tiny_model import WEIGHT_STD, make_tokenizer

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


def _save(model: PreTrainedModel, folder: Path, dtype: torch.dtype, processor: str, **settings: object) -> Path:
    model.to(dtype).save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(_TOKENS)})
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": processor, **settings}))
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
