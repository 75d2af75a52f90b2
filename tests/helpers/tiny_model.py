"""Tiny random-weights model folders that transformers and vLLM both load: config, safetensors, byte-level tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ARCHITECTURES = ("llama", "qwen2", "gemma3")
SLIDING_WINDOW = 64
"""Window in tokens of Gemma 3's even layers; its odd layers see everything."""
WEIGHT_STD = 0.08
"""Standard deviation of the random weights: large enough that logits and attention are far from uniform."""

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def make_tiny_model(
    folder: Path,
    architecture: str = "llama",
    *,
    num_layers: int = 4,
    hidden_size: int = 256,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 64,
    vocab_size: int = 512,
    max_model_len: int = 4096,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """Write a random model of one of ``ARCHITECTURES`` into ``folder`` and return the folder.

    The same arguments give the same weights. Qwen2's k projection bias gets a few large channels, as the real ones
    have (the key offset's reason to exist); all else is normal with standard deviation ``WEIGHT_STD``.
    Text becomes one token per byte with ``<bos>`` in front; ids from 263 on decode to nothing.

    Raises:
        ValueError: an architecture that is not in ``ARCHITECTURES``.
    """
    common = dict(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_size,
        vocab_size=vocab_size,
        max_position_embeddings=max_model_len,
        initializer_range=WEIGHT_STD,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    torch.manual_seed(seed)
    model: PreTrainedModel
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    elif architecture == "qwen2":
        if head_size * num_heads != hidden_size:
            raise ValueError(f"qwen2 needs head_size * num_heads == hidden_size, but got {head_size=} {num_heads=}")
        model = Qwen2ForCausalLM(Qwen2Config(**common))
        with torch.no_grad():
            for layer in model.model.layers:
                bias = layer.self_attn.k_proj.bias
                bias.normal_(std=WEIGHT_STD)
                bias.view(num_kv_heads, head_size)[:, [1, 7, head_size // 2 + 7]] = torch.tensor([8.0, -12.0, 10.0])
    elif architecture == "gemma3":
        kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **common, sliding_window=SLIDING_WINDOW, layer_types=kinds, query_pre_attn_scalar=head_size
            )
        )
    else:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, but got {architecture!r}")
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(max_model_len).save_pretrained(folder)
    return folder


def make_tokenizer(max_model_len: int = 4096) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, ids 0 to 255, then the special tokens."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=max_model_len,
    )
