"""Shrunken configurations of the architectures that vLLM registers, from their configuration classes' own defaults.

A size is taken by the name of its key, at any depth, so that a new architecture needs no entry here unless its
configuration has rules of its own (``SPECIAL``) or its class is found under another name (``CONFIG_OF``).
"""

import importlib
from collections.abc import Mapping
from typing import Any

import transformers
from vllm.model_executor.models import registry

from kvtuner_tools.architectures.most_served import MOST_SERVED

HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 256, 4, 2, 64
NUM_LAYERS = 4
VOCABULARY = 128
FIRST_SPECIAL_TOKEN = 97
"""Token ids from here on are the configurations' own: images', end of text. Texts have smaller ones alone."""
MAX_MODEL_LEN = 512
SLIDING_WINDOW = 32
"""Tokens: of every sliding layer, so that the texts are longer than it."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), NUM_LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embed_dim", "lru_width"), HIDDEN_SIZE),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "n_inner"), HIDDEN_SIZE),
    **dict.fromkeys(("intermediate_size_mlp", "block_ff_dim", "shared_intermediate_size"), HIDDEN_SIZE),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), NUM_HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_query_groups"), NUM_KV_HEADS),
    **dict.fromkeys(("swa_num_key_value_heads", "num_global_key_value_heads"), NUM_KV_HEADS),
    "swa_num_attention_heads": NUM_HEADS,
    **dict.fromkeys(("head_dim", "kv_channels", "swa_head_dim", "swa_v_head_dim", "v_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "max_sequence_length"),
        MAX_MODEL_LEN,
    ),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention_window"), SLIDING_WINDOW),
    # Every token takes all experts: a random router's choice of some would turn small errors into leaps.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "experts_per_token"), 2),
    **dict.fromkeys(("moe_top_k", "top_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size", "expert_intermediate_size"), 64),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 64),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "hidden_size_per_layer_input": 32,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "mamba_expand": 2,
    "mamba_d_state": 32,
    "mamba_d_head": 64,
    "mamba_head_dim": 64,
    "mamba_headdim": 64,
    "mamba_n_heads": 2 * HIDDEN_SIZE // 64,
    "mamba_num_heads": 2 * HIDDEN_SIZE // 64,
    "n_mamba_heads": 2 * HIDDEN_SIZE // 64,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_d_ssm": 2 * HIDDEN_SIZE,
    "ssm_state_size": 32,
    "mamba_dt_rank": 16,
    "attention_multiplier": HEAD_SIZE**-0.5,
    "tie_word_embeddings": False,
}
"""What a key becomes where the class has a number there, or for the last a truth value. What is None stays so."""

_VISION = {
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model"), 64),
}
"""The same in the encoders of pictures and sounds, which the texts of the table do not run."""


def _kinds(default: Any) -> list[str]:
    """The kinds of layers that the class has, in turn, as often as there are layers."""
    kinds = list(dict.fromkeys(default.layer_types))
    return [kinds[index % len(kinds)] for index in range(max(NUM_LAYERS, 2 * len(kinds)))]


def _shrunken(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a config class: what of its default configuration is too large."""
    given: dict[str, Any] = {}
    special = FIRST_SPECIAL_TOKEN
    for key, value in config.to_dict().items():
        if isinstance(inner := vars(config).get(key), transformers.PreTrainedConfig):
            is_text = "text" in key or "thinker" in key or key in ("llm_config", "language_config")
            # Classes that hold a configuration of any kind read which one it is from its values.
            given[key] = {
                "model_type": inner.model_type,
                **_shrunken(inner, sizes if is_text else {**sizes, **_VISION}),
            }
        elif key.endswith(("_token_id", "_token_index", "_token_ids")) and isinstance(value, int | list):
            given[key] = special if isinstance(value, int) else [special]
            special = min(special + 1, VOCABULARY - 1)
        elif key in sizes and type(value) is type(sizes[key]):
            given[key] = sizes[key]
        elif key == "layer_types" and value:
            given[key] = _kinds(config)
    if "layer_types" in given:
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if key in given:
                given[key] = len(given["layer_types"])
    return given | SPECIAL.get(config.model_type, {})


_M_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]}}
"""The three position numbers of pictures share the pairs of a head of 64; the classes have none by default."""

_M3 = {
    "hidden_act": "swigluoai",
    "moe_layer_freq": [0, 1, 1, 1],
    "rotary_dim": HEAD_SIZE // 2,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_index_dim": HEAD_SIZE,
        "sparse_num_index_heads": NUM_KV_HEADS,
        "sparse_topk_blocks": 16,
        "sparse_block_size": 128,
        "sparse_disable_index_value": [0, 1, 1, 1],
        "sparse_score_type": "max",
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_attention_freq": [0, 1, 1, 1],
    },
}

SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "softmax", "route_norm": True, "n_group": 1, "topk_group": 1},
    "bailing_hybrid": {"layer_group_size": 2},
    "chatglm": {
        "add_qkv_bias": True,
        "multi_query_attention": True,
        "multi_query_group_num": NUM_KV_HEADS,
        "original_rope": True,
        "padded_vocab_size": VOCABULARY,
        "seq_length": MAX_MODEL_LEN,
        "tie_word_embeddings": False,
    },
    "cosmos3_edge_text": _M_ROPE,
    # vLLM's class has no values of its own.
    "deepseek_v4": {
        "compress_ratios": [4, 128] * 2,
        "head_dim": HEAD_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
    },
    "glm4_moe": {"head_dim": HEAD_SIZE, "partial_rotary_factor": 0.5},
    "glm4v_moe_text": {"head_dim": HEAD_SIZE, "partial_rotary_factor": 0.5, "use_qk_norm": False},
    "glm5_next_text": {"num_key_value_heads": NUM_HEADS, "qk_rope_head_dim": 0},
    "gpt_bigcode": {"num_key_value_heads": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 1, "L_cycles": 1},
    "hy_v3": {"first_k_dense_replace": 1, "expert_hidden_dim": 64, "route_norm": True},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
        **dict.fromkeys(("conv_dim", "block_dim", "block_ff_dim"), HIDDEN_SIZE),
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "conv_dim": HIDDEN_SIZE},
    "mamba2": {"num_heads": 2 * HIDDEN_SIZE // 64, "head_dim": 64},
    "mimo_v2_flash": {"head_dim": 96, "v_head_dim": 64},  # of unlike size, as the released models'
    # vLLM has no CPU kernel for the released models' routing.
    "minimax_m2": {"rotary_dim": HEAD_SIZE // 2, "scoring_func": "softmax", "use_routing_bias": False},
    "minimax_m3_text": _M3,
    "minimax_m3_vl_text": _M3,
    "minimax_m3_vl_vision": {"img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2}},
    "nemotron": {"num_key_value_heads": NUM_KV_HEADS},
    # Without experts, for whose activation vLLM has no CPU kernel.
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"]},
    "paddleocr_vl_text": _M_ROPE,
    "qwen2_5_omni_text": _M_ROPE,
    "qwen2_5_vl_text": _M_ROPE,
    "qwen2_vl_text": _M_ROPE,
    "qwen3_omni_moe_text": _M_ROPE,
    "qwen3_vl_moe_text": {**_M_ROPE, "norm_topk_prob": True},
    "qwen3_vl_text": _M_ROPE,
    "radio": {"video_temporal_patch_size": 2},
    "step3_text": {"moe_layers_enum": "1,2,3"},
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": SLIDING_WINDOW},
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 2 * HIDDEN_SIZE,
        "attention_head_dim": 2 * HIDDEN_SIZE // NUM_HEADS,
        "num_key_value_heads": NUM_HEADS,
        "kv_channels": HEAD_SIZE,
        "num_query_groups": NUM_HEADS,
    },
}
"""Further arguments by ``model_type``, over what the names of the sizes give. Some are no arguments of the class, but
names that vLLM reads, since the released models' files have them."""

_LLAMA_NAMES = ("LLaMAForCausalLM", "InternLM3ForCausalLM", "IQuestCoderForCausalLM", "TeleChat3ForCausalLM")
_VLLM_CONFIGS = "vllm.transformers_utils.configs"
_OWN_CONFIGS = {
    "BagelConfig": "BagelForConditionalGeneration",
    "BailingMoeV3TextConfig": "BailingMoeV3ForCausalLM",
    "BailingMoeV3VLConfig": "BailingMoeV3VLForConditionalGeneration",
    "ChatGLMConfig": "ChatGLMModel",
    "DeepseekV4Config": "DeepseekV4ForCausalLM",
    "DeepseekVLV2Config": "DeepseekVLV2ForCausalLM",
    "Dots3NoteConfig": "Dots3NoteForCausalLM",
    "DotsOCRConfig": "DotsOCRForCausalLM",
    "FunAudioChatConfig": "FunAudioChatForConditionalGeneration",
    "IsaacConfig": "IsaacForConditionalGeneration",
    "KimiK3Config": "KimiK3ForConditionalGeneration",
    "KimiVLConfig": "KimiVLForConditionalGeneration",
    "Kimi_K25Config": "KimiK25ForConditionalGeneration",
    "MiDashengLMConfig": "MiDashengLMModel",
    "MiniMaxM3TextConfig": "MiniMaxM3SparseForCausalLM",
    "Moondream3Config": "Moondream3ForCausalLM",
    "MossTranscribeDiarizeConfig": "MossTranscribeDiarizeForConditionalGeneration",
    "MuseGlimmerTextConfig": "MuseGlimmerForCausalLM",
    "OpenVLAConfig": "OpenVLAForActionPrediction",
    "OvisConfig": "Ovis",
    "Step3TextConfig": "Step3TextForCausalLM",
    "Step3VLConfig": "Step3VLForConditionalGeneration",
    "Step3p5Config": "Step3p5ForCausalLM",
    "UltravoxConfig": "UltravoxModel",
    "UnlimitedOCRConfig": "UnlimitedOCRForCausalLM",
}
"""Classes of vLLM's own, with an architecture."""
CONFIG_OF: dict[str, str] = {
    **dict.fromkeys(_LLAMA_NAMES, "LlamaConfig"),
    "SolarForCausalLM": "LlamaConfig",
    "MiMoForCausalLM": "Qwen2Config",
    "MistralLarge3ForCausalLM": "DeepseekV3Config",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "Rnj1ForCausalLM": "Gemma3TextConfig",
    "ExaoneMoEForCausalLM": "ExaoneMoeConfig",
    "MiMoV2ForCausalLM": "MiMoV2FlashConfig",
    **{architecture: f"{_VLLM_CONFIGS}:{name}" for name, architecture in _OWN_CONFIGS.items()},
    "ChatGLMForConditionalGeneration": f"{_VLLM_CONFIGS}:ChatGLMConfig",
}
"""Architectures whose configuration class is not that of a transformers class of their name: ``module:class`` of it, or
the name of a class of transformers."""


def architectures() -> tuple[str, ...]:
    """Every architecture that generates text as vLLM registers it: the most served, then the others in its order."""
    text = (*registry._TEXT_GENERATION_MODELS, *registry._TRANSFORMERS_SUPPORTED_MODELS)
    return tuple(dict.fromkeys((*MOST_SERVED, *text, *registry._MULTIMODAL_MODELS)))


def takes_more_than_text(architecture: str) -> bool:
    """Whether an architecture takes pictures or sounds too."""
    return architecture in registry._MULTIMODAL_MODELS or architecture.endswith("ForConditionalGeneration")


def config_class(architecture: str) -> Any:
    """The class of an architecture's configuration, or None where neither transformers nor vLLM has one."""
    name = CONFIG_OF.get(architecture, architecture)
    if ":" in name:
        module, _, name = name.partition(":")
        return getattr(importlib.import_module(module), name, None)
    found = getattr(transformers, name, None)
    return getattr(found, "config_class", None) or (found if name.endswith("Config") else None)


def tiny_config(architecture: str) -> dict[str, Any] | None:
    """What a tiny model's ``config.json`` holds, or None for an architecture without a configuration class."""
    kind = config_class(architecture)
    if kind is None:
        return None
    config = kind(**_shrunken(kind(), _SIZES))
    config.architectures = [architecture]
    config.dtype = "float32"
    return _stored(config.to_dict())


def _stored(values: dict[str, Any]) -> dict[str, Any]:
    """Without what classes add to their values, inside others too, and some of them then refuse."""
    return {
        key: _stored(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in ("_name_or_path", "output_attentions")
    }
