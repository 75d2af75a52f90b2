"""Tiny random-weights model folders that transformers and vLLM both load: config, safetensors, byte-level tokenizer.

And what goes with them: heads that draft tokens, and adapters.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    GraniteSWAConfig,
    GraniteSWAForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

HYBRIDS = ("granite_hybrid", "falcon_h1", "qwen3_next", "lfm2")
"""Even layers are linear attention (state-space, both, gated delta net, short convolution), odd ones full attention;
every layer of Falcon-H1 is both."""
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "gemma4", "gpt_oss", "granite_swa", *HYBRIDS)
SLIDING_WINDOW = 64
"""Window in tokens of the even layers of Gemma 3 and 4, gpt-oss and Granite SWA; their odd layers see everything."""
LARGE_HEAD_SIZE = 512
"""Of Gemma 4's odd layers."""
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
    have (the key offset's reason to exist); the factors of Qwen3's query and key norms lie between 0.5 and 1.5; all
    else is normal with standard deviation ``WEIGHT_STD``.
    Text becomes one token per byte with ``<bos>`` in front; ids from 263 on decode to nothing.

    Raises:
        ValueError: an architecture that is not in ``ARCHITECTURES``.
    """
    if architecture in ("qwen2", "granite_hybrid", "granite_swa", "lfm2") and head_size * num_heads != hidden_size:
        raise ValueError(
            f"{architecture} needs head_size * num_heads == hidden_size, but got {head_size=} {num_heads=}"
        )
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
        model = Qwen2ForCausalLM(Qwen2Config(**common))
        with torch.no_grad():
            for layer in model.model.layers:
                bias = layer.self_attn.k_proj.bias
                bias.normal_(std=WEIGHT_STD)
                bias.view(num_kv_heads, head_size)[:, [1, 7, head_size // 2 + 7]] = torch.tensor([8.0, -12.0, 10.0])
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**common))
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_norm.weight.uniform_(0.5, 1.5)
                layer.self_attn.k_norm.weight.uniform_(0.5, 1.5)
    elif architecture == "gemma3":
        kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **common, sliding_window=SLIDING_WINDOW, layer_types=kinds, query_pre_attn_scalar=head_size
            )
        )
    elif architecture == "gemma4":
        model = _gemma4(common)
    elif architecture in ("gpt_oss", "granite_swa"):
        model = _with_sinks(architecture, common)
    elif architecture in HYBRIDS:
        model = _hybrid(architecture, common)
    else:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}, but got {architecture!r}")
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(max_model_len).save_pretrained(folder)
    return folder


def _gemma4(common: dict[str, Any]) -> PreTrainedModel:
    """Full layers of one KV head of ``LARGE_HEAD_SIZE``, whose values are made of the keys' projection.

    The model scales no logits; here the factors of its query norms do, as 1 / sqrt(head size) would.
    """
    kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(common["num_hidden_layers"])]
    full = dict(global_head_dim=LARGE_HEAD_SIZE, num_global_key_value_heads=1, attention_k_eq_v=True)
    inputs = dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=common["vocab_size"])
    config = Gemma4TextConfig(**common, **full, **inputs, sliding_window=SLIDING_WINDOW, layer_types=kinds)
    model = Gemma4ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.fill_(2 * layer.self_attn.head_dim**-0.5)
    return model


def _with_sinks(architecture: str, common: dict[str, Any]) -> PreTrainedModel:
    """Attention sinks that take about as much of a query's attention as tokens do; dense, or with experts.

    Every token of gpt-oss takes all experts: a random router's choice of some would turn errors of a cache into leaps.
    """
    model: PreTrainedModel
    if architecture == "granite_swa":
        kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(common["num_hidden_layers"])]
        scale = common["head_dim"] ** -0.5
        model = GraniteSWAForCausalLM(
            GraniteSWAConfig(**common, sliding_window=SLIDING_WINDOW, layer_types=kinds, attention_multiplier=scale)
        )
    else:
        yarn = dict(rope_type="yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False, rope_theta=150000.0)
        yarn["original_max_position_embeddings"] = common["max_position_embeddings"] // 4
        experts = dict(num_local_experts=2, num_experts_per_tok=2)
        model = GptOssForCausalLM(
            GptOssConfig(**common, **experts, sliding_window=SLIDING_WINDOW, rope_parameters=yarn)
        )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(mean=4.0, std=2.0)
    return model


def _hybrid(architecture: str, common: dict[str, Any]) -> PreTrainedModel:
    hidden_size, head_size = common["hidden_size"], common["head_dim"]

    def kinds(even: str, odd: str = "full_attention") -> list[str]:
        return [odd if index % 2 else even for index in range(common["num_hidden_layers"])]

    mamba = dict(mamba_expand=2, mamba_n_heads=hidden_size // 32, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=32)
    if architecture == "granite_hybrid":
        return GraniteMoeHybridForCausalLM(
            GraniteMoeHybridConfig(
                **common,
                **mamba,
                layer_types=kinds("mamba", "attention"),
                position_embedding_type="rope",
                attention_multiplier=head_size**-0.5,
                num_local_experts=0,
                num_experts_per_tok=0,
                shared_intermediate_size=2 * hidden_size,
            )
        )
    if architecture == "falcon_h1":
        return FalconH1ForCausalLM(FalconH1Config(**common, **mamba, mamba_d_ssm=2 * hidden_size))
    if architecture == "lfm2":
        # vLLM reads sizes that the released models' files give and the config class has no field for.
        sizes = dict(conv_dim=hidden_size, block_dim=hidden_size, block_ff_dim=2 * hidden_size)
        return Lfm2ForCausalLM(Lfm2Config(**common, **sizes, layer_types=kinds("conv"), block_auto_adjust_ff_dim=False))
    last = common["num_hidden_layers"] - 1
    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **common,
            layer_types=kinds("linear_attention"),
            linear_key_head_dim=head_size,
            linear_value_head_dim=head_size,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            mlp_only_layers=list(range(last)),  # vLLM wants one layer of experts
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        )
    )


def make_eagle_head(target: Path, folder: Path) -> Path:
    """Write an EAGLE head of one layer for a Llama: its last layer behind a projection that keeps the hidden state."""
    shutil.copytree(target, folder)
    config = json.loads((folder / "config.json").read_text())
    size, last = config["hidden_size"], config["num_hidden_layers"] - 1
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    weights = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{last}."
    head = {name.replace(prefix, "layers.0."): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    del head["layers.0.input_layernorm.weight"]  # these heads have none
    head["fc.weight"] = torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1).to(torch.bfloat16)
    save_file(head, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_lora_adapter(target: Path, folder: Path, rank: int = 8) -> Path:
    """Write an adapter of random matrices beside a model's projections of keys, values and outputs."""
    model = json.loads((target / "config.json").read_text())
    hidden, heads = model["hidden_size"], model["head_dim"] * model["num_attention_heads"]
    kv_heads = model["head_dim"] * model["num_key_value_heads"]
    projections = {"k_proj": (hidden, kv_heads), "v_proj": (hidden, kv_heads), "o_proj": (heads, hidden)}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(projections)}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "base_model_name_or_path": "x"}))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(model["num_hidden_layers"]):
        for name, (width, out) in projections.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{stem}.lora_A.weight"] = WEIGHT_STD * torch.randn(rank, width, generator=generator)
            weights[f"{stem}.lora_B.weight"] = WEIGHT_STD * torch.randn(out, rank, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
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
